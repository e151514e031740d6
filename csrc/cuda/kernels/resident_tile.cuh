// The slice of some samples that a block of a team holds in shared memory: how it gets there, and
// the walks along its rows and down its columns.
#pragma once

#include "../primitives/async_copy.cuh"
#include "../primitives/team.cuh"
#include "blocks.cuh"
#include "gather_row.cuh"
#include "resident.h"

namespace cbam::cuda {

// This block, and what it holds: `channels` channels of `samples` samples, a matrix of `rows` rows
// of `cols` elements each.
template <class T, bool kChannelsFirst>
struct ResidentBlock {
  using A = acc_t<T>;

  Team team;
  int64_t number;  // of the team
  int first_channel, channels, pixels, rows, cols;
  int64_t first_sample = 0;  // of the visit
  int samples = 0;
  int parity = 0;  // of the visit's loads

  __device__ __forceinline__ explicit ResidentBlock(const Resident& p) {
    const ResidentGeometry& g = p.geometry;
    team = {g.cluster, g.team, static_cast<int>(blockIdx.x) % g.team, g.exchange};
    number = blockIdx.x / g.team;
    first_channel = team.rank * g.channels;
    channels = max(0, min(g.channels, p.channels - first_channel));
    pixels = p.space.pixels();
    rows = kChannelsFirst ? channels : pixels;
    cols = kChannelsFirst ? pixels : channels;
  }

  // Samples of a visit of this team; none once all are done.
  __device__ __forceinline__ int samples_of(const Resident& p, int64_t visit) const {
    const int64_t left = p.samples - visit * p.geometry.samples;
    return static_cast<int>(max(int64_t{0}, min(left, int64_t{p.geometry.samples})));
  }
  __device__ __forceinline__ void start(const Resident& p, int64_t visit, int64_t round) {
    first_sample = visit * p.geometry.samples;
    samples = samples_of(p, visit);
    parity = static_cast<int>(round & 1);
  }
};

// What a block has of shared memory, and what it puts out for the others.
template <class T>
struct Memory {
  using A = acc_t<T>;
  ResidentShared<T, A> shared;
  Exchange<A> exchange;
  A* spatial;  // [samples, pixels]
};

// Rows [first, first + count) of a sample's slice.
struct Chunk {
  int first, count;

  __device__ __forceinline__ Chunk(const ResidentGeometry& g, int rows, int number)
      : first(number * g.chunk), count(min(g.chunk, rows - first)) {}
};

// Starts to load a chunk of sample `within` of a visit, with all threads of the block. Nothing may
// still read what it held before.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void load_chunk(const Resident& p,
                                           const ResidentBlock<T, kChannelsFirst>& block, T* tile,
                                           CopyBarrier* landed, int64_t first_sample, int within,
                                           int number) {
  constexpr int kCount = kVector<T>;
  const ResidentGeometry& g = p.geometry;
  const Chunk chunk(g, block.rows, number);
  if (chunk.count <= 0) return;
  const int64_t row = kChannelsFirst ? block.first_channel + chunk.first : chunk.first;
  const T* from = static_cast<const T*>(p.x) + (first_sample + within) * p.x_sample_stride +
                  row * p.x_row_stride + (kChannelsFirst ? 0 : block.first_channel);
  T* to = tile + (int64_t{within} * g.rows + chunk.first) * g.pitch;
  CopyBarrier* done = landed + within * g.chunks + number;
  // Rows without a gap between them are one piece.
  const int pieces = kChannelsFirst ? 1 : chunk.count;
  const int length = kChannelsFirst ? chunk.count * block.cols : block.cols;
  if (g.copy == Copy::kBulk) {
    if (threadIdx.x >= 32) return;
    const int bytes = length * static_cast<int>(sizeof(T));
    if (threadIdx.x == 0) arrive_expecting(done, pieces * bytes);
    for (int i = threadIdx.x; i < pieces; i += 32)
      bulk_copy(to + i * g.pitch, from + i * p.x_row_stride, bytes, done);
    return;
  }
  const int vectors = length / kCount;
  for (int i = threadIdx.x; i < pieces * vectors; i += g.threads) {
    const int piece = i / vectors, at = i % vectors * kCount;
    const T* source = from + piece * p.x_row_stride + at;
    T* target = to + piece * g.pitch + at;
    if (g.copy == Copy::kAsync)
      copy_16_bytes(target, source);
    else
      *reinterpret_cast<uint4*>(target) = load<kCount>(source).words;
  }
  if (g.copy == Copy::kAsync) arrive_after_copies(done);
}

// Until a chunk is there. Copies through registers are there after the barrier that follows them.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void wait_for_chunk(const Resident& p,
                                               const ResidentBlock<T, kChannelsFirst>& block,
                                               CopyBarrier* landed, int within, int number) {
  if (p.geometry.copy != Copy::kPlain)
    wait(landed + within * p.geometry.chunks + number, block.parity);
}

// For rows [first, end) of every sample of the visit: put(sample, row, mean sum and maximum of the
// row's elements times their factor). `index` is the number of a row's first element; ready(sample,
// row) returns once the row may be read.
template <bool kScaled, bool kArgmax, bool kChannelsFirst, class T, class Ready, class Put>
__device__ __forceinline__ void walk_rows(const ResidentGeometry& g,
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
          tile + (int64_t{sample} * g.rows + row) * g.pitch, block.cols, index,
          kScaled ? factor + sample * g.channels : nullptr, lane, g.lanes,
          [](const T* at) { return load_staged<kVector<T>>(at); }, e);
    }
    merge_lanes(e, g.lanes);
    if (i < total && lane == 0) put(sample, row, e);
  }
}

// A column of the tile, rows group, group + groups, ...
template <bool kScaled, bool kArgmax, bool kChannelsFirst, class T, class Ready>
__device__ __forceinline__ Extremes<acc_t<T>, kArgmax> walk_column(
    const ResidentGeometry& g, const ResidentBlock<T, kChannelsFirst>& block, const T* tile,
    int sample, int col, int index, const acc_t<T>* factor, int group, Ready ready) {
  const T* column = tile + int64_t{sample} * g.rows * g.pitch + col;
  const acc_t<T>* own = kScaled ? factor + sample * g.channels : nullptr;
  Extremes<acc_t<T>, kArgmax> e;
  int row = group;
  for (int chunk = 0; row < block.rows; ++chunk) {
    ready(sample, chunk);
    const int end = min(block.rows, (chunk + 1) * g.chunk);
#pragma unroll 4
    for (; row < end; row += g.groups) {
      const acc_t<T> v = widen(column[row * g.pitch]);
      e.add(kScaled ? v * own[row] : v, index + row);
    }
  }
  return e;
}

// As walk_rows, for columns [first, end), an element at a time: from shared memory that is fast
// enough, and any number of columns will do. `index` is the number of a column's first element;
// ready(sample, chunk) returns once the chunk may be read.
template <bool kScaled, bool kArgmax, bool kChannelsFirst, class T, class Ready, class Put>
__device__ __forceinline__ void walk_columns(const ResidentGeometry& g,
                                             const ResidentBlock<T, kChannelsFirst>& block,
                                             const ResidentShared<T, acc_t<T>>& shared, int first,
                                             int end, int index, const acc_t<T>* factor,
                                             Ready ready, Put put) {
  const int count = end - first, total = block.samples * count;
  const auto column = [&](int i, int group) {
    return walk_column<kScaled, kArgmax>(g, block, shared.tile, i / count, first + i % count, index,
                                         factor, group, ready);
  };
  const auto put_column = [&](int i, const Extremes<acc_t<T>, kArgmax>& e) {
    put(i / count, first + i % count, e);
  };
  if (g.groups == 1) {
    for (int i = threadIdx.x; i < total; i += g.threads) put_column(i, column(i, 0));
    return;
  }
  if (static_cast<int>(threadIdx.x) < total * g.groups) {
    const auto e = column(threadIdx.x % total, threadIdx.x / total);
    shared.sum[threadIdx.x] = e.sum;
    shared.max[threadIdx.x] = e.max;
    if constexpr (kArgmax) shared.argmax[threadIdx.x] = e.argmax;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < total; i += g.threads) {
    Extremes<acc_t<T>, kArgmax> merged;
    for (int group = 0; group < g.groups; ++group) {
      Extremes<acc_t<T>, kArgmax> e;
      e.sum = shared.sum[group * total + i];
      e.max = shared.max[group * total + i];
      if constexpr (kArgmax) e.argmax = shared.argmax[group * total + i];
      merged.merge(e);
    }
    put_column(i, merged);
  }
}

}  // namespace cbam::cuda
