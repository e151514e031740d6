// The spatial gate backwards, of samples that stay on the chip, where blocks hold pixels.
//
//   d_spatial[s]  = sum_c dout * x * channel_gate[c]
//   dz            = d_spatial * spatial_gate * (1 - spatial_gate)
//   d_mean, d_max = convolution transposed (dz), d_mean over channels
//
// Every block has dz of its own pixels and puts it out; of those of others it reads what is in the
// smallest box around its pixels, and the halo of that.
#pragma once

#include "convolution_backward.cuh"
#include "resident_spatial_sums.cuh"

namespace cbam::cuda {

// dz of the block's own pixels; their gates and the positions of their maxima.
template <bool kWhole, bool kChannelsFirst, class T>
__device__ __forceinline__ void put_out_spatial(const ResidentBackward& p,
                                                Loads<T, kChannelsFirst, Split::kPixels>& loads,
                                                const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  const StagedTerms<A>& terms = m.shared.of_pixels;
  // Made in what is free until the gates are staged.
  A* sums = terms.gate();
  sum_over_channels<kWhole>(p, loads, m, sums);
  const int64_t first = loads.block.first_sample() * p.space.pixels() + loads.block.first_pixel();
  const A* gate = static_cast<const A*>(p.saved.spatial_gate) + first;
  const A* more = static_cast<const A*>(p.d_spatial_gate);
  for (int i = threadIdx.x; i < loads.block.pixels(); i += p.geometry.threads) {
    const A open = gate[i], d = more ? sums[i] + more[first + i] : sums[i];
    m.exchange.d_spatial[i] = d * sigmoid_derivative<A>(open);
    terms.gate()[i] = open;
    terms.index()[i] = p.saved.channel_argmax[first + i];
  }
}

// What belongs to the block's own pixels; dz and the maps stay for the convolution's gradients.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void stage_pixels(
    const ResidentBackward& p, const ResidentBlock<T, kChannelsFirst, Split::kPixels>& block,
    const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  const OwnPixels own(block);
  const Shares shares = block.pixel_shares();
  const int64_t of_batch = block.first_sample() * p.space.pixels();
  const T* saved_maps = static_cast<const T*>(p.saved.maps) + 2 * of_batch;
  read_from(block.team, [&](auto read) {
    for_staged_pixels(own.box, p.space, [&](int i, const StagedPixel& staged) {
      const int pixel = staged.pixel;
      A dz = A(0);
      if (pixel >= 0) {
        const int owner = shares.owner(pixel);
        dz = read(m.exchange.d_spatial + pixel - shares.first(owner), owner);
      }
      stage_dz(own.box, i, dz, m.shared.dz);
      if (p.d_conv && own.has(pixel))
        stage_saved_maps(p.space, saved_maps, pixel, pixel - own.first, own.count, m.shared.maps);
    });
  });
  __syncthreads();
  const StagedTerms<A>& terms = m.shared.of_pixels;
  map_gradients(own.box, p.space, m.shared.dz, m.shared.weight, [&](int pixel, A mean, A max) {
    if (!own.has(pixel)) return;
    terms.first()[pixel - own.first] = mean / static_cast<A>(p.channels);
    terms.second()[pixel - own.first] = max;
  });
  __syncthreads();
}

// This block's pixels' share of the convolution's gradients, from what stage_pixels left.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void write_conv_shares(
    const ResidentBackward& p, const ResidentBlock<T, kChannelsFirst, Split::kPixels>& block,
    const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  const OwnPixels own(block);
  const int count = 2 * p.space.taps() + 1;
  const int64_t share = block.first_sample() * block.team.size + block.team.rank;
  // The box has whole rows unless the block has less than one: its pixels follow each other there.
  weight_gradients(own.box, own.first - own.box.pixel(p.space, 0, 0, 0), own.count, p.space,
                   m.shared.dz, m.shared.maps, static_cast<A*>(p.d_conv) + share * count);
}

}  // namespace cbam::cuda
