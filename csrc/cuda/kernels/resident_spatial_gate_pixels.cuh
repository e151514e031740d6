// The spatial gate of samples that stay on the chip, where blocks hold pixels.
//
//   spatial_gate[s] = sigmoid(conv(mean and max over c of x * channel_gate) + bias)
//
// Every block has the whole maps of its own pixels and puts them out; of those of others it reads
// the halo. It computes the gates of the smallest box around its pixels, and keeps theirs.
#pragma once

#include "convolution.cuh"
#include "resident_extremes.cuh"

namespace cbam::cuda {

// The maps of the block's own pixels: for the halos of others, and in training for backward.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void put_out_maps(
    const ResidentForward& p, const ResidentBlock<T, kChannelsFirst, Split::kPixels>& block,
    const ForwardMemory<T>& m) {
  using A = acc_t<T>;
  const ResidentForwardGeometry& g = p.geometry;
  A *means = m.exchange.maps, *maxima = means + g.map_pitch();
  const int64_t n = block.first_sample();
  const auto put = [&](int, int pixel, const Extremes<A, kTraining>& e) {
    const A mean = e.sum / static_cast<A>(p.channels);
    means[pixel] = mean;
    maxima[pixel] = e.max;
    if constexpr (kTraining) {
      const int all = p.space.pixels(), at = block.first_pixel() + pixel;
      save_maps<T>(p.saved.maps, n, all, at, mean, e.max);
      p.saved.channel_argmax[n * all + at] = e.argmax_or(0);
    }
  };
  const auto ready = [](int, int) {};  // the pool has waited
  if constexpr (kChannelsFirst)
    walk_columns<true, kTraining>(g, block, m, 0, block.pixels(), 0, m.shared.gate, block.rows(),
                                  ready, put);
  else
    walk_along<kVector<T>, true, kTraining>(g, block, m.shared.tile, 0, block.pixels(), 0,
                                            m.shared.gate, ready, put);
}

template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void gate_all_pixels(
    const ResidentForward& p, const ResidentBlock<T, kChannelsFirst, Split::kPixels>& block,
    const ForwardMemory<T>& m) {
  using A = acc_t<T>;
  const ResidentForwardGeometry& g = p.geometry;
  put_out_maps<kTraining>(p, block, m);
  block.team.barrier();
  const OwnPixels own(block);
  const Shares shares = block.pixel_shares();
  read_from(block.team, [&](auto read) {
    stage_maps(own.box, p.space, m.shared.staged, [&](int pixel, bool, A& mean, A& max) {
      const int owner = shares.owner(pixel);
      const A* from = m.exchange.maps + pixel - shares.first(owner);
      mean = read(from, owner);
      max = read(from + g.map_pitch(), owner);
    });
  });
  __syncthreads();
  const int64_t n = block.first_sample();
  gate_box(own.box, p.space, m.shared.staged, m.shared.weight, [&](int, int pixel, A gate) {
    if (!own.has(pixel)) return;
    m.spatial[pixel - own.first] = gate;
    if constexpr (kTraining)
      static_cast<A*>(p.saved.spatial_gate)[n * p.space.pixels() + pixel] = gate;
  });
  __syncthreads();
}

}  // namespace cbam::cuda
