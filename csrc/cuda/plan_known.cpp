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
// from a multiple of 16 bytes. A struct that gets one more member does not compile here.
class Key {
 public:
  Key(const ForwardProblem& p, const DeviceLimits& device, const Strategy& strategy) {
    const auto& [dtype, shape, strides, out_strides, x, out, weights, saved, logits, part, ending] =
        p;
    numbers(dtype, part);
    of(strategy);
    of(shape);
    of(strides);
    of(out_strides);
    tensors(x, out, logits);
    of(weights);
    of(saved);
    of(ending);
    of(device);
  }
  Key(const BackwardProblem& p, const DeviceLimits& device, const Strategy& strategy)
      : Key(static_cast<const ForwardProblem&>(p), device, strategy) {
    static_assert(sizeof p == sizeof(ForwardProblem) + 2 * sizeof(Strides) + 3 * sizeof(void*) +
                                  sizeof(Gradients),
                  "a member that is no part of the key");
    of(p.dout_strides);
    of(p.dx_strides);
    tensors(p.dout, p.d_channel_gate, p.d_spatial_gate);
    of(p.gradients);
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
  void of(const Shape& s) {
    const auto& [samples, channels, hidden, depth, height, width, kernel_z, kernel_y, kernel_x] = s;
    numbers(samples, channels, hidden, depth, height, width, kernel_z, kernel_y, kernel_x);
  }
  void of(const Strides& s) {
    const auto& [sample, channel, pixel] = s;
    numbers(sample, channel, pixel);
  }
  void of(const Weights& w) {
    const auto& [dtype, fc1, fc1_bias, fc2, fc2_bias, conv, conv_bias] = w;
    numbers(dtype);
    tensors(fc1, fc1_bias, fc2, fc2_bias, conv.data, conv_bias);
  }
  void of(const Saved& s) {
    const auto& [channel, pooled, hidden, spatial, maps, pixel_argmax, channel_argmax] = s;
    tensors(channel, pooled, hidden, spatial, maps, pixel_argmax, channel_argmax);
  }
  void of(const Ending& e) {
    const auto& [residual, strides, relu] = e;
    tensors(residual);
    of(strides);
    numbers(relu);
  }
  void of(const Gradients& g) {
    const auto& [x, fc1, fc1_bias, fc2, fc2_bias, conv, conv_bias, channel_gate, spatial_gate] = g;
    tensors(x, fc1, fc1_bias, fc2, fc2_bias, conv, conv_bias, channel_gate, spatial_gate);
  }
  void of(const Strategy& s) {
    const auto& [kind, way] = s;
    const auto& [split, cluster, team, blocks, samples, ahead] = way;
    numbers(kind, split ? static_cast<int>(*split) : -1, cluster ? static_cast<int>(*cluster) : -1,
            team, blocks, samples, ahead);
  }
  void of(const DeviceLimits& d) {
    const auto& [name, capability, multiprocessors, threads, shared_per_block, shared, l2,
                 bandwidth, clusters] = d;
    numbers(capability, multiprocessors, threads, shared_per_block, shared, l2, bandwidth);
    for (const int most : clusters) numbers(most);
  }

  std::vector<int64_t> values_;
};

template <class Plan, class Problem>
Plan known(const Problem& p, const DeviceLimits& device, const Strategy& strategy) {
  static std::mutex mutex;
  static auto& plans = *new std::map<Key, Plan>;  // threads may still run when a process ends
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

ForwardPlan known_plan(const ForwardProblem& p, const DeviceLimits& device,
                       const Strategy& strategy) {
  return known<ForwardPlan>(p, device, strategy);
}
BackwardPlan known_plan(const BackwardProblem& p, const DeviceLimits& device,
                        const Strategy& strategy) {
  return known<BackwardPlan>(p, device, strategy);
}

}  // namespace cbam::cuda
