// What reaches the spatial gate of samples that stay on the chip.
//
//   d_spatial[s] = sum_c dout * x * channel_gate[c]
#pragma once

#include "resident_sums.cuh"

namespace cbam::cuda {

// The channel gate of the kCount channels of a vector, as factors of dout * x.
template <int kCount, class A>
struct GateFactors {
  A gate[kCount];

  __device__ __forceinline__ explicit GateFactors(const A* gates) {
    load_shared(gates, true, gate);
  }
  __device__ __forceinline__ A operator()(int, int i, A x, A dout) const {
    return x * dout * gate[i];
  }
};

// The sums over the channels that the block holds, of every pixel that it does: to `sums`.
template <bool kWhole, bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void sum_over_channels(const ResidentBackward& p,
                                                  Loads<T, kChannelsFirst, kSplit>& loads,
                                                  const BackwardMemory<T>& m, acc_t<T>* sums) {
  using A = acc_t<T>;
  const ResidentBackwardGeometry& g = p.geometry;
  const int pixels = loads.block.pixels();
  const A* gates = m.shared.of_channels.gate();
  walk_both(loads, 0, [&](const RowsOfBoth<T, kChannelsFirst, kSplit>& of) {
    if constexpr (kChannelsFirst)
      with_columns_together<kWhole, T>(pixels, [&](auto count) {
        sum_columns<count.value>(
            of,
            [&](int sample, int channel) {
              return [gate = gates[sample * g.held_channels + channel]](int, A x, A dout) {
                return x * dout * gate;
              };
            },
            [&](int sample, int pixel, A sum) {
              A& total = sums[sample * pixels + pixel];
              total = of.first == 0 ? sum : total + sum;
            });
      });
    else
      sum_rows<kColumnsTogether<T>>(
          of,
          [&](int sample, int channel) {
            return GateFactors<kColumnsTogether<T>, A>(gates + sample * g.held_channels + channel);
          },
          [&](int sample, int pixel, A sum) { sums[sample * pixels + pixel] = sum; });
  });
}

}  // namespace cbam::cuda
