// Products with the weights of the MLP, by a block that has some of the channels: along the rows of
// a matrix, and down its columns.
#pragma once

#include "../primitives/vector_io.cuh"
#include "resident_parts.cuh"
#include "resident_tile.cuh"

namespace cbam::cuda {

// Brings the weights of the block's channels to the cache while the first samples arrive.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void prefetch_weights(const Resident& p,
                                                 const ResidentBlock<T, kChannelsFirst>& block) {
  const auto size = static_cast<int64_t>(bytes_of(p.weights.dtype));
  const int64_t lines = (block.channels * size + kLineBytes - 1) / kLineBytes;
  const int64_t row = p.hidden * size, end = block.channels * row;
  const auto* fc1 = static_cast<const char*>(p.weights.fc1_weight) + block.first_channel * size;
  const auto* fc2 = static_cast<const char*>(p.weights.fc2_weight) + block.first_channel * row;
  for (int64_t i = threadIdx.x; i < lines * p.hidden; i += blockDim.x) {
    prefetch(fc1 + i / lines * p.channels * size + i % lines * kLineBytes);
    if (i * kLineBytes < end) prefetch(fc2 + i * kLineBytes);
  }
}

// A warp's products of kRows rows of a matrix with kVectors vectors: lane i gets that of row
// i / kVectors and vector i % kVectors.
template <int kRows, int kVectors, class A, class Weight>
__device__ __forceinline__ A warp_products(int count, const A* vectors, int pitch, Weight weight) {
  constexpr int kAtOnce = kRows < 8 ? kRows : 8;  // weights under way
  A sum[kRows * kVectors] = {};
  for (int k = threadIdx.x % 32; k < count; k += 32) {
#pragma unroll
    for (int first = 0; first < kRows; first += kAtOnce) {
      A of_row[kAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) of_row[r] = weight(first + r, k);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const A value = vectors[v * pitch + k];
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) sum[(first + r) * kVectors + v] += of_row[r] * value;
      }
    }
  }
  return sums_of_warp(sum);
}

// For every column j of a matrix: put(v, j, sum over k of weight(k, j) * vectors[k][v]). Threads
// side by side take columns, which lie side by side in memory, and those below them share the rows.
// What is put may be read when this returns; `aside` is as for add_parts.
template <int kVectors, class A, class Weight, class Put>
__device__ __forceinline__ void column_products(int rows, int columns, const A* vectors, A* aside,
                                                Weight weight, Put put) {
  constexpr int kUnderWay = 8;  // weights, which come from the cache at best
  const int threads = static_cast<int>(blockDim.x);
  const int along = min(threads, (columns + 15) / 16 * 16), parts = min(threads / along, rows);
  const int side = threadIdx.x % along, part = threadIdx.x / along;
  for (int first = 0; first < columns; first += along) {
    const int count = min(along, columns - first);
    const bool works = side < count && part < parts;
    A sum[kVectors] = {};
    if (works)
      for_batches<kUnderWay>(
          part, rows, parts, [&](int k) { return weight(k, first + side); },
          [&](int k, A w) {
            A value[kVectors];
            load_shared(vectors + k * kVectors, true, value);
#pragma unroll
            for (int v = 0; v < kVectors; ++v) sum[v] += w * value[v];
          });
    add_parts(sum, works, part, parts, side, count, aside,
              [&](int v, int j, A total) { put(v, first + j, total); });
  }
}

}  // namespace cbam::cuda
