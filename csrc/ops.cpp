// Which backend an operator runs for which kind of tensor.
#include "ops.h"

#include "cpu/target.h"
#if defined(CBAM_WITH_CUDA)
#include <torch/csrc/stable/accelerator.h>

#include "cuda/backward.h"
#include "cuda/device.h"
#include "cuda/forward.h"
#include "cuda/stream.h"
#endif

namespace cbam {
namespace {

struct Cpu {
  static cpu::ThreadPool pool() {
    return {torch::stable::get_num_threads(),
            [](int64_t tasks, void (*body)(void*, int64_t), void* context) {
              torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
                for (int64_t task = begin; task < end; ++task) body(context, task);
              });
            }};
  }
  static void forward(const ForwardProblem& p, const Tensor&) { cpu::target().forward(p, pool()); }
  static void backward(const BackwardProblem& p, const Tensor&) {
    cpu::target().backward(p, pool());
  }
};

#if defined(CBAM_WITH_CUDA)
struct Cuda {
  static void forward(const ForwardProblem& p, const Tensor& x) { run(p, x); }
  static void backward(const BackwardProblem& p, const Tensor& x) { run(p, x); }

 private:
  template <class Problem>
  static void run(const Problem& p, const Tensor& x) {
    const int device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cuda::CurrentDevice current(device);
    const auto plan = cuda::plan_to_run(p, cuda::limits_of_device(device));
    const Tensor memory = empty(x, {cuda::scratch(plan, p).total()}, ScalarType::Byte);
    cuda::run(p, plan, memory.mutable_data_ptr(), cuda::current_stream(device));
  }
};
#endif

}  // namespace
}  // namespace cbam

STABLE_TORCH_LIBRARY(cbam_cuda, m) { CBAM_DEFINE_OPERATORS(m); }

STABLE_TORCH_LIBRARY_IMPL(cbam_cuda, CPU, m) { CBAM_IMPLEMENT_OPERATORS(m, cbam::Cpu); }

#if defined(CBAM_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(cbam_cuda, CUDA, m) { CBAM_IMPLEMENT_OPERATORS(m, cbam::Cuda); }
#endif
