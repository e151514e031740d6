// A tile of a sample's matrix in shared memory, some rows at a time, and the sums over its rows and
// its columns. Staging makes every access to x one of 16 bytes wherever rows end, and lets one
// reading serve both sums.
#pragma once

#include "../primitives/reduce.cuh"
#include "../primitives/vector_io.cuh"
#include "backward.h"
#include "blocks.cuh"

namespace cbam::cuda {

struct TileBlock {
  int64_t sample;
  int split, tile;
  int first_row, rows, first_col, cols;

  __device__ __forceinline__ TileBlock(const TileGeometry& g, const Matrix& x) {
    const int number = block_number(g.reverse), per_sample = g.tiles * g.splits;
    const int within = number % per_sample;
    sample = number / per_sample;
    split = within / g.tiles;
    tile = within % g.tiles;
    first_row = split * g.span;
    rows = min(g.span, x.rows - first_row);
    first_col = tile * g.tile;
    cols = min(g.tile, x.cols - first_col);
  }
};

// Where this thread's vectors of a chunk of `rows` rows stand: index -> element of the tensor and
// of the staged tile. Packed rows are one run of vectors; else a thread keeps its columns.
template <Access kAccess, int kCount>
struct TileLoop {
  int first, end, step, column;

  __device__ __forceinline__ TileLoop(const TileGeometry& g, int rows, int cols) {
    if constexpr (kAccess == Access::kPacked) {
      first = threadIdx.x;
      end = rows * cols / kCount;
      step = kThreads;
      column = 0;
    } else {
      column = threadIdx.x % g.threads_along * kCount;
      first = threadIdx.x / g.threads_along;
      step = kThreads / g.threads_along;
      end = column < cols && first < step ? rows : 0;
    }
  }
  __device__ __forceinline__ int64_t element(int index, int64_t row_stride) const {
    if constexpr (kAccess == Access::kPacked)
      return int64_t{index} * kCount;
    else
      return index * row_stride + column;
  }
  __device__ __forceinline__ int staged(int index, int cols) const {
    return kAccess == Access::kPacked ? index * kCount : index * cols + column;
  }
};

// For each row of the chunk: put(row, sum over columns of staged * factor(row, k)), one warp a row;
// k counts a lane's columns and is known to the compiler.
template <class A, class Factor, class Put>
__device__ __forceinline__ void sum_rows(const A* staged, int rows, int cols, Factor factor,
                                         Put put) {
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < rows; row += kThreads / 32) {
    A sum = A(0);
#pragma unroll
    for (int k = 0; k < kTileColumns / 32; ++k) {
      const int j = lane + 32 * k;
      if (j < cols) sum += staged[row * cols + j] * factor(row, k);
    }
    sum = sum_of_warp(sum);
    if (lane == 0) put(row, sum);
  }
}

static_assert(kTileColumns <= kThreads, "a thread for each column");

// The column of this thread and its share of the rows, where threads take columns from `from` on.
struct TileColumn {
  int from, cols, column, first, step;

  __device__ __forceinline__ explicit TileColumn(int tile, int from_ = 0)
      : from(from_), cols(max(1, min(kThreads, tile - from_))) {
    column = from + threadIdx.x % cols;
    first = from < tile ? threadIdx.x / cols : INT_MAX;
    step = kThreads / cols;
  }
};

// Adds the chunk's share to this thread's sum over its column.
template <class A, class Factor>
__device__ __forceinline__ void sum_column(const A* staged, int rows, int cols,
                                           const TileColumn& own, Factor factor, A& sum) {
  for (int row = own.first; row < rows; row += own.step)
    sum += staged[row * cols + own.column] * factor(row);
}

// Adds the sums of the threads that share a column and writes one value a column.
template <class A>
__device__ __forceinline__ void write_columns(A* shared, const TileColumn& own, A sum, A* out) {
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (own.first == 0) {
    A total = A(0);
    for (int i = 0; i < own.step; ++i) total += shared[i * own.cols + threadIdx.x];
    out[own.column] = total;
  }
}

// All parts of one sum.
template <class A>
__device__ __forceinline__ A total_of(const Sums& sums, int64_t sample, int64_t count,
                                      int64_t index) {
  const A* values = static_cast<const A*>(sums.values) + sample * sums.parts * count + index;
  A total = A(0);
  for_batches<8>(
      0, sums.parts, 1, [&](int part) { return __ldg(values + part * count); },
      [&](int, A part) { total += part; });
  return total;
}

}  // namespace cbam::cuda
