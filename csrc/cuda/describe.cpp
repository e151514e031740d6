#include "describe.h"

#include <limits>
#include <stdexcept>

namespace cbam::cuda {
namespace {

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw std::invalid_argument("dtype: expected float32, float64, float16 or bfloat16, got " + name);
}

void expect_positive(const char* name, const std::vector<int64_t>& sizes) {
  for (const int64_t size : sizes)
    if (size < 1 || size > std::numeric_limits<int32_t>::max())
      throw std::invalid_argument(std::string(name) + ": expected sizes from 1 to 2^31 - 1, got " +
                                  std::to_string(size));
}

// Stands for memory that a kernel would be handed.
template <class P>
P* somewhere(bool present = true) {
  return present ? reinterpret_cast<P*>(uintptr_t{256}) : nullptr;
}

}  // namespace

ForwardProblem describe(const Description& d) {
  expect_positive("shape", d.shape);
  expect_positive("kernel", d.kernel);
  expect_positive("hidden", {d.hidden});
  if (d.shape.size() < 3 || d.shape.size() > 5)
    throw std::invalid_argument("shape: expected 3 to 5 sizes, got " +
                                std::to_string(d.shape.size()));
  if (d.kernel.size() != d.shape.size() - 2)
    throw std::invalid_argument("kernel: expected a size for each of " +
                                std::to_string(d.shape.size() - 2) + " dimensions, got " +
                                std::to_string(d.kernel.size()));
  for (const int64_t size : d.kernel)
    if (size % 2 == 0)
      throw std::invalid_argument("kernel: expected odd sizes, got " + std::to_string(size));
  int64_t space[3] = {1, 1, 1}, kernel[3] = {1, 1, 1};
  for (size_t i = 0, first = 3 - d.kernel.size(); i < d.kernel.size(); ++i) {
    space[first + i] = d.shape[2 + i];
    kernel[first + i] = d.kernel[i];
  }
  ForwardProblem p{};
  p.dtype = dtype_of(d.dtype);
  p.shape = {d.shape[0], d.shape[1], d.hidden,  space[0], space[1],
             space[2],   kernel[0],  kernel[1], kernel[2]};
  const int64_t channels = p.shape.channels, pixels = p.shape.pixels();
  expect_positive("shape", {pixels});
  const bool last = d.channels_last && channels > 1;
  p.strides = {channels * pixels, last ? 1 : pixels, last ? channels : 1};
  p.out_strides = p.strides;
  p.x = reinterpret_cast<const void*>(uintptr_t{256} + (d.aligned ? 0 : bytes_of(p.dtype)));
  p.out = somewhere<void>();
  p.weights = {dtype_of(d.weight_dtype.empty() ? d.dtype : d.weight_dtype),
               somewhere<void>(),
               somewhere<void>(d.bias),
               somewhere<void>(),
               somewhere<void>(d.bias),
               {somewhere<void>(), false},
               somewhere<void>(d.bias)};
  p.saved = {somewhere<void>(),
             somewhere<void>(),
             somewhere<void>(),
             somewhere<void>(d.training),
             somewhere<void>(d.training),
             somewhere<int32_t>(d.training),
             somewhere<int32_t>(d.training)};
  p.ending = {somewhere<void>(d.residual), p.strides, false};
  return p;
}

BackwardProblem describe_backward(const Description& d) {
  Description training = d;
  training.training = true;
  training.residual = false;
  BackwardProblem p{};
  static_cast<ForwardProblem&>(p) = describe(training);
  p.dout_strides = p.dx_strides = p.strides;
  p.dout = p.x;
  p.gradients = {somewhere<void>(),      somewhere<void>(),       somewhere<void>(d.bias),
                 somewhere<void>(),      somewhere<void>(d.bias), somewhere<void>(),
                 somewhere<void>(d.bias)};
  return p;
}

}  // namespace cbam::cuda
