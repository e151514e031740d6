// The backend `emulated`: the CUDA backend's planner, launchers and kernels on CPU tensors, as
// operators of a library of their own, cbam_cuda_emulated. What the kernels may touch is watched,
// and what they have to write starts as NaN.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../emulator.h"
#include "cuda/backward.h"
#include "cuda/forward.h"
#include "ops.h"

namespace cbam {
namespace {

cuda::DeviceLimits limits_of(const std::string& name, int multiprocessors) {
  const cuda::DeviceLimits& whole = cuda::known_device(name);
  return multiprocessors ? cuda::slice_of(whole, multiprocessors) : whole;
}

// The GPU that plans are made for.
cuda::DeviceLimits& device() {
  static cuda::DeviceLimits limits = [] {
    const char* name = std::getenv("CBAM_CUDA_EMULATED_DEVICE");
    const char* multiprocessors = std::getenv("CBAM_CUDA_EMULATED_MULTIPROCESSORS");
    return limits_of(name && *name ? name : "H100",
                     multiprocessors ? std::atoi(multiprocessors) : 0);
  }();
  return limits;
}

// Memory of the current call that kernels may touch, no longer than the call.
class Watched {
 public:
  Watched() = default;
  Watched(const Watched&) = delete;
  Watched& operator=(const Watched&) = delete;
  ~Watched() { emulator::unwatch_all(); }

  void read(const char* name, const void* p, int64_t bytes) const {
    if (p) emulator::watch(p, static_cast<size_t>(bytes), name, false);
  }
  void write(const char* name, void* p, int64_t bytes) const {
    if (!p) return;
    std::memset(p, 0xff, static_cast<size_t>(bytes));
    emulator::watch(p, static_cast<size_t>(bytes), name, true);
  }
};

// Bytes from the first to behind the last element of a tensor of x's size.
int64_t extent(const ForwardProblem& p, const Strides& s) {
  return ((p.shape.samples - 1) * s.sample + (p.shape.channels - 1) * s.channel +
          (p.shape.pixels() - 1) * s.pixel + 1) *
         bytes_of(p.dtype);
}

void watch_weights(const Watched& watched, const ForwardProblem& p) {
  const Shape& s = p.shape;
  const Weights& w = p.weights;
  const int64_t size = bytes_of(w.dtype);
  watched.read("mlp_weights", w.fc1_weight, s.hidden * s.channels * size);
  watched.read("mlp_weights", w.fc1_bias, s.hidden * size);
  watched.read("mlp_weights", w.fc2_weight, s.hidden * s.channels * size);
  watched.read("mlp_weights", w.fc2_bias, s.channels * size);
  watched.read("conv_weights", w.conv_weight.data, 2 * s.taps() * size);
  watched.read("conv_weights", w.conv_bias, size);
}

// What the forward writes and the backward reads.
template <class Watch>
void watch_saved(const ForwardProblem& p, Watch watch) {
  const Shape& s = p.shape;
  const int64_t n = s.samples, acc = bytes_of_accumulator(p.dtype);
  watch("channel_gate", p.saved.channel_gate, n * s.channels * acc);
  watch("pooled", p.saved.pooled, n * 2 * s.channels * acc);
  watch("hidden", p.saved.hidden, n * 2 * s.hidden * acc);
  watch("spatial_gate", p.saved.spatial_gate, n * s.pixels() * acc);
  watch("maps", p.saved.maps, n * 2 * s.pixels() * bytes_of(p.dtype));
  watch("pixel_argmax", p.saved.pixel_argmax, n * s.channels * 4);
  watch("channel_argmax", p.saved.channel_argmax, n * s.pixels() * 4);
}

void watch_gradients(const Watched& watched, const BackwardProblem& p) {
  const Shape& s = p.shape;
  const Gradients& g = p.gradients;
  const int64_t size = bytes_of(p.weights.dtype);
  watched.write("gradients", g.fc1_weight, s.hidden * s.channels * size);
  watched.write("gradients", g.fc1_bias, s.hidden * size);
  watched.write("gradients", g.fc2_weight, s.hidden * s.channels * size);
  watched.write("gradients", g.fc2_bias, s.channels * size);
  watched.write("gradients", g.conv_weight, 2 * s.taps() * size);
  watched.write("gradients", g.conv_bias, size);
  const int64_t acc = bytes_of_accumulator(p.dtype);
  watched.write("d_channel_gate", g.channel_gate, s.samples * s.channels * acc);
  watched.write("d_spatial_gate", g.spatial_gate, s.samples * s.pixels() * acc);
}

struct Emulated {
  static void forward(const ForwardProblem& p, const Tensor& x) {
    const cuda::ForwardPlan plan = cuda::plan_to_run(p, device());
    const int64_t bytes = cuda::scratch(plan, p).total();
    const Tensor memory = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
    const Watched watched;
    watched.read("x", p.x, extent(p, p.strides));
    if (p.ending.residual) watched.read("residual", p.ending.residual, extent(p, p.ending.strides));
    watched.write("out", p.out, extent(p, p.out_strides));
    watched.write("scratch", memory.mutable_data_ptr(), bytes);
    watch_weights(watched, p);
    watched.read("logits", p.logits,
                 p.shape.samples * p.shape.pixels() * bytes_of_accumulator(p.dtype));
    watch_saved(p, [&](const char* name, void* data, int64_t size) {
      if (p.part == Part::kScale && data == p.saved.channel_gate)
        watched.read(name, data, size);
      else
        watched.write(name, data, size);
    });
    cuda::run(p, plan, memory.mutable_data_ptr(), nullptr);
  }
  static void backward(const BackwardProblem& p, const Tensor& x) {
    const cuda::BackwardPlan plan = cuda::plan_to_run(p, device());
    const int64_t bytes = cuda::scratch(plan, p).total();
    const Tensor memory = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
    const Watched watched;
    const Shape& s = p.shape;
    const int64_t acc = bytes_of_accumulator(p.dtype);
    if (s.samples > 0) {
      watched.read("x", p.x, extent(p, p.strides));
      watched.read("dout", p.dout, extent(p, p.dout_strides));
      if (p.gradients.x) watched.write("dx", p.gradients.x, extent(p, p.dx_strides));
    }
    watched.write("scratch", memory.mutable_data_ptr(), bytes);
    watched.read("d_channel_gate", p.d_channel_gate, s.samples * s.channels * acc);
    watched.read("d_spatial_gate", p.d_spatial_gate, s.samples * s.pixels() * acc);
    watch_weights(watched, p);
    watch_gradients(watched, p);
    watch_saved(p, [&](const char* name, const void* data, int64_t size) {
      watched.read(name, data, size);
    });
    cuda::run(p, plan, memory.mutable_data_ptr(), nullptr);
  }
};

}  // namespace
}  // namespace cbam

STABLE_TORCH_LIBRARY(cbam_cuda_emulated, m) { CBAM_DEFINE_OPERATORS(m); }

STABLE_TORCH_LIBRARY_IMPL(cbam_cuda_emulated, CPU, m) {
  CBAM_IMPLEMENT_OPERATORS(m, cbam::Emulated);
}

#pragma GCC visibility push(default)
// For tests: plans are made for this GPU; where they are not 0, with a cache of that many bytes, a
// memory of that many bytes a second and that many multiprocessors. Returns 0, or -1 for a name
// that is not known.
extern "C" int emulated_device(const char* name, long long l2_bytes, long long bandwidth,
                               int multiprocessors) {
  try {
    cbam::device() = cbam::limits_of(name, multiprocessors);
  } catch (const std::invalid_argument&) {
    return -1;
  }
  if (l2_bytes) cbam::device().l2_bytes = l2_bytes;
  if (bandwidth) cbam::device().bandwidth = static_cast<double>(bandwidth);
  return 0;
}
#pragma GCC visibility pop
