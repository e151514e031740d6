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
  const auto put_neighbours = [&](int sample, int pixel, const auto& e) {
    constexpr int kCount = sizeof e / sizeof *e;
    A sum[kCount], max[kCount];
    int32_t argmax[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sum[i] = e[i].sum / static_cast<A>(p.channels);
      max[i] = e[i].max;
      argmax[i] = e[i].argmax_or(block.first_channel);
    }
    const int at = sample * g.band + pixel - first;
    store_shared(m.exchange.maps + at, sum);
    store_shared(m.exchange.maps + g.samples * g.band + at, max);
    if constexpr (kTraining) store_shared(m.exchange.argmax + at, argmax);
  };
  const auto put = [&](int sample, int pixel, const Extremes<A, kTraining>& e) {
    const Extremes<A, kTraining> alone[] = {e};
    put_neighbours(sample, pixel, alone);
  };
  const auto ready = [](int, int, int) {};  // the pool has waited
  const auto walk = [&](auto count) {
    walk_neighbours<count.value, true, kTraining>(
        g, block, m.shared.tile, first, end, block.first_channel, m.shared.gate, put_neighbours);
  };
  constexpr int kCount = kVector<T>;
  if constexpr (!kChannelsFirst)
    walk_along<kCount, true, kTraining>(g, block, m.shared.tile, first, end, block.first_channel,
                                        m.shared.gate, ready, put);
  else if (g.neighbours == kCount)
    walk(std::integral_constant<int, kCount>());
  else if (g.neighbours == kCount / 2)
    walk(std::integral_constant<int, kCount / 2>());
  else
    walk_columns<true, kTraining>(g, block, m, first, end, block.first_channel, m.shared.gate,
                                  block.rows(), ready, put);
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
  Extremes<A, kTraining> merged;
  const auto add = [&](int from, const Extremes<A, kTraining>& e) {
    if (from == 0)
      merged = e;  // as it is, NaN and all
    else
      merged.merge(e);
  };
  read_from(block.team, [&](auto read) {
    const auto extremes_of = [&](int from) {
      Extremes<A, kTraining> e;
      e.sum = read(m.exchange.maps + at, from);
      e.max = read(m.exchange.maps + g.samples * g.band + at, from);
      if constexpr (kTraining) e.argmax = read(m.exchange.argmax + at, from);
      return e;
    };
    for_batches<kTraining ? 2 : 4>(0, g.team, 1, extremes_of, add);
  });
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
    A* gates = m.exchange.gates + k * g.gates_each();
    for (int i = box.pixels() + threadIdx.x; i < g.gates_each(); i += g.threads)
      gates[i] = A(0);  // read with others in a vector
    const auto put = [&](int at, int pixel, A gate) {
      gates[at] = gate;
      if constexpr (kTraining)
        static_cast<A*>(
            p.saved.spatial_gate)[(block.first_sample() + sample) * block.pixels() + pixel] = gate;
    };
    if (box.pixels() <= g.threads)
      gate_box<1>(box, p.space, m.shared.staged, m.shared.weight, put);
    else
      gate_box<kRun>(box, p.space, m.shared.staged, m.shared.weight, put);
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
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(A));
  const int vectors = g.gates_each() / kCount;
  const auto total = static_cast<int>(block.samples * g.boxes.boxes()) * vectors;
  read_from(block.team, [&](auto read) {
    for (int i = threadIdx.x; i < total; i += g.threads) {
      const int number = i / vectors, first = i % vectors * kCount;
      const A* gates = m.exchange.gates + number / g.team * g.gates_each() + first;
      Raw<A, kCount> raw;
      raw.words = read(reinterpret_cast<const uint4*>(gates), number % g.team);
      const Box box(g.boxes, p.space, number);
      A* to = m.spatial + box.sample * block.pixels() + box.pixel(p.space, 0, 0, 0) + first;
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (first + k < box.pixels()) to[k] = raw.element[k];
    }
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
