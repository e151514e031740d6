// The weights of the MLP that a block's channels need, and products with them: along the rows of a
// matrix, and down its columns.
#pragma once

#include "../primitives/vector_io.cuh"
#include "resident_parts.cuh"
#include "resident_tile.cuh"

namespace cbam::cuda {

// Brings the weights of the block's channels to the cache while the first samples arrive.
template <bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void prefetch_weights(
    const ResidentBlock<T, kChannelsFirst, kSplit>& block) {
  const Resident& p = block.p;
  const int size = static_cast<int>(bytes_of(p.weights.dtype));
  const int lines = (block.channels * size + kLineBytes - 1) / kLineBytes;
  const int row = p.hidden * size, end = (block.channels * row + kLineBytes - 1) / kLineBytes;
  const auto* fc1 = static_cast<const char*>(p.weights.fc1_weight) + block.first_channel * size;
  const auto* fc2 =
      static_cast<const char*>(p.weights.fc2_weight) + int64_t{block.first_channel} * row;
  for (int i = threadIdx.x; i < lines * p.hidden; i += blockDim.x) {
    prefetch(fc1 + int64_t{i / lines} * p.channels * size + i % lines * kLineBytes);
    if (i < end) prefetch(fc2 + int64_t{i} * kLineBytes);
  }
}

// Calls body(weights) with a pointer to their type: x's own, or that of sums.
template <class T, class Body>
__device__ __forceinline__ void with_weights(const void* weights, DType dtype, Body body) {
  if constexpr (std::is_same_v<acc_t<T>, T>)
    body(static_cast<const T*>(weights));
  else if (dtype == DType::kFloat32)
    body(static_cast<const acc_t<T>*>(weights));
  else
    body(static_cast<const T*>(weights));
}

// A matrix to shared memory: `cols` columns side by side, in rows `stride` apart there and `pitch`
// apart here, kCount elements at a time.
template <int kCount, class W>
__device__ __forceinline__ void hold_rows(const W* from, int64_t stride, int rows, int cols,
                                          int pitch, W* to) {
  const int vectors = cols / kCount;
  for_batches<4>(
      threadIdx.x, rows * vectors, blockDim.x,
      [&](int i) { return load<kCount>(from + i / vectors * stride + i % vectors * kCount); },
      [&](int i, const Raw<W, kCount>& raw) {
        W* target = to + i / vectors * pitch + i % vectors * kCount;
        if constexpr (kCount == 1)
          *target = raw.element[0];
        else
          *reinterpret_cast<uint4*>(target) = raw.words;
      });
}

// The same by vectors where its rows are whole ones.
template <class W>
__device__ __forceinline__ void hold(const W* from, int64_t stride, int rows, int cols, int pitch,
                                     char* held) {
  W* to = reinterpret_cast<W*>(held);
  const bool whole = stride % kVector<W> == 0 && cols % kVector<W> == 0 && pitch % kVector<W> == 0;
  if (whole && elements_to_boundary(from) == 0)
    hold_rows<kVector<W>>(from, stride, rows, cols, pitch, to);
  else
    hold_rows<1>(from, stride, rows, cols, pitch, to);
}

// The weights of the block's channels: where they stay on the chip they come there, else to the
// cache, while the first samples arrive.
template <bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void fetch_weights(const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                              const HeldWeights& held) {
  const Resident& p = block.p;
  if (!block.g.weight_bytes) {
    prefetch_weights(block);
    return;
  }
  with_weights<T>(p.weights.fc1_weight, p.weights.dtype, [&](const auto* weights) {
    hold(weights + block.first_channel, p.channels, p.hidden, block.channels, block.g.channels,
         held.fc1);
  });
  with_weights<T>(p.weights.fc2_weight, p.weights.dtype, [&](const auto* weights) {
    hold(weights + int64_t{block.first_channel} * p.hidden, p.hidden, block.channels, p.hidden,
         p.hidden, held.fc2);
  });
}

// Calls body(weights, stride), where weights[u * stride + c] belongs to hidden unit u and channel c
// of the block.
template <bool kChannelsFirst, Split kSplit, class T, class Body>
__device__ __forceinline__ void with_first_layer(
    const ResidentBlock<T, kChannelsFirst, kSplit>& block, const HeldWeights& held, Body body) {
  const Resident& p = block.p;
  if (block.g.weight_bytes)
    with_weights<T>(held.fc1, p.weights.dtype,
                    [&](const auto* weights) { body(weights, int64_t{block.g.channels}); });
  else
    with_weights<T>(p.weights.fc1_weight, p.weights.dtype, [&](const auto* weights) {
      body(weights + block.first_channel, int64_t{p.channels});
    });
}

// Calls body(weights), where weights[c * hidden + u] belongs to channel c of the block and hidden
// unit u.
template <bool kChannelsFirst, Split kSplit, class T, class Body>
__device__ __forceinline__ void with_second_layer(
    const ResidentBlock<T, kChannelsFirst, kSplit>& block, const HeldWeights& held, Body body) {
  const Resident& p = block.p;
  if (block.g.weight_bytes)
    with_weights<T>(held.fc2, p.weights.dtype, body);
  else
    with_weights<T>(p.weights.fc2_weight, p.weights.dtype, [&](const auto* weights) {
      body(weights + int64_t{block.first_channel} * p.hidden);
    });
}

// Threads that read what the blocks of the team have of a hidden unit.
constexpr int kUnitLanes = 16;

// Adds to `sum` what every step-th block of the team, from block `first` on, has put out in a
// vector where this one has `own`; kBatch of them are under way at a time.
template <int kBatch, class A, int kCount>
__device__ __forceinline__ void add_shares(const Team& team, const A* own, int first, int step,
                                           A (&sum)[kCount]) {
  static_assert(sizeof sum == kVectorBytes);
  read_from(team, [&](auto read) {
    const auto* vector = reinterpret_cast<const uint4*>(own);
    for_batches<kBatch>(
        first, team.size, step, [&](int from) { return Raw<A, kCount>{read(vector, from)}; },
        [&](int, const Raw<A, kCount>& share) {
#pragma unroll
          for (int k = 0; k < kCount; ++k) sum[k] += share.element[k];
        });
  });
}

// What the blocks of a team have put out in vectors, where this one has `own`, to where it looks
// all up: `values` values of each of the hidden units, which blocks have added up in shares.
template <bool kChannelsFirst, Split kSplit, class T, class A>
__device__ __forceinline__ void collect_units(const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                              const A* own, int values, A* to) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(A));
  const Shares shares = block.unit_shares();
  block.team.barrier();
  read_from(block.team, [&](auto read) {
    for (int i = kCount * threadIdx.x; i < block.p.hidden * values; i += kCount * block.g.threads) {
      const int owner = shares.owner(i / values);
      const A* from = own + i - shares.first(owner) * values;
      *reinterpret_cast<uint4*>(to + i) = read(reinterpret_cast<const uint4*>(from), owner);
    }
  });
  __syncthreads();
}

// Weights that a lane has under way: where they do not stay on the chip they come from the
// second-level cache, hundreds of cycles away.
constexpr int kWeightsUnderWay = 8;
// Elements of vectors that are read at once.
template <int kVectors>
constexpr int kTogether = kVectors < 4 ? kVectors : 4;

// A warp's products of kRows rows of `count` weights, `stride` apart, with kVectors vectors, whose
// elements k stand side by side, `pitch` behind those before: lane i and every (kRows *
// kVectors)-th get that of row i / kVectors and vector i % kVectors. There are `rows` rows.
template <int kRows, int kVectors, class A, class W>
__device__ __forceinline__ A warp_products(const W* weights, int64_t stride, int rows, int count,
                                           const A* vectors, int pitch) {
  constexpr int kAtOnce = kWeightsUnderWay / kRows, kValues = kTogether<kVectors>;
  A sum[kRows * kVectors] = {};
#pragma unroll 1
  for (int first = threadIdx.x % 32; first < count; first += 32 * kAtOnce) {
    W weight[kAtOnce][kRows];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int k = first + 32 * i;
        weight[i][r] = r < rows && k < count ? weights[r * stride + k] : W();
      }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int k = first + 32 * i;
      if (k >= count) break;
#pragma unroll
      for (int v = 0; v < kVectors; v += kValues) {
        A value[kValues];
        load_shared(vectors + k * pitch + v, true, value);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int j = 0; j < kValues; ++j)
            sum[r * kVectors + v + j] += A(widen(weight[i][r])) * value[j];
      }
    }
  }
  return sums_of_warp(sum);
}

// For every column j of a matrix of weights, whose rows are `stride` apart: put(v, j, sum over k of
// weights[k][j] * vectors[k][v]). Threads side by side take columns, which lie side by side in
// memory, and those below them share the rows. What is put may be read when this returns; `aside`
// is as for add_parts.
template <int kVectors, class W, class A, class Put>
__device__ __forceinline__ void column_products(const W* weights, int64_t stride, int rows,
                                                int columns, const A* vectors, A* aside, Put put) {
  constexpr int kValues = kTogether<kVectors>;
  const int threads = static_cast<int>(blockDim.x);
  const int along = min(threads, max(1, (columns + 15) / 16) * 16);  // some blocks have no columns
  const int parts = min(threads / along, rows);
  const int side = threadIdx.x % along, part = threadIdx.x / along;
  for (int first = 0; first < columns; first += along) {
    const int count = min(along, columns - first);
    const bool works = side < count && part < parts;
    A sum[kVectors] = {};
    if (works)
      for_batches<kWeightsUnderWay>(
          part, rows, parts, [&](int k) { return weights[k * stride + first + side]; },
          [&](int k, W stored) {
            const A weight = widen(stored);
#pragma unroll
            for (int v = 0; v < kVectors; v += kValues) {
              A value[kValues];
              load_shared(vectors + k * kVectors + v, true, value);
#pragma unroll
              for (int j = 0; j < kValues; ++j) sum[v + j] += weight * value[j];
            }
          });
    add_parts(sum, works, part, parts, side, count, aside,
              [&](int v, int j, A total) { put(v, first + j, total); });
  }
}

}  // namespace cbam::cuda
