#include "arguments.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <exception>
#include <initializer_list>
#include <string>

namespace cbam {
namespace {

std::string text(Sizes sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

bool same_kind(const std::optional<Strides>& a, const std::optional<Strides>& b) {
  return a && b && a->channels_first() == b->channels_first();
}

// As many sizes as x has dimensions, on the stack: small blocks take no longer than allocations do.
class Extents {
 public:
  Extents(std::initializer_list<int64_t> first) {
    for (const int64_t size : first) push(size);
  }
  void push(int64_t size) { values_[count_++] = size; }
  operator Sizes() const { return Sizes(values_, count_); }

 private:
  static constexpr size_t kMost = 5;
  int64_t values_[kMost];
  size_t count_ = 0;
};

// [a, b] followed by the spatial sizes of x.
Extents over_space(const Tensor& x, int64_t a, int64_t b) {
  Extents sizes{a, b};
  for (const int64_t size : x.sizes().slice(2)) sizes.push(size);
  return sizes;
}

// [a, b] followed by ones up to `dimensions`.
Extents over_point(int64_t dimensions, int64_t a, int64_t b) {
  Extents sizes{a, b};
  for (int64_t i = 2; i < dimensions; ++i) sizes.push(1);
  return sizes;
}

// Throws unless `t` has exactly these sizes and this dtype, on x's device.
void expect_tensor(const char* name, const Tensor& t, Sizes sizes, const Tensor& x,
                   ScalarType dtype) {
  STD_TORCH_CHECK(t.sizes().equals(sizes), name, ": expected shape ", text(sizes), ", got ",
                  text(t.sizes()));
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected dtype ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == x.device(), name, ": expected the device of x");
}

// Indices address memory: those of a direct caller must not lead out of it.
void expect_indices(const char* name, const Tensor& t, int64_t below) {
  if (!t.is_cpu()) return;
  const Tensor indices = dense(t);
  const int32_t* p = static_cast<const int32_t*>(indices.const_data_ptr());
  bool inside = true;
  for (int64_t i = 0, n = indices.numel(); i < n; ++i) inside &= p[i] >= 0 && p[i] < below;
  STD_TORCH_CHECK(inside, name, ": expected indices in [0, ", below, ")");
}

// The extents of x; the others are 1.
Shape check_x(const Tensor& x) {
  dtype_of(x);
  const int64_t dim = x.dim() - 2;
  STD_TORCH_CHECK(dim >= 1 && dim <= 3, "x: expected 3, 4 or 5 dimensions, got ", dim + 2);
  Shape s{x.size(0), x.size(1), 1, 1, 1, 1, 1, 1, 1};
  // Spatial dimensions fill up from the last one.
  int64_t* const space[] = {&s.width, &s.height, &s.depth};
  for (int64_t i = 0; i < dim; ++i) *space[i] = x.size(dim + 1 - i);
  STD_TORCH_CHECK(s.channels > 0 && s.pixels() > 0,
                  "x: expected no empty channel or spatial dimension");
  STD_TORCH_CHECK(s.pixels() < INT32_MAX && s.channels < INT32_MAX,
                  "x: expected fewer than 2^31 - 1 channels and spatial positions");
  return s;
}

int32_t code_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Int: return aoti_torch_dtype_int32();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    default: return aoti_torch_dtype_float32();
  }
}

// In the words that programs look for which then try again with less. torch's own type of error
// cannot be raised from here: cbam_cuda/ops.py sees to that.
[[noreturn]] void no_memory(const Tensor& like, Sizes sizes) {
  const char* what =
      like.is_cpu() ? "DefaultCPUAllocator: can't allocate memory." : "CUDA out of memory.";
  STD_TORCH_CHECK(false, what, " Tried to make a tensor of shape ", text(sizes));
}

Tensor empty_strided(const Tensor& like, Sizes sizes, const int64_t* strides, ScalarType dtype) {
  int32_t device_type, device_index;
  AtenTensorHandle made;
  const bool done = aoti_torch_get_device_type(like.get(), &device_type) == AOTI_TORCH_SUCCESS &&
                    aoti_torch_get_device_index(like.get(), &device_index) == AOTI_TORCH_SUCCESS &&
                    aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                             strides, code_of(dtype), device_type, device_index,
                                             &made) == AOTI_TORCH_SUCCESS;
  if (!done) no_memory(like, sizes);
  return Tensor(made);
}

// As torch's elementwise operators lay out their results; past the dispatcher where that is plain.
Tensor empty_as(const Tensor& x) {
  if (x.is_contiguous()) return empty_strided(x, x.sizes(), x.strides().data(), x.scalar_type());
  try {
    return torch::stable::empty_like(x);
  } catch (const std::exception&) {
    no_memory(x, x.sizes());
  }
}

// Not contiguous(): an empty tensor counts as that whatever its strides.
Tensor contiguous_copy(const Tensor& t) {
  Tensor copy = empty(t, t.sizes(), t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// Whether the weights of the convolution are as channels_last has them.
bool maps_last(const Tensor& conv_weight) {
  if (conv_weight.is_contiguous() || conv_weight.stride(1) != 1) return false;
  int64_t stride = 2;
  for (int64_t i = conv_weight.dim(); --i > 1; stride *= conv_weight.size(i))
    if (conv_weight.size(i) > 1 && conv_weight.stride(i) != stride) return false;
  return true;
}

// Allocators give large tensors back to the system and map them anew. Faulting that in by pages of
// 4 KB takes longer than CBAM does.
void ask_for_large_pages(const Tensor& t) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20, kSmallest = 4 * kPage;
  const uintptr_t bytes = static_cast<uintptr_t>(t.numel()) * bytes_of(dtype_of(t));
  if (bytes < kSmallest || !t.is_cpu()) return;
  const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage,
                  last = (begin + bytes) / kPage * kPage;
  // A wish: where it is not granted, nothing is lost.
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor empty_as_conv_weight(const Tensor& conv_weight) {
  const auto sizes = conv_weight.sizes();
  if (!maps_last(conv_weight)) return empty(conv_weight, sizes, conv_weight.scalar_type());
  return empty_strided(conv_weight, sizes, conv_weight.strides().data(), conv_weight.scalar_type());
}

Tensor empty(const Tensor& like, Sizes sizes, ScalarType dtype) {
  constexpr size_t kMostDimensions = 5;
  STD_TORCH_CHECK(sizes.size() <= kMostDimensions, "expected at most 5 dimensions");
  int64_t strides[kMostDimensions], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return empty_strided(like, sizes, strides, dtype);
}

DType dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64, float16 or bfloat16, got ",
                      torch::headeronly::toString(dtype));
  }
}

DType dtype_of(const Tensor& x) { return dtype_of(x.scalar_type()); }

ScalarType accumulator_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Shape check_forward(const Tensor& x, const WeightArguments& w) {
  Shape s = check_x(x);
  const int64_t dim = x.dim() - 2;
  const auto k = w.conv_weight.sizes();
  STD_TORCH_CHECK(static_cast<int64_t>(k.size()) == dim + 2, "conv_weight: expected ", dim + 2,
                  " dimensions, got ", k.size());
  for (const int64_t given : {w.fc1_weight.dim(), w.fc2_weight.dim()})
    STD_TORCH_CHECK(given == 2 || given == dim + 2, "fc1_weight and fc2_weight: expected 2 or ",
                    dim + 2, " dimensions");
  s.hidden = w.fc1_weight.size(0);
  int64_t* const kernel[] = {&s.kernel_width, &s.kernel_height, &s.kernel_depth};
  for (int64_t i = 0; i < dim; ++i) *kernel[i] = k[k.size() - 1 - i];
  STD_TORCH_CHECK(s.hidden > 0 && s.hidden < INT32_MAX,
                  "fc1_weight: expected 1 to 2^31 - 2 hidden channels, got ", s.hidden);
  STD_TORCH_CHECK(s.kernel_depth % 2 && s.kernel_height % 2 && s.kernel_width % 2,
                  "conv_weight: expected odd kernel sizes");

  const ScalarType dtype = w.fc1_weight.scalar_type();
  STD_TORCH_CHECK(dtype == x.scalar_type() || dtype == accumulator_of(x),
                  "fc1_weight: expected the dtype of x or its accumulator's");
  expect_tensor("fc1_weight", w.fc1_weight, over_point(w.fc1_weight.dim(), s.hidden, s.channels), x,
                dtype);
  expect_tensor("fc2_weight", w.fc2_weight, over_point(w.fc2_weight.dim(), s.channels, s.hidden), x,
                dtype);
  expect_tensor("conv_weight", w.conv_weight, over_space(w.conv_weight, 1, 2), x, dtype);
  if (w.fc1_bias) expect_tensor("fc1_bias", *w.fc1_bias, {s.hidden}, x, dtype);
  if (w.fc2_bias) expect_tensor("fc2_bias", *w.fc2_bias, {s.channels}, x, dtype);
  if (w.conv_bias) expect_tensor("conv_bias", *w.conv_bias, {1}, x, dtype);
  return s;
}

Shape check_scale(const Tensor& x, const Tensor& channel_gate, const char* name,
                  const Tensor& spatial) {
  const Shape s = check_x(x);
  const ScalarType acc = accumulator_of(x);
  expect_tensor("channel_gate", channel_gate, over_point(x.dim(), s.samples, s.channels), x, acc);
  expect_tensor(name, spatial, over_space(x, s.samples, 1), x, acc);
  return s;
}

void check_residual(const Tensor& x, const Tensor& residual) {
  expect_tensor("residual", residual, x.sizes(), x, x.scalar_type());
}

DenseWeights::DenseWeights(const WeightArguments& w) {
  const auto data = [&](const Tensor& t) -> const void* {
    if (t.is_contiguous()) return t.const_data_ptr();
    owned.push_back(dense(t));
    return owned.back().const_data_ptr();
  };
  const auto data_or_null = [&](const std::optional<Tensor>& t) { return t ? data(*t) : nullptr; };
  const bool as_it_is = maps_last(w.conv_weight);
  const ConvWeight conv{as_it_is ? w.conv_weight.const_data_ptr() : data(w.conv_weight), as_it_is};
  view = {dtype_of(w.fc1_weight),   data(w.fc1_weight),       data_or_null(w.fc1_bias),
          data(w.fc2_weight),       data_or_null(w.fc2_bias), conv,
          data_or_null(w.conv_bias)};
}

SavedTensors SavedTensors::make(const Tensor& x, const Shape& s) {
  const ScalarType acc = accumulator_of(x);
  return {empty(x, over_point(x.dim(), s.samples, s.channels), acc),
          empty(x, over_space(x, s.samples, 1), acc),
          empty(x, {s.samples, 2, s.channels}, acc),
          empty(x, {s.samples, 2, s.hidden}, acc),
          empty(x, over_space(x, s.samples, 2), x.scalar_type()),
          empty(x, {s.samples, s.channels}, ScalarType::Int),
          empty(x, {s.samples, s.pixels()}, ScalarType::Int)};
}

void SavedTensors::check(const Tensor& x, const Shape& s) const {
  const ScalarType acc = accumulator_of(x);
  expect_tensor("channel_gate", channel_gate, over_point(x.dim(), s.samples, s.channels), x, acc);
  expect_tensor("spatial_gate", spatial_gate, over_space(x, s.samples, 1), x, acc);
  expect_tensor("pooled", pooled, {s.samples, 2, s.channels}, x, acc);
  expect_tensor("hidden", hidden, {s.samples, 2, s.hidden}, x, acc);
  expect_tensor("maps", maps, over_space(x, s.samples, 2), x, x.scalar_type());
  expect_tensor("pixel_argmax", pixel_argmax, {s.samples, s.channels}, x, ScalarType::Int);
  expect_tensor("channel_argmax", channel_argmax, {s.samples, s.pixels()}, x, ScalarType::Int);
  expect_indices("pixel_argmax", pixel_argmax, s.pixels());
  expect_indices("channel_argmax", channel_argmax, s.channels);
}

SavedTensors SavedTensors::contiguous() const {
  return {dense(channel_gate), dense(spatial_gate), dense(pooled),        dense(hidden),
          dense(maps),         dense(pixel_argmax), dense(channel_argmax)};
}

Saved SavedTensors::view() const {
  return {channel_gate.mutable_data_ptr(),
          pooled.mutable_data_ptr(),
          hidden.mutable_data_ptr(),
          spatial_gate.mutable_data_ptr(),
          maps.mutable_data_ptr(),
          static_cast<int32_t*>(pixel_argmax.mutable_data_ptr()),
          static_cast<int32_t*>(channel_argmax.mutable_data_ptr())};
}

void check_gradients(Part part, const Tensor& x, const Shape& s, const Tensor& grad_out,
                     const std::optional<Tensor>& grad_channel_gate,
                     const std::optional<Tensor>& grad_spatial) {
  const ScalarType acc = accumulator_of(x);
  expect_tensor("grad_out", grad_out, x.sizes(), x, x.scalar_type());
  if (grad_channel_gate)
    expect_tensor("grad_channel_gate", *grad_channel_gate,
                  over_point(x.dim(), s.samples, s.channels), x, acc);
  if (grad_spatial)
    expect_tensor(part == Part::kLogits ? "grad_logits" : "grad_spatial_gate", *grad_spatial,
                  over_space(x, s.samples, 1), x, acc);
}

std::optional<Strides> native_strides(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t pixel = 1, pixels = 1;
  for (size_t i = sizes.size() - 1; i >= 2; --i) {
    if (sizes[i] == 1) continue;
    if (pixels == 1) pixel = strides[i];
    if (strides[i] != pixel * pixels) return std::nullopt;
    pixels *= sizes[i];
  }
  const int64_t channels = sizes[1], channel = channels == 1 ? pixels : strides[1];
  // One pixel is a row of channels, one channel a row of pixels: so dense tensors of the same sizes
  // and strides always agree.
  const bool first = pixel == 1 && (pixels > 1 || channels == 1);
  const bool last = channel == 1 && channels > 1;
  if (first) return Strides{strides[0], channel, 1};
  if (last) return Strides{strides[0], 1, pixels == 1 ? channels : pixel};
  return std::nullopt;
}

Tensor in_layout_of(const Tensor& like, const Tensor& t) {
  if (same_kind(native_strides(like), native_strides(t))) return t;
  Tensor copy = empty_as(like);
  torch::stable::copy_(copy, t);
  return copy;
}

Tensor in_native_layout(const Tensor& t) { return native_strides(t) ? t : contiguous_copy(t); }

std::pair<Tensor, Tensor> in_one_layout(const Tensor& a, const Tensor& b) {
  if (same_kind(native_strides(a), native_strides(b))) return {a, b};
  return {contiguous_copy(a), contiguous_copy(b)};
}

Output::Output(const Tensor& x) : result(empty_as(x)), native(result) {
  if (!native_strides(result)) native = empty(x, x.sizes(), x.scalar_type());
  ask_for_large_pages(result);
}

void Output::finish() {
  if (native.get() != result.get()) torch::stable::copy_(result, native);
}

}  // namespace cbam
