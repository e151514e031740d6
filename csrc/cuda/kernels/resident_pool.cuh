// Mean and maximum over space of samples that stay on the chip, of the channels whose gates a block
// makes. Where blocks hold pixels, every block puts out what its own have of all channels, and the
// team merges that in the order of ranks.
#pragma once

#include "resident_extremes.cuh"

namespace cbam::cuda {

// put(sample, channel, sum and maximum) where a channel's pixels are a row.
template <bool kTraining, Split kSplit, class T, class Ready, class Put>
__device__ __forceinline__ void walk_rows(const ResidentForwardGeometry& g,
                                          const ResidentBlock<T, true, kSplit>& block,
                                          const T* tile, Ready ready, Put put) {
  constexpr int kCount = kVector<T>;
  const int cols = block.cols();
  const auto walk = [&](auto count) {
    walk_along<count.value, false, kTraining>(g, block, tile, 0, block.rows(), block.first_pixel(),
                                              nullptr, ready, put);
  };
  if (block.kHoldsPixels || cols % kCount == 0)
    walk(std::integral_constant<int, kCount>());
  else if (cols % (kCount / 2) == 0)
    walk(std::integral_constant<int, kCount / 2>());
  else if (g.lanes > 1)
    walk(std::integral_constant<int, 1>());
  else
    walk_short_rows<kTraining>(g, block, tile, ready, put);
}

// put(sample, channel that the block holds, sum and maximum over its pixels), as they arrive.
template <bool kTraining, bool kChannelsFirst, Split kSplit, class T, class Put>
__device__ __forceinline__ void walk_channels(const ResidentForwardGeometry& g,
                                              const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                              const ForwardMemory<T>& m, Put put) {
  int chunk = 0, of_sample = 0;  // the next to be waited for: rows are asked for in their order
  const auto ready = [&](int sample, int to) {
    if (sample != of_sample) chunk = 0;
    of_sample = sample;
    for (; chunk * g.chunk <= to; ++chunk)
      wait_for_chunk(g, m.shared.landed + sample * g.chunks + chunk, block.parity());
  };
  if constexpr (kChannelsFirst)
    walk_rows<kTraining>(g, block, m.shared.tile, ready, put);
  else
    walk_columns<false, kTraining>(g, block, m, 0, block.cols(), block.first_pixel(), nullptr,
                                   g.chunk, ready, put);
}

// Keeps the mean and maximum over space of a channel whose gate the block makes.
template <bool kTraining, bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void put_pooled(const ResidentForward& p,
                                           const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                           const ForwardMemory<T>& m, int64_t first_sample,
                                           int sample, int c,
                                           const Extremes<acc_t<T>, kTraining>& e) {
  using A = acc_t<T>;
  const A mean = e.sum / static_cast<A>(p.space.pixels());
  A* pooled = m.shared.pooled + c * p.geometry.pooled_pitch() + 2 * sample;
  pooled[0] = mean;
  pooled[1] = e.max;
  if constexpr (kTraining) {
    const int64_t n = first_sample + sample, channel = block.first_channel + c;
    A* saved = static_cast<A*>(p.saved.pooled) + n * 2 * p.channels + channel;
    saved[0] = mean;
    saved[p.channels] = e.max;
    p.saved.pixel_argmax[n * p.channels + channel] = e.argmax_or(0);
  }
}

// Where the block holds the channels; zeros for samples that are not there.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void pool(const ResidentForward& p,
                                     const ResidentBlock<T, kChannelsFirst>& block,
                                     const ForwardMemory<T>& m) {
  using A = acc_t<T>;
  const ResidentForwardGeometry& g = p.geometry;
  const int64_t first_sample = block.first_sample();
  walk_channels<kTraining>(g, block, m, [&](int sample, int c, const Extremes<A, kTraining>& e) {
    put_pooled<kTraining>(p, block, m, first_sample, sample, c, e);
  });
  for (int c = threadIdx.x; c < block.channels; c += g.threads)
    for (int v = 2 * block.samples; v < g.vectors(); ++v)
      m.shared.pooled[c * g.pooled_pitch() + v] = A(0);
  __syncthreads();
}

// Threads that read what blocks of the team have of a channel.
constexpr int kPoolLanes = 8;

// Where the block holds pixels.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void pool(const ResidentForward& p,
                                     const ResidentBlock<T, kChannelsFirst, Split::kPixels>& block,
                                     const ForwardMemory<T>& m) {
  using A = acc_t<T>;
  const ResidentForwardGeometry& g = p.geometry;
  A *sums = m.exchange.pools, *maxima = sums + p.channels;
  int32_t* argmax = m.exchange.pool_argmax;
  walk_channels<kTraining>(g, block, m, [&](int, int c, const Extremes<A, kTraining>& e) {
    sums[c] = e.sum;
    maxima[c] = e.max;
    if constexpr (kTraining) argmax[c] = e.argmax_or(block.first_pixel());
  });
  block.team.barrier();
  const int lane = threadIdx.x % kPoolLanes, at_once = g.threads / kPoolLanes;
  for (int done = 0; done < block.channels; done += at_once) {
    const int c = done + static_cast<int>(threadIdx.x) / kPoolLanes, at = block.first_channel + c;
    Extremes<A, kTraining> merged;
    if (c < block.channels)
      read_from(block.team, [&](auto read) {
        for_batches<4>(
            lane, g.team, kPoolLanes,
            [&](int from) {
              Extremes<A, kTraining> e;
              e.sum = read(sums + at, from);
              e.max = read(maxima + at, from);
              if constexpr (kTraining) e.argmax = read(argmax + at, from);
              return e;
            },
            [&](int, const Extremes<A, kTraining>& e) { merged.merge(e); });
      });
    merge_lanes(merged, kPoolLanes);
    if (lane == 0 && c < block.channels)
      put_pooled<kTraining>(p, block, m, block.first_sample(), 0, c, merged);
  }
  __syncthreads();
}

}  // namespace cbam::cuda
