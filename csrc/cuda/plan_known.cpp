// Plans that were made before: a network asks for the same few in every step, and to search for one
// takes longer than the kernels of a small batch.
#include <map>
#include <mutex>
#include <vector>

#include "plan.h"

namespace cbam::cuda {
namespace {

// Beyond so many problems all are forgotten: some workloads never ask for one twice.
constexpr size_t kMostKnown = 1024;

// All that a plan follows from. Of a tensor that is whether there is one, and how far it starts
// from a multiple of 16 bytes.
class Key {
 public:
  Key(const ForwardProblem& p, const DeviceLimits& device, Strategy strategy) {
    static_assert(sizeof(ForwardProblem) == 8 * 32, "a member that is no part of the key");
    of(p.dtype, p.weights.dtype, strategy);
    of(p.shape);
    of(p.strides, p.out_strides);
    const Weights& w = p.weights;
    tensors(p.x, p.out, w.fc1_weight, w.fc1_bias, w.fc2_weight, w.fc2_bias, w.conv_weight,
            w.conv_bias);
    const Saved& s = p.saved;
    tensors(s.channel_gate, s.pooled, s.hidden, s.spatial_gate, s.maps, s.pixel_argmax,
            s.channel_argmax);
    of(device);
  }
  Key(const BackwardProblem& p, const DeviceLimits& device, Strategy strategy)
      : Key(static_cast<const ForwardProblem&>(p), device, strategy) {
    static_assert(sizeof(BackwardProblem) == sizeof(ForwardProblem) + 8 * 16,
                  "a member that is no part of the key");
    of(p.dout_strides, p.dx_strides);
    const Gradients& g = p.gradients;
    tensors(p.dout, p.d_channel_gate, p.d_spatial_gate, g.x, g.fc1_weight, g.fc1_bias, g.fc2_weight,
            g.fc2_bias, g.conv_weight, g.conv_bias);
  }
  bool operator<(const Key& other) const { return values_ < other.values_; }

 private:
  template <class... Values>
  void numbers(Values... values) {
    (values_.push_back(static_cast<int64_t>(values)), ...);
  }
  template <class... Pointers>
  void tensors(Pointers... tensors) {
    numbers((tensors ? static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensors) % kVectorBytes)
                     : int64_t{-1})...);
  }
  void of(DType x, DType weights, Strategy strategy) { numbers(x, weights, strategy); }
  void of(const Shape& s) {
    numbers(s.samples, s.channels, s.hidden, s.depth, s.height, s.width, s.kernel_depth,
            s.kernel_height, s.kernel_width);
  }
  void of(const Strides& a, const Strides& b) {
    numbers(a.sample, a.channel, a.pixel, b.sample, b.channel, b.pixel);
  }
  void of(const DeviceLimits& d) {
    numbers(d.capability, d.multiprocessors, d.threads_per_multiprocessor, d.shared_per_block,
            d.shared_per_multiprocessor, d.l2_bytes, d.bandwidth);
    values_.insert(values_.end(), std::begin(d.clusters), std::end(d.clusters));
  }

  std::vector<int64_t> values_;
};

template <class Plan, class Problem>
Plan known(const Problem& p, const DeviceLimits& device, Strategy strategy) {
  static std::mutex mutex;
  static std::map<Key, Plan> plans;
  const Key key(p, device, strategy);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = plans.find(key);
    if (found != plans.end()) return found->second;
  }
  const Plan made = plan(p, device, strategy);
  const std::lock_guard<std::mutex> lock(mutex);
  if (plans.size() >= kMostKnown) plans.clear();
  plans.emplace(key, made);
  return made;
}

}  // namespace

ForwardPlan known_plan(const ForwardProblem& p, const DeviceLimits& device, Strategy strategy) {
  return known<ForwardPlan>(p, device, strategy);
}
BackwardPlan known_plan(const BackwardProblem& p, const DeviceLimits& device, Strategy strategy) {
  return known<BackwardPlan>(p, device, strategy);
}

}  // namespace cbam::cuda
