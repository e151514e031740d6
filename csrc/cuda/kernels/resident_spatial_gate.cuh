// The spatial gate of samples that stay on the chip.
//
//   spatial_gate[s] = sigmoid(conv(mean and max over c of x * channel_gate) + bias)
//
// Every block puts out both maps over its own channels, one band of pixels at a time where there is
// no room for all. The boxes of the image go round the team: a block merges the maps of its boxes
// in the order of ranks, computes their gates and puts these out, and every block collects all
// gates.
#pragma once

#include "convolution.cuh"
#include "resident_extremes.cuh"

namespace cbam::cuda {

// Mean and maximum over the block's channels, for the pixels of a band.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void put_out_maps(const ResidentForward& p,
                                             const ResidentBlock<T, kChannelsFirst>& block,
                                             const ForwardMemory<T>& m, int first, int end) {
  using A = acc_t<T>;
  const ResidentForwardGeometry& g = p.geometry;
  const auto put = [&](int sample, int pixel, const Extremes<A, kTraining>& e) {
    const int at = sample * g.band + pixel - first;
    m.exchange.maps[at] = e.sum / static_cast<A>(p.channels);
    m.exchange.maps[g.samples * g.band + at] = e.max;
    if constexpr (kTraining) m.exchange.argmax[at] = e.argmax_or(block.first_channel);
  };
  const auto ready = [](int, int) {};  // the pool has waited
  if constexpr (kChannelsFirst)
    walk_columns<true, kTraining>(g, block, m, first, end, block.first_channel, m.shared.gate,
                                  ready, put);
  else
    walk_rows<true, kTraining>(g, block, m.shared.tile, first, end, block.first_channel,
                               m.shared.gate, ready, put);
}

// A pixel's maps, merged over the team; kept for backward where the pixel is one of this block's.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void merge_maps(const ResidentForward& p,
                                           const ResidentBlock<T, kChannelsFirst>& block,
                                           const ForwardMemory<T>& m, int sample, int pixel,
                                           int first, bool inside, acc_t<T>& mean, acc_t<T>& max) {
  using A = acc_t<T>;
  const ResidentForwardGeometry& g = p.geometry;
  const int at = sample * g.band + pixel - first;
  const auto read = [&](int from) {
    Extremes<A, kTraining> e;
    e.sum = block.team.read(m.exchange.maps + at, from);
    e.max = block.team.read(m.exchange.maps + g.samples * g.band + at, from);
    if constexpr (kTraining) e.argmax = block.team.read(m.exchange.argmax + at, from);
    return e;
  };
  auto merged = read(0);
  for (int from = 1; from < g.team; ++from) merged.merge(read(from));
  mean = merged.sum;
  max = merged.max;
  if constexpr (kTraining) {
    if (!inside) return;
    const int64_t n = block.first_sample() + sample;
    save_maps<T>(p.saved.maps, n, block.pixels(), pixel, mean, max);
    p.saved.channel_argmax[n * block.pixels() + pixel] = merged.argmax;
  }
}

// Of this block's boxes: the maps as far as they are in the band, and behind the last band the
// gates.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void gate_boxes(const ResidentForward& p,
                                           const ResidentBlock<T, kChannelsFirst>& block,
                                           const ForwardMemory<T>& m, int first, int end) {
  using A = acc_t<T>;
  const ResidentForwardGeometry& g = p.geometry;
  for_own_boxes(block, [&](int k, int, const Box& box) {
    const auto sample = static_cast<int>(box.sample);
    stage_maps(box, p.space, first, end, m.shared.staged,
               [&](int pixel, bool inside, A& mean, A& max) {
                 merge_maps<kTraining>(p, block, m, sample, pixel, first, inside, mean, max);
               });
    if (end < block.pixels()) return;
    __syncthreads();
    A* gates = m.exchange.gates + k * g.boxes.pixels();
    gate_box(box, p.space, m.shared.staged, m.shared.weight, [&](int at, int pixel, A gate) {
      gates[at] = gate;
      if constexpr (kTraining)
        static_cast<A*>(
            p.saved.spatial_gate)[(block.first_sample() + sample) * block.pixels() + pixel] = gate;
    });
    __syncthreads();
  });
}

// The gates of all pixels, from the blocks that computed them.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void collect_gates(const ResidentForward& p,
                                              const ResidentBlock<T, kChannelsFirst>& block,
                                              const ForwardMemory<T>& m) {
  const ResidentForwardGeometry& g = p.geometry;
  using A = acc_t<T>;
  const auto boxes = static_cast<int>(block.samples * g.boxes.boxes());
  for (int i = threadIdx.x; i < g.boxes.pixels(); i += g.threads)
    for_batches(
        0, boxes, 1,
        [&](int number) {
          const Box box(g.boxes, p.space, number);
          const A* gates = m.exchange.gates + number / g.team * g.boxes.pixels();
          return i < box.pixels() ? block.team.read(gates + i, number % g.team) : A(0);
        },
        [&](int number, A gate) {
          const Box box(g.boxes, p.space, number);
          const int x = i % box.width, y = i / box.width % box.height,
                    z = i / box.width / box.height;
          if (i < box.pixels())
            m.spatial[box.sample * block.pixels() + box.pixel(p.space, z, y, x)] = gate;
        });
  __syncthreads();
}

template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void gate_all_pixels(const ResidentForward& p,
                                                const ResidentBlock<T, kChannelsFirst>& block,
                                                const ForwardMemory<T>& m) {
  const int band = p.geometry.band;
  for (int first = 0; first < block.pixels(); first += band) {
    const int end = min(first + band, block.pixels());
    put_out_maps<kTraining>(p, block, m, first, end);
    block.team.barrier();
    gate_boxes<kTraining>(p, block, m, first, end);
    block.team.barrier();
  }
  collect_gates(p, block, m);
}

}  // namespace cbam::cuda
