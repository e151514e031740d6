// The spatial gate backwards, of samples that stay on the chip.
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

// This block's share of d_spatial.
template <bool kWhole, bool kChannelsFirst, class T>
__device__ __forceinline__ void put_out_spatial_shares(const ResidentBackward& p,
                                                       Loads<T, kChannelsFirst>& loads,
                                                       const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  const ResidentBackwardGeometry& g = p.geometry;
  const int pixels = loads.block.pixels();
  const A* gates = m.shared.of_channels.gate();
  // Where they go through global memory, they are made in what is free until pixels are collected.
  A* shares = g.cluster ? m.exchange.d_spatial : m.shared.of_pixels.gate();
  walk_both(loads, 0, [&](const RowsOfBoth<T, kChannelsFirst>& of) {
    if constexpr (kChannelsFirst)
      with_columns_together<kWhole, T>(pixels, [&](auto count) {
        sum_columns<count.value>(
            of,
            [&](int sample, int channel) {
              return [gate = gates[sample * g.channels + channel]](int, A x, A dout) {
                return x * dout * gate;
              };
            },
            [&](int sample, int pixel, A sum) {
              A& share = shares[sample * pixels + pixel];
              share = of.first == 0 ? sum : share + sum;
            });
      });
    else
      sum_rows<kColumnsTogether<T>>(
          of,
          [&](int sample, int channel) {
            return GateFactors<kColumnsTogether<T>, A>(gates + sample * g.channels + channel);
          },
          [&](int sample, int pixel, A sum) { shares[sample * pixels + pixel] = sum; });
  });
  if (g.cluster) return;
  for (int i = threadIdx.x; i < loads.block.samples * pixels; i += g.threads)
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
    A* dz = m.shared.dz + k * g.boxes.staged(p.space);
    A* maps = m.shared.maps + k * staged_maps(g.boxes, p.space);
    const StagedTerms<A> terms = m.exchange.terms.from(of_visit);
    for_staged_pixels(box, p.space, [&](int i, const StagedPixel& staged) {
      const int pixel = staged.pixel;
      if (p.d_conv) stage_saved_maps(box, p.space, saved_maps, i, pixel, maps);
      A of_pixel = A(0);
      if (pixel >= 0) {
        const A open = gate[pixel];
        if (staged.inside) {
          terms.gate()[pixel] = open;
          terms.index()[pixel] = p.saved.channel_argmax[of_batch + pixel];
        }
        A d = sum_over_team(block.team, m.exchange.d_spatial + of_visit + pixel);
        if (more) d += more[of_batch + pixel];
        of_pixel = d * sigmoid_derivative<A>(open);
      }
      dz[i] = of_pixel;
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
    weight_gradients(box, p.space, m.shared.dz + k * boxes.staged(p.space),
                     m.shared.maps + k * staged_maps(boxes, p.space),
                     shares + int64_t{number} * count);
  });
}

}  // namespace cbam::cuda
