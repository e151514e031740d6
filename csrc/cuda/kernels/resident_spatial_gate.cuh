// The spatial gate of samples that stay on the chip, where blocks hold channels.
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
  const auto put_neighbours = [&](int turn, int sample, int pixel, const auto& e) {
    constexpr int kCount = sizeof e / sizeof *e, kEach = kCount < 4 ? kCount : 4;
    const int at = sample * g.map_pitch() + pixel - first;
    A *sums = m.exchange.maps + at, *maxima = sums + g.samples * g.map_pitch();
#pragma unroll
    for (int i = 0; i < kCount; i += kEach) {
      A sum[kEach], max[kEach];
      int32_t argmax[kEach];
      if (turn > 0) {
        load_shared(sums + i, true, sum);
        load_shared(maxima + i, true, max);
        if constexpr (kTraining) load_shared(m.exchange.argmax + at + i, true, argmax);
      }
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        Extremes<A, kTraining> own = e[i + k];
        own.sum /= static_cast<A>(p.channels);
        if (turn > 0) {
          Extremes<A, kTraining> before;
          before.sum = sum[k];
          before.max = max[k];
          if constexpr (kTraining) before.argmax = argmax[k];
          own.merge(before);
        }
        sum[k] = own.sum;
        max[k] = own.max;
        argmax[k] = own.argmax_or(block.first_channel);
      }
      store_shared(sums + i, sum);
      store_shared(maxima + i, max);
      if constexpr (kTraining) store_shared(m.exchange.argmax + at + i, argmax);
    }
  };
  const int count = end - first, behind = g.in_whole_vectors(count) - count;
  for (int i = threadIdx.x; i < block.samples * behind; i += g.threads) {
    const int at = i / behind * g.map_pitch() + count + i % behind;
    // Read with others in a vector.
    m.exchange.maps[at] = m.exchange.maps[g.samples * g.map_pitch() + at] = A(0);
    if constexpr (kTraining) m.exchange.argmax[at] = 0;
  }
  const auto put = [&](int sample, int pixel, const Extremes<A, kTraining>& e) {
    const Extremes<A, kTraining> alone[] = {e};
    put_neighbours(0, sample, pixel, alone);
  };
  const auto ready = [](int, int) {};  // the pool has waited
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

// Neighbours among the pixels of a map, which are read together: a vector, or half of one where
// registers are short by the third map of training.
template <class A, bool kTraining>
constexpr int kNeighbours = kVectorBytes / static_cast<int>(sizeof(A)) / (kTraining ? 2 : 1);

// What a block has of the maps of some neighbours.
template <class A, bool kTraining>
struct MapsOfBlock {
  Raw<A, kNeighbours<A, kTraining>> sum, max;
  Raw<int32_t, kNeighbours<A, kTraining>> argmax;

  __device__ __forceinline__ Extremes<A, kTraining> of(int i) const {
    Extremes<A, kTraining> e;
    e.sum = sum.element[i];
    e.max = max.element[i];
    if constexpr (kTraining) e.argmax = argmax.element[i];
    return e;
  }
};

// The maps of neighbours, merged over the team in the order of ranks; `at` is where a block has the
// first of them.
template <bool kTraining, bool kChannelsFirst, class T, class A>
__device__ __forceinline__ void merge_maps(
    const ResidentForward& p, const ResidentBlock<T, kChannelsFirst>& block,
    const ForwardMemory<T>& m, int at,
    Extremes<A, kTraining> (&merged)[kNeighbours<A, kTraining>]) {
  using Maps = MapsOfBlock<A, kTraining>;
  constexpr int kCount = kNeighbours<A, kTraining>;
  const ResidentForwardGeometry& g = p.geometry;
  const A *sum = m.exchange.maps + at, *max = sum + g.samples * g.map_pitch();
  read_from(block.team, [&](auto read) {
    const auto maps_of = [&](int from) {
      using Words = decltype(Maps::sum.words);
      Maps maps{};
      maps.sum.words = read(reinterpret_cast<const Words*>(sum), from);
      maps.max.words = read(reinterpret_cast<const Words*>(max), from);
      if constexpr (kTraining)
        maps.argmax.words = read(reinterpret_cast<const Words*>(m.exchange.argmax + at), from);
      return maps;
    };
    const auto add = [&](int from, const Maps& maps) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (from == 0)
          merged[i] = maps.of(i);  // as it is, NaN and all
        else
          merged[i].merge(maps.of(i));
    };
    for_batches<kTraining ? 3 : 4>(0, g.team, 1, maps_of, add);  // what registers allow
  });
}

// What of a box and its halo lies in the image: in runs of pixels that follow each other, which are
// the rows of a whole slice where the box is as wide as the image, and else one row.
struct StagedRuns {
  int z, y, x;              // of the first pixel
  int rows, width, length;  // rows of a slice, pixels of a row and of a run
  int count;
  bool whole_rows;

  __device__ __forceinline__ StagedRuns(const Box& box, const Space& s)
      : z(max(0, box.z - s.kernel_depth / 2)),
        y(max(0, box.y - s.kernel_height / 2)),
        x(max(0, box.x - s.kernel_width / 2)),
        rows(min(s.height, box.y + box.height + s.kernel_height / 2) - y),
        width(min(s.width, box.x + box.width + s.kernel_width / 2) - x) {
    const int slices = min(s.depth, box.z + box.depth + s.kernel_depth / 2) - z;
    whole_rows = width == s.width;
    length = whole_rows ? rows * width : width;
    count = whole_rows ? slices : slices * rows;
  }
  // Of a run: its slice, and the number of its first pixel in the image.
  __device__ __forceinline__ int slice(int run) const {
    return z + (whole_rows ? run : run / rows);
  }
  __device__ __forceinline__ int first(const Space& s, int run) const {
    const int row = whole_rows ? 0 : run % rows;
    return (slice(run) * s.height + y + row) * s.width + x;
  }
};

// The merged maps of a pixel, into what is staged of the box and its halo.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void put_staged(const ResidentForward& p,
                                           const ResidentBlock<T, kChannelsFirst>& block,
                                           const ForwardMemory<T>& m, const Box& box, int z, int y,
                                           int x, const Extremes<acc_t<T>, kTraining>& maps) {
  const Space& s = p.space;
  const int bz = z - box.z, by = y - box.y, bx = x - box.x;  // in the box
  const int at = box.at(bz + s.kernel_depth / 2, by + s.kernel_height / 2, bx + s.kernel_width / 2);
  m.shared.staged[at] = maps.sum;
  m.shared.staged[box.staged + at] = maps.max;
  if constexpr (kTraining) {
    if (bz < 0 || bz >= box.depth || by < 0 || by >= box.height || bx < 0 || bx >= box.width)
      return;
    const int64_t n = block.first_sample() + box.sample;
    const int pixel = (z * s.height + y) * s.width + x;
    save_maps<T>(p.saved.maps, n, block.pixels(), pixel, maps.sum, maps.max);
    p.saved.channel_argmax[n * block.pixels() + pixel] = maps.argmax;
  }
}

// The maps of a box and its halo, as far as their pixels are in the band [first, end); with the
// first band zeros outside the image. Kept for backward where a pixel is one of the box.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void stage_merged_maps(const ResidentForward& p,
                                                  const ResidentBlock<T, kChannelsFirst>& block,
                                                  const ForwardMemory<T>& m, const Box& box,
                                                  int first, int end) {
  using A = acc_t<T>;
  constexpr int kCount = kNeighbours<A, kTraining>;
  const ResidentForwardGeometry& g = p.geometry;
  const Space& s = p.space;
  if (first == 0) {
    for (int i = threadIdx.x; i < 2 * box.staged; i += g.threads) m.shared.staged[i] = A(0);
    __syncthreads();
  }
  const StagedRuns runs(box, s);
  const int each =
      (runs.length + 2 * (kCount - 1)) / kCount;  // vectors of a run that starts anywhere
  const auto sample = static_cast<int>(box.sample);
  for (int i = threadIdx.x; i < runs.count * each; i += g.threads) {
    const int run = i / each, slice = runs.slice(run), start = runs.first(s, run);
    const int pixel = start / kCount * kCount + i % each * kCount;
    if (pixel >= start + runs.length || pixel < first || pixel >= end) continue;
    Extremes<A, kTraining> merged[kCount];
    merge_maps<kTraining>(p, block, m, sample * g.map_pitch() + pixel - first, merged);
    int row = pixel / s.width, x = pixel - row * s.width;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (pixel + k >= start && pixel + k < start + runs.length)
        put_staged<kTraining>(p, block, m, box, slice, row - slice * s.height, x, merged[k]);
      if (++x == s.width) {
        x = 0;
        ++row;
      }
    }
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
    stage_merged_maps<kTraining>(p, block, m, box, first, end);
    if (end < block.pixels()) return;
    __syncthreads();
    A* gates = m.exchange.gates + k * g.gates_each();
    for (int i = box.pixels() + threadIdx.x; i < g.gates_each(); i += g.threads)
      gates[i] = A(0);  // read with others in a vector
    const int64_t n = block.first_sample() + box.sample;
    const auto put = [&](int at, int pixel, A gate) {
      gates[at] = gate;
      if constexpr (kTraining)
        static_cast<A*>(p.saved.spatial_gate)[n * block.pixels() + pixel] = gate;
    };
    gate_box(box, p.space, m.shared.staged, m.shared.weight, put);
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
