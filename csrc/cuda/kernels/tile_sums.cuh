// Sums over the rows and the columns of a tile of a sample's matrix. A warp takes whole rows of the
// tile, several of them under way at a time, and waits for no other until its block ends; a lane
// keeps its columns for all rows. A row's parts, one from each lane, meet in shared memory.
//
// Packed rows: what is a row elsewhere is a group of rows there, one run of vectors without a gap,
// each of which touches up to two rows.
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

// Asks for the first of the block's rows; `first` is where they begin.
template <Access kAccess, class T>
__device__ __forceinline__ void prefetch_tile(const TileGeometry& g, const TileBlock& block,
                                              const T* first, int64_t row_stride) {
  if constexpr (kAccess != Access::kScalar)
    prefetch_rows(first, g.row_group * row_stride, block.rows / g.row_group,
                  g.row_group * block.cols * static_cast<int>(sizeof(T)));
}

// Rows [first, end) of the block are this warp's, in whole groups.
struct WarpRows {
  int first, end;

  __device__ __forceinline__ WarpRows(const TileGeometry& g, int rows, int batch) {
    const int together = batch * g.row_group, warps = kThreads / 32;
    const int share = (rows + together * warps - 1) / (together * warps) * together;
    first = min(static_cast<int>(threadIdx.x) / 32 * share, rows);
    end = min(first + share, rows);
  }
};

// The vectors of a row of up to kColumns that are this lane's, every 32nd.
template <class T, Access kAccess, int kColumns = kTileColumns>
struct LaneVectors {
  static constexpr bool kPacked = kAccess == Access::kPacked;
  static constexpr int kCount = kAccess == Access::kScalar ? 1 : kVector<T>;
  static constexpr int kVectors = kPacked ? kPackedVectors : kColumns / 32 / kCount;
  // Blocks of a multiprocessor that find registers.
  static constexpr int kBlocks = kVectors == 1 ? 3 : 2;
  // Of one tensor and of two: six to eight loads.
  static constexpr int kRowsUnderWay = kVectors == 1 ? 6 : kVectors == 2 ? 3 : 2;
  static constexpr int kRowsOfTwo = kVectors == 1 ? 3 : kVectors == 2 ? 2 : 1;
  static_assert(kPartRows % kRowsUnderWay == 0 && kPartRows % kRowsOfTwo == 0 &&
                kPartGroups % kRowsUnderWay == 0 && kPartGroups % kRowsOfTwo == 0);
  using Loaded = Raw<T, kCount>;

  int vectors;  // of a row
  // Packed: how many rows further down a vector begins, and its elements before the next row's.
  int row[kVectors], split[kVectors];

  __device__ __forceinline__ LaneVectors(const TileGeometry& g, int cols)
      : vectors(g.row_group * cols / kCount) {
    if constexpr (kPacked)
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        row[j] = min(element(j) / cols, g.row_group - 1);
        split[j] = (row[j] + 1) * cols - element(j);
      }
  }
  __device__ __forceinline__ static int element(int j) {
    return (static_cast<int>(threadIdx.x) % 32 + 32 * j) * kCount;
  }
  __device__ __forceinline__ bool has(int j) const { return element(j) < vectors * kCount; }
  // Whether element i of vector j belongs to the row below the one it begins in.
  __device__ __forceinline__ bool below(int j, int i) const { return kPacked && i >= split[j]; }

  // A lane that has no vector at all takes no part.
  __device__ __forceinline__ void load_row(const T* at, Loaded (&raw)[kVectors]) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (kAccess != Access::kVector) raw[j] = {};  // as in for_batches; whole rows spare the moves
      if (j == 0 || has(j)) raw[j] = load<kCount>(at + element(j));
    }
  }
  // A value for each of the lane's columns, from shared memory; 0 for those it has not.
  template <class V>
  __device__ __forceinline__ void of_columns(const V* from, V (&to)[kVectors][kCount]) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) to[j][i] = V(0);
      if (has(j)) load_shared(from + element(j), true, to[j]);
    }
  }
};

// body(row, load(row)) for rows 0 to `count` - 1, kBatch of which are under way at a time; the last
// few, of one warp of a block, one by one, as registers are short.
template <int kBatch, class Load, class Body>
__device__ __forceinline__ void for_rows(int count, Load load, Body body) {
  using Loaded = decltype(load(0));
  int row = 0;
#pragma unroll 1
  for (; row + kBatch <= count; row += kBatch) {
    Loaded loaded[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) loaded[b] = load(row + b);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) body(row + b, loaded[b]);
  }
#pragma unroll 1
  for (; row < count; ++row) body(row, load(row));
}

// What a lane's vectors add to the sums of their rows.
template <class Lane, class A>
struct RowParts {
  A first[Lane::kVectors] = {}, below[Lane::kVectors] = {};

  __device__ __forceinline__ void add(const Lane& lane, int j, int i, A value, A factor) {
    if (lane.below(j, i))
      below[j] += value * factor;
    else
      first[Lane::kPacked ? j : 0] += value * factor;
  }
  // `group` counts rows of the chunk, or groups of packed ones.
  __device__ __forceinline__ void put(const Lane& lane, A* parts, int group) const {
    if constexpr (Lane::kPacked) {
#pragma unroll
      for (int j = 0; j < Lane::kVectors; ++j) {
        const A both[] = {first[j], below[j]};
        const int vector = lane.element(j) / Lane::kCount;
        if (lane.has(j)) store_shared(parts + 2 * (group * lane.vectors + vector), both);
      }
    } else {
      parts[group * kPartPitch + threadIdx.x % 32] = first[0];
    }
  }
};

// Where the parts of a row of the chunk begin; those of the row before end there.
template <class Lane>
__device__ __forceinline__ int first_part(int row, int cols) {
  if constexpr (!Lane::kPacked) return row * kPartPitch;
  const unsigned element = row * cols;
  return static_cast<int>(element / Lane::kCount * 2 + (element % Lane::kCount != 0));
}

// put(row, sum) for each row of this warp's chunk; all of its lanes have put their parts.
template <class Lane, class A, class Put>
__device__ __forceinline__ void sum_parts(const TileGeometry& g, const A* parts, int rows, int cols,
                                          Put put) {
  __syncwarp();
  const int lanes = 1 << g.row_lanes_log, lane = threadIdx.x % 32, within = lane & (lanes - 1);
  for (int done = 0; done < rows; done += 32 >> g.row_lanes_log) {
    const int row = done + (lane >> g.row_lanes_log);
    A sum[1] = {};
    if (row < rows) {
      const int first = first_part<Lane>(row, cols);
      const int end =
          Lane::kPacked ? first_part<Lane>(row + 1, cols) : first + min(cols / Lane::kCount, 32);
      const int each = (end - first + lanes - 1) >> g.row_lanes_log;
      const int own = first + within * each;
#pragma unroll 4
      for (int i = own; i < min(own + each, end); ++i) sum[0] += parts[i];
    }
    sum_lanes(sum, lanes);
    if (within == 0 && row < rows) put(row, sum[0]);
  }
  __syncwarp();
}

// Adds what the lanes of all warps have of each column and writes one value a column; `parts` is
// the whole block's, of which the warps have read all they put.
template <class Lane, class A>
__device__ __forceinline__ void write_columns(const TileGeometry& g, const Lane& lane, int cols,
                                              const A (&sum)[Lane::kVectors][Lane::kCount],
                                              A* parts, A* out) {
  A* own = parts + threadIdx.x / 32 * g.warp_parts;
#pragma unroll
  for (int j = 0; j < Lane::kVectors; ++j)
    if (lane.has(j)) store_shared(own + lane.element(j), sum[j]);
  __syncthreads();
  for (int c = threadIdx.x; c < cols; c += kThreads) {
    A total = A(0);
    for (int warp = 0; warp < kThreads / 32; ++warp)
      for (int k = 0; k < g.row_group; ++k) total += parts[warp * g.warp_parts + k * cols + c];
    out[c] = total;
  }
}

// All parts of one sum. The launch before has written them: a load that takes memory to be constant
// may move before the wait for it.
template <class A>
__device__ __forceinline__ A total_of(const Sums& sums, int64_t sample, int64_t count,
                                      int64_t index) {
  const A* values = static_cast<const A*>(sums.values) + sample * sums.parts * count + index;
  A total = A(0);
  for_batches<8>(
      0, sums.parts, 1, [&](int part) { return __ldcg(values + part * count); },
      [&](int, A part) { total += part; });
  return total;
}

}  // namespace cbam::cuda
