// Sums and maxima over the rows and the columns of the slice that a block holds, for the two pools
// of the resident forward.
#pragma once

#include "gather_row.cuh"
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

// For rows [first, end) of every sample of the visit: put(sample, row, sum and maximum of the row's
// elements times their factor). `index` is the number of a row's first element; ready(sample,
// row) returns once the row may be read.
template <bool kScaled, bool kArgmax, bool kChannelsFirst, class T, class Ready, class Put>
__device__ __forceinline__ void walk_rows(const ResidentForwardGeometry& g,
                                          const ResidentBlock<T, kChannelsFirst>& block,
                                          const T* tile, int first, int end, int index,
                                          const acc_t<T>* factor, Ready ready, Put put) {
  const int lane = threadIdx.x % g.lanes, at_once = g.threads / g.lanes;
  const int count = end - first, total = block.samples * count;
  for (int done = 0; done < total; done += at_once) {
    const int i = done + threadIdx.x / g.lanes, sample = i / count, row = first + i % count;
    Extremes<acc_t<T>, kArgmax> e;
    if (i < total) {
      ready(sample, row);
      gather_row<kScaled>(
          tile + (int64_t{sample} * g.rows + row) * g.pitch, block.cols(), index,
          kScaled ? factor + sample * g.channels : nullptr, lane, g.lanes,
          [](const T* at) { return load_staged<kVector<T>>(at); }, e);
    }
    merge_lanes(e, g.lanes);
    if (i < total && lane == 0) put(sample, row, e);
  }
}

// A column of the tile, rows group, group + groups, ...
template <bool kScaled, bool kArgmax, bool kChannelsFirst, class T, class Ready>
__device__ __forceinline__ Extremes<acc_t<T>, kArgmax> extremes_of_column(
    const ResidentForwardGeometry& g, const ResidentBlock<T, kChannelsFirst>& block, const T* tile,
    int sample, int col, int index, const acc_t<T>* factor, int group, Ready ready) {
  const T* column = tile + int64_t{sample} * g.rows * g.pitch + col;
  const acc_t<T>* own = kScaled ? factor + sample * g.channels : nullptr;
  Extremes<acc_t<T>, kArgmax> e;
  int row = group;
  for (int chunk = 0; row < block.rows(); ++chunk) {
    ready(sample, chunk);
    const int end = min(block.rows(), (chunk + 1) * g.chunk);
#pragma unroll 4
    for (; row < end; row += g.groups) {
      const acc_t<T> v = widen(column[row * g.pitch]);
      e.add(kScaled ? v * own[row] : v, index + row);
    }
  }
  return e;
}

// As walk_rows, for columns [first, end). `index` is the number of a column's first element;
// ready(sample, chunk) returns once the chunk may be read.
template <bool kScaled, bool kArgmax, bool kChannelsFirst, class T, class Ready, class Put>
__device__ __forceinline__ void walk_columns(const ResidentForwardGeometry& g,
                                             const ResidentBlock<T, kChannelsFirst>& block,
                                             const ForwardMemory<T>& m, int first, int end,
                                             int index, const acc_t<T>* factor, Ready ready,
                                             Put put) {
  walk_columns(
      g, block.samples, first, end, m.shared.scratch,
      [&](int sample, int col, int group) {
        return extremes_of_column<kScaled, kArgmax>(g, block, m.shared.tile, sample, col, index,
                                                    factor, group, ready);
      },
      put);
}

}  // namespace cbam::cuda
