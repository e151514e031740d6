// The spatial gate backwards, of samples that stay on the chip, where blocks hold channels.
//
//   d_spatial[s]  = sum_c dout * x * channel_gate[c]
//   dz            = d_spatial * spatial_gate * (1 - spatial_gate)
//   d_mean, d_max = convolution transposed (dz), d_mean over channels
//
// Every block puts out its share of d_spatial, the sums over its own channels. The boxes of the
// image go round the team: a block adds the shares for its boxes in the order of ranks, and puts
// out what belongs to their pixels, which every block collects.
#pragma once

#include "convolution_backward.cuh"
#include "resident_spatial_sums.cuh"

namespace cbam::cuda {

// This block's share of d_spatial.
template <bool kWhole, bool kChannelsFirst, class T>
__device__ __forceinline__ void put_out_spatial(const ResidentBackward& p,
                                                Loads<T, kChannelsFirst, Split::kChannels>& loads,
                                                const BackwardMemory<T>& m) {
  const ResidentBackwardGeometry& g = p.geometry;
  // Where it goes through global memory, it is made in what is free until pixels are collected.
  auto* shares = g.cluster ? m.exchange.d_spatial : m.shared.of_pixels.gate();
  sum_over_channels<kWhole>(p, loads, m, shares);
  if (g.cluster) return;
  for (int i = threadIdx.x; i < loads.block.samples * loads.block.pixels(); i += g.threads)
    m.exchange.d_spatial[i] = shares[i];
}

// What belongs to the pixels of this block's boxes; dz and the maps stay for the convolution's
// gradients.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void put_out_pixels(const ResidentBackward& p,
                                               const ResidentBlock<T, kChannelsFirst>& block,
                                               const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  const ResidentBackwardGeometry& g = p.geometry;
  for_own_boxes(block, [&](int k, int, const Box& box) {
    const int64_t of_visit = box.sample * block.pixels();
    const int64_t of_batch = (block.first_sample() + box.sample) * block.pixels();
    const A* gate = static_cast<const A*>(p.saved.spatial_gate) + of_batch;
    const A* more = static_cast<const A*>(p.d_spatial_gate);
    const T* saved_maps = static_cast<const T*>(p.saved.maps) + 2 * of_batch;
    A* dz = m.shared.dz + k * staged_dz(g.boxes, p.space);
    A* maps = m.shared.maps + 2 * k * g.boxes.pixels();
    const StagedTerms<A> terms = m.exchange.terms.from(of_visit);
    for_staged_pixels(box, p.space, [&](int i, const StagedPixel& staged) {
      const int pixel = staged.pixel;
      A of_pixel = A(0);
      if (pixel >= 0) {
        const A open = gate[pixel];
        if (staged.inside) {
          terms.gate()[pixel] = open;
          terms.index()[pixel] = p.saved.channel_argmax[of_batch + pixel];
          if (p.d_conv)
            stage_saved_maps(p.space, saved_maps, pixel, staged.place, box.pixels(), maps);
        }
        A d = sum_over_team(block.team, m.exchange.d_spatial + of_visit + pixel);
        if (more) d += more[of_batch + pixel];
        of_pixel = d * sigmoid_derivative<A>(open);
      }
      stage_dz(box, i, of_pixel, dz);
    });
    __syncthreads();
    map_gradients(box, p.space, dz, m.shared.weight, [&](int pixel, A mean, A max) {
      terms.first()[pixel] = mean / static_cast<A>(p.channels);
      terms.second()[pixel] = max;
    });
  });
}

// Which block of the team has a pixel of the visit in its boxes.
struct Owners {
  const Space& space;
  const BoxGeometry& boxes;
  int team;
  // Reciprocals.
  float per_sample, per_plane, per_row, per_depth, per_height, per_width, per_team;

  __device__ __forceinline__ Owners(const Space& s, const BoxGeometry& b, int team_)
      : space(s),
        boxes(b),
        team(team_),
        per_sample(1.0f / static_cast<float>(s.pixels())),
        per_plane(1.0f / static_cast<float>(s.height * s.width)),
        per_row(1.0f / static_cast<float>(s.width)),
        per_depth(1.0f / static_cast<float>(b.box_depth)),
        per_height(1.0f / static_cast<float>(b.box_height)),
        per_width(1.0f / static_cast<float>(b.box_width)),
        per_team(1.0f / static_cast<float>(team_)) {}

  __device__ __forceinline__ int operator()(int i) const {
    const int sample = quotient(i, per_sample), pixel = i - sample * space.pixels();
    const int z = quotient(pixel, per_plane), in_plane = pixel - z * space.height * space.width;
    const int y = quotient(in_plane, per_row), x = in_plane - y * space.width;
    const int plane = sample * boxes.boxes_depth + quotient(z, per_depth);
    const int row = plane * boxes.boxes_height + quotient(y, per_height);
    const int box = row * boxes.boxes_width + quotient(x, per_width);
    return box - quotient(box, per_team) * team;
  }
};

// What belongs to all pixels, from the blocks whose boxes they are in.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void collect_pixels(const ResidentBackward& p,
                                               const ResidentBlock<T, kChannelsFirst>& block,
                                               const BackwardMemory<T>& m) {
  const ResidentBackwardGeometry& g = p.geometry;
  const Owners owner_of(p.space, g.boxes, g.team);
  const StagedTerms<acc_t<T>>&theirs = m.exchange.terms, &own = m.shared.of_pixels;
  read_from(block.team, [&](auto read) {
    for (int i = threadIdx.x; i < block.samples * block.pixels(); i += g.threads) {
      const int owner = owner_of(i);
      if (g.cluster && owner == block.team.rank) continue;  // they stand where they are put out
      // All before the first write, behind which the compiler would not move them forward.
      const auto gate = read(theirs.gate() + i, owner), first = read(theirs.first() + i, owner),
                 second = read(theirs.second() + i, owner);
      const int32_t index = read(theirs.index() + i, owner);
      own.gate()[i] = gate;
      own.first()[i] = first;
      own.second()[i] = second;
      own.index()[i] = index;
    }
  });
  __syncthreads();
}

template <bool kChannelsFirst, class T>
__device__ __forceinline__ void stage_pixels(const ResidentBackward& p,
                                             const ResidentBlock<T, kChannelsFirst>& block,
                                             const BackwardMemory<T>& m) {
  put_out_pixels(p, block, m);
  block.team.barrier();
  collect_pixels(p, block, m);
}

// This block's boxes' shares of the convolution's gradients, from what put_out_pixels left.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void write_conv_shares(const ResidentBackward& p,
                                                  const ResidentBlock<T, kChannelsFirst>& block,
                                                  const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  const BoxGeometry& boxes = p.geometry.boxes;
  const int count = 2 * p.space.taps() + 1;
  A* shares = static_cast<A*>(p.d_conv) + block.first_sample() * boxes.boxes() * count;
  for_own_boxes(block, [&](int k, int number, const Box& box) {
    weight_gradients(box, 0, box.pixels(), p.space, m.shared.dz + k * staged_dz(boxes, p.space),
                     m.shared.maps + 2 * k * boxes.pixels(), shares + int64_t{number} * count);
  });
}

}  // namespace cbam::cuda
