#include <algorithm>

#include "plan_parts.h"

namespace cbam::cuda {
namespace {

// Walks of few samples read the weights four times as often, from the cache, and backwards a narrow
// tile of units what reaches the gates: that pays where three quarters of the multiprocessors would
// have no block.
constexpr int64_t kIdleShare = 4;
// Hidden units beside each other in the second layer's backward, in threads: fewer would read less
// than 32 bytes of a row of float16.
constexpr int kFewestAlong = 8;
// Bytes of both layers' weights up to which one launch takes both: every block reads all of them,
// at some 100 GB/s, while a launch more takes 3 us.
constexpr int64_t kMostTogether = 128 * 1024;

bool leaves_idle(int64_t blocks, const DeviceLimits& device) {
  return blocks * kIdleShare < device.multiprocessors;
}

int samples_of_walk(int64_t samples, int64_t tiles, const DeviceLimits& device) {
  return leaves_idle(ceil_div(samples, kSamplesPerWalk) * tiles, device) ? kFewSamples
                                                                         : kSamplesPerWalk;
}

}  // namespace

bool takes_layers_together(const ForwardProblem& p) {
  const Shape& s = p.shape;
  return s.hidden <= kUnitsTogether &&
         2 * s.channels * s.hidden * bytes_of(p.weights.dtype) <= kMostTogether;
}

int64_t hidden_tiles(const MlpGeometry& g, const Shape& s) {
  return ceil_div(s.hidden, g.unit_warps * kUnitsPerWarp);
}
int64_t gate_tiles(const Shape& s) { return ceil_div(s.channels, kGateChannels); }
int64_t gate_tiles(const MlpBackwardGeometry& g, const Shape& s) {
  return ceil_div(s.hidden, g.units_along * kBackwardUnits);
}
int64_t hidden_tiles(const MlpBackwardGeometry& g, const Shape& s) {
  return ceil_div(s.channels, kHiddenBackwardThreads * backward_channels(g.hidden_samples));
}

MlpGeometry plan_mlp(const ForwardProblem& p, int64_t samples, int pool_splits,
                     const DeviceLimits& device) {
  const Shape& s = p.shape;
  const auto* weights = static_cast<const char*>(p.weights.fc2_weight);
  MlpGeometry g{};
  g.together = takes_layers_together(p);
  g.hidden_samples =
      samples_of_walk(samples, g.together ? 1 : ceil_div(s.hidden, kUnitsPerWarp), device);
  const int64_t walks = ceil_div(samples, g.hidden_samples);
  // Blocks that share the samples read all parts of the pooled vectors again: no more of them than
  // fill the device, and the fewer the more parts there are.
  g.unit_warps = kThreads / 32;
  while (g.unit_warps > 1 &&
         (g.unit_warps / 2 * kUnitsPerWarp >= s.hidden ||
          (!g.together && 2 * walks * hidden_tiles(g, s) * pool_splits <= device.multiprocessors)))
    g.unit_warps /= 2;
  g.gate_samples = g.together ? g.hidden_samples : samples_of_walk(samples, gate_tiles(s), device);
  g.vectors = reinterpret_cast<uintptr_t>(weights) % kVectorBytes == 0 &&
              s.hidden * bytes_of(p.weights.dtype) % kVectorBytes == 0;
  return g;
}

MlpBackwardGeometry plan_mlp(const BackwardProblem& p, int64_t samples,
                             const DeviceLimits& device) {
  const Shape& s = p.shape;
  MlpBackwardGeometry g{};
  g.together = takes_layers_together(p);
  g.units_along = 32;
  g.gate_samples = samples_of_walk(samples, gate_tiles(g, s), device);
  const int64_t walks = ceil_div(samples, g.gate_samples);
  while (g.units_along > kFewestAlong &&
         (g.units_along / 2 * kBackwardUnits >= s.hidden ||
          (!g.together && leaves_idle(walks * gate_tiles(g, s), device))))
    g.units_along /= 2;
  const int64_t most_channels = kHiddenBackwardThreads * backward_channels(kSamplesPerWalk);
  g.hidden_samples = g.together
                         ? g.gate_samples
                         : samples_of_walk(samples, ceil_div(s.channels, most_channels), device);
  return g;
}

}  // namespace cbam::cuda
