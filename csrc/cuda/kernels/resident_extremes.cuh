// Sums and maxima over the rows and the columns of the slice that a block holds, for the two pools
// of the resident forward.
#pragma once

#include "../primitives/reduce.cuh"
#include "../primitives/vector_io.cuh"
#include "resident_forward.h"
#include "resident_tile.cuh"

namespace cbam::cuda {

// What a block has of shared memory, and what it puts out for the others.
template <class T>
struct ForwardMemory {
  using A = acc_t<T>;
  ResidentForwardShared<T, A> shared;
  ForwardExchange<A> exchange;
  A* spatial;  // [samples, pixels]
};

// Rows of a column that a thread reads at once.
constexpr int kRowsUnderWay = 4;

// For rows [first, end) of every sample of the visit: put(sample, row, sum and maximum of the row's
// elements times their factor), kCount elements at a time. `index` is the number of a row's first
// element; ready(sample, to) returns once rows up to `to` may be read.
template <int kCount, bool kScaled, bool kArgmax, bool kChannelsFirst, Split kSplit, class T,
          class Ready, class Put>
__device__ __forceinline__ void walk_along(const ResidentForwardGeometry& g,
                                           const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                           const T* tile, int first, int end, int index,
                                           const acc_t<T>* factor, Ready ready, Put put) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % g.lanes, at_once = g.threads / g.lanes;
  const int groups = (end - first + kRowsAlong - 1) / kRowsAlong, total = block.samples * groups;
  const int vectors = block.cols() / kCount;
  for (int done = 0; done < total; done += at_once) {
    const int i = done + static_cast<int>(threadIdx.x) / g.lanes;
    const int sample = g.samples == 1 ? 0 : i / groups;
    const int row = first + (i - sample * groups) * kRowsAlong;
    Extremes<A, kArgmax> e[kRowsAlong];
    if (i < total) {
      const T* from[kRowsAlong];  // the last row again, where there are fewer
#pragma unroll
      for (int r = 0; r < kRowsAlong; ++r)
        from[r] = tile + (int64_t{sample} * g.rows + min(row + r, end - 1)) * g.pitch;
      ready(sample, min(row + kRowsAlong, end) - 1);
#pragma unroll 2
      for (int v = lane; v < vectors; v += g.lanes) {
        A by[kCount];
        if constexpr (kScaled)
          load_shared(factor + sample * g.held_channels + v * kCount, true, by);
#pragma unroll
        for (int r = 0; r < kRowsAlong; ++r) {
          const auto pack = widen(load_staged<kCount>(from[r] + v * kCount));
#pragma unroll
          for (int k = 0; k < kCount; ++k)
            e[r].add(kScaled ? pack.value[k] * by[k] : pack.value[k], index + v * kCount + k);
        }
      }
    }
    const auto merged = merge_rows_of_lanes(e, g.lanes);
    if (i < total && lane < kRowsAlong && row + lane < end) put(sample, row + lane, merged);
  }
}

// The same for rows so short that a thread walks along one alone.
template <bool kArgmax, bool kChannelsFirst, Split kSplit, class T, class Ready, class Put>
__device__ __forceinline__ void walk_short_rows(
    const ResidentForwardGeometry& g, const ResidentBlock<T, kChannelsFirst, kSplit>& block,
    const T* tile, Ready ready, Put put) {
  const int rows = block.rows(), cols = block.cols();
  for (int i = threadIdx.x; i < block.samples * rows; i += g.threads) {
    const int sample = i / rows, row = i - sample * rows;
    const T* from = tile + (int64_t{sample} * g.rows + row) * g.pitch;
    ready(sample, row);
    Extremes<acc_t<T>, kArgmax> e;
#pragma unroll 7
    for (int c = 0; c < cols; ++c) e.add(widen(from[c]), c);
    put(sample, row, e);
  }
}

// Columns [first, end) of every sample, kCount neighbours to a thread or to g.groups of them, which
// take turns: put(turn, sample, first of the columns, sum and maximum of each over the rows of one
// group); from turn 1 on it merges with what is there. Rows are all there.
template <int kCount, bool kScaled, bool kArgmax, bool kChannelsFirst, Split kSplit, class T,
          class Put>
__device__ __forceinline__ void walk_neighbours(
    const ResidentForwardGeometry& g, const ResidentBlock<T, kChannelsFirst, kSplit>& block,
    const T* tile, int first, int end, int index, const acc_t<T>* factor, Put put) {
  using A = acc_t<T>;
  const int along = (end - first) / kCount, total = block.samples * along;
  for (int done = 0; done < total * g.groups; done += g.threads) {
    const int group = (done + threadIdx.x) / total, i = done + threadIdx.x - group * total;
    const int sample = i / along, col = first + (i - sample * along) * kCount;
    const T* column = tile + int64_t{sample} * g.rows * g.pitch + col;
    const A* own = kScaled ? factor + sample * g.held_channels : nullptr;
    Extremes<A, kArgmax> e[kCount];
    for_mostly_whole_batches<kRowsUnderWay / (kArgmax ? 2 : 1)>(
        group, group < g.groups ? block.rows() : 0, g.groups,
        [&](int row) { return load_staged<kCount>(column + row * g.pitch); },
        [&](int row, const Raw<T, kCount>& raw) {
          const auto pack = widen(raw);
          const A by = kScaled ? own[row] : A(1);
#pragma unroll
          for (int k = 0; k < kCount; ++k)
            e[k].add(kScaled ? pack.value[k] * by : pack.value[k], index + row);
        });
    for (int turn = 0; turn < g.groups; ++turn) {
      if (turn > 0) __syncthreads();
      if (group == turn) put(turn, sample, col, e);
    }
  }
}

// As walk_neighbours, a column to one thread or several: put(sample, column, sum and maximum).
// `step` rows become ready together; ready(sample, to) returns once rows may be read.
template <bool kScaled, bool kArgmax, bool kChannelsFirst, Split kSplit, class T, class Ready,
          class Put>
__device__ __forceinline__ void walk_columns(const ResidentForwardGeometry& g,
                                             const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                             const ForwardMemory<T>& m, int first, int end,
                                             int index, const acc_t<T>* factor, int step,
                                             Ready ready, Put put) {
  using A = acc_t<T>;
  const auto gather = [&](int sample, int col, int group) {
    const T* column = m.shared.tile + int64_t{sample} * g.rows * g.pitch + col;
    const A* own = kScaled ? factor + sample * g.held_channels : nullptr;
    Extremes<A, kArgmax> e;
    int row = group;
    for (int from = 0; row < block.rows(); from += step) {
      const int to = min(block.rows(), from + step);
      ready(sample, to - 1);
      for_batches<2 * kRowsUnderWay>(
          row, to, g.groups, [&](int at) { return column[at * g.pitch]; },
          [&](int at, T element) {
            const A v = widen(element);
            e.add(kScaled ? v * own[at] : v, index + at);
          });
      if (row < to) row += (to - row + g.groups - 1) / g.groups * g.groups;
    }
    return e;
  };
  walk_columns(g, block.samples, first, end, m.shared.scratch, gather, put);
}

}  // namespace cbam::cuda
