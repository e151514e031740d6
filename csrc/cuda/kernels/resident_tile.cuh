// The slice of some samples that a block of a team holds in shared memory: how it gets there, and
// how threads share its columns.
#pragma once

#include "../primitives/async_copy.cuh"
#include "../primitives/team.cuh"
#include "../primitives/vector_io.cuh"
#include "blocks.cuh"
#include "resident.h"

namespace cbam::cuda {

// This block, and what it holds of `samples` samples: a matrix of rows() rows of cols() elements
// each. It makes the gates of `channels` channels, which are those that it holds unless it holds
// pixels.
template <class T, bool kChannelsFirst, Split kSplit = Split::kChannels>
struct ResidentBlock {
  static constexpr bool kHoldsPixels = kSplit == Split::kPixels;

  const Resident& p;
  const ResidentGeometry& g;
  Team team;
  int first_channel, channels;
  int samples = 0;  // of the visit
  int round = 0;    // of the team's visits

  __device__ __forceinline__ ResidentBlock(const Resident& p_, const ResidentGeometry& g_)
      : p(p_), g(g_) {
    team = {g.cluster, g.team, static_cast<int>(blockIdx.x) % g.team, static_cast<int>(g.exchange),
            p.exchange};
    const Shares shares = channel_shares();
    first_channel = shares.first(team.rank);
    channels = shares.count(team.rank);
  }

  __device__ __forceinline__ Shares channel_shares() const {
    return {p.channels, g.channel_group, g.team};
  }
  __device__ __forceinline__ Shares unit_shares() const { return {p.hidden, 1, g.team}; }
  __device__ __forceinline__ Shares pixel_shares() const {
    return {p.space.pixels(), g.pixel_group, g.team};
  }
  // What it holds.
  __device__ __forceinline__ int first_held_channel() const {
    return kHoldsPixels ? 0 : first_channel;
  }
  __device__ __forceinline__ int held_channels() const {
    return kHoldsPixels ? p.channels : channels;
  }
  // Where channel c of those whose gates it makes stands among those that it holds.
  __device__ __forceinline__ int own_place(int sample, int c) const {
    return sample * g.held_channels + first_channel - first_held_channel() + c;
  }
  __device__ __forceinline__ int first_pixel() const {
    return kHoldsPixels ? pixel_shares().first(team.rank) : 0;
  }
  __device__ __forceinline__ int pixels() const {
    if constexpr (kHoldsPixels) return pixel_shares().count(team.rank);
    return kChannelsFirst ? g.pitch : g.rows;
  }
  __device__ __forceinline__ int first_row() const {
    return kChannelsFirst ? first_held_channel() : first_pixel();
  }
  __device__ __forceinline__ int first_col() const {
    return kChannelsFirst ? first_pixel() : first_held_channel();
  }
  __device__ __forceinline__ int rows() const {
    return kChannelsFirst ? held_channels() : pixels();
  }
  __device__ __forceinline__ int cols() const {
    return kChannelsFirst ? pixels() : held_channels();
  }

  // Of the team.
  __device__ __forceinline__ int number() const { return block_index() / g.team; }
  // The first sample of this team's visit in a round, and how many these are; none once all are
  // done.
  __device__ __forceinline__ int64_t first_in(int any_round) const {
    return (number() + any_round * g.teams) * g.samples;
  }
  __device__ __forceinline__ int samples_in(int any_round) const {
    const int64_t left = p.samples - first_in(any_round);
    return static_cast<int>(max(int64_t{0}, min(left, int64_t{g.samples})));
  }
  __device__ __forceinline__ void start(int this_round) {
    round = this_round;
    samples = samples_in(round);
  }
  // Of the visit.
  __device__ __forceinline__ int64_t first_sample() const { return first_in(round); }
  // Of what is loaded once a visit.
  __device__ __forceinline__ int parity() const { return round & 1; }
};

// does(sample, channel of the block) for the channels of so many samples whose gates it makes.
template <bool kChannelsFirst, Split kSplit, class T, class Does>
__device__ __forceinline__ void for_own_channels(
    const ResidentBlock<T, kChannelsFirst, kSplit>& block, int samples, Does does) {
  for (int i = threadIdx.x; i < samples * block.channels; i += block.g.threads)
    does(i / block.channels, i % block.channels);
}

// The pixels that a block holds, and the smallest box around them.
struct OwnPixels {
  int first, count;
  Box box;

  template <class Block>
  __device__ __forceinline__ explicit OwnPixels(const Block& block)
      : first(block.first_pixel()),
        count(block.pixels()),
        box(block.p.space, box_around(block.p.space, first, count)) {}
  __device__ __forceinline__ bool has(int pixel) const {
    return pixel >= first && pixel < first + count;
  }
};

// does(k, number, box) for the block's own boxes of the visit, by all threads together: its k-th,
// which is the visit's box `number`.
template <bool kChannelsFirst, class T, class Does>
__device__ __forceinline__ void for_own_boxes(const ResidentBlock<T, kChannelsFirst>& block,
                                              Does does) {
  const ResidentGeometry& g = block.g;
  const auto boxes = static_cast<int>(block.samples * g.boxes.boxes());
  for (int k = 0, number = block.team.rank; number < boxes; ++k, number += g.team)
    does(k, number, Box(g.boxes, block.p.space, number));
}

// Rows [first, first + count) of a sample's slice.
struct Chunk {
  int first, count;

  __device__ __forceinline__ Chunk(const ResidentGeometry& g, int rows, int number)
      : first(number * g.chunk), count(min(g.chunk, rows - first)) {}
};

// Sets up a barrier for each of so many chunks, by one thread.
__device__ __forceinline__ void init_landed(const ResidentGeometry& g, CopyBarrier* landed,
                                            int chunks) {
  if (g.copy == Copy::kPlain) return;
  for (int i = 0; i < chunks; ++i) init(landed + i, g.copy == Copy::kBulk ? 1 : g.threads);
}

// Whether this thread takes part in load number n: one warp starts what the copy engine does, each
// in its turn, so that they find out where it stands at the same time. There are 2^i warps.
__device__ __forceinline__ bool copies(const ResidentGeometry& g, int n) {
  return g.copy != Copy::kBulk || static_cast<int>(threadIdx.x) / 32 == (n & (g.threads / 32 - 1));
}

// Before the barrier behind which rows that have been read are loaded anew.
__device__ __forceinline__ void hand_over_rows(const ResidentGeometry& g) {
  if (g.copy == Copy::kBulk) hand_over_to_bulk_copies();
}

// Starts to load a chunk of sample `within` of a round's visit to `to`, with all threads that take
// part. Nothing may still read what was there before.
template <bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void load_chunk(const ResidentGeometry& g,
                                           const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                           const Matrix& from, int round, int within, int number,
                                           T* to, CopyBarrier* landed) {
  constexpr int kCount = kVector<T>;
  const Chunk chunk(g, block.rows(), number);
  if (chunk.count <= 0) return;
  const int64_t row = block.first_row() + chunk.first;
  const int64_t sample = block.first_in(round) + within;
  const T* data = static_cast<const T*>(from.data) + sample * from.sample_stride +
                  row * from.row_stride + block.first_col();
  // Rows without a gap between them are one piece.
  const bool whole =
      block.kHoldsPixels ? !kChannelsFirst && from.row_stride == block.cols() : kChannelsFirst;
  const int pieces = whole ? 1 : chunk.count;
  const int length = whole ? chunk.count * block.cols() : block.cols();
  if (g.copy == Copy::kBulk) {
    const int bytes = length * static_cast<int>(sizeof(T)), lane = threadIdx.x % 32;
    if (lane == 0) arrive_expecting(landed, pieces * bytes);
    for (int i = lane; i < pieces; i += 32)
      bulk_copy(to + i * g.pitch, data + i * from.row_stride, bytes, landed);
    return;
  }
  const int vectors = length / kCount;
  for (int i = threadIdx.x; i < pieces * vectors; i += g.threads) {
    const int piece = i / vectors, at = i % vectors * kCount;
    const T* source = data + piece * from.row_stride + at;
    T* target = to + piece * g.pitch + at;
    if (g.copy == Copy::kAsync)
      copy_16_bytes(target, source);
    else
      *reinterpret_cast<uint4*>(target) = load<kCount>(source).words;
  }
  if (g.copy == Copy::kAsync) arrive_after_copies(landed);
}

// Brings what the block holds of the next visit to the second-level cache, as few rows at a time as
// are whole vectors, while memory has little else to do.
template <bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void fetch_ahead(const ResidentGeometry& g,
                                            const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                            const Matrix& from) {
  const int round = block.round + 1;
  const int step = kChannelsFirst && !block.kHoldsPixels ? g.channel_group : 1;
  const int bytes = step * block.cols() * static_cast<int>(sizeof(T));
  for (int sample = 0; sample < block.samples_in(round); ++sample) {
    const T* slice = static_cast<const T*>(from.data) +
                     (block.first_in(round) + sample) * from.sample_stride + block.first_col();
    for (int row = step * threadIdx.x; row < block.rows(); row += step * g.threads)
      prefetch(slice + (block.first_row() + row) * from.row_stride, bytes);
  }
}

// Until a chunk is there. Copies through registers are there after the barrier that follows them.
__device__ __forceinline__ void wait_for_chunk(const ResidentGeometry& g, CopyBarrier* landed,
                                               int parity) {
  if (g.copy != Copy::kPlain) wait(landed, parity);
}

template <class A, bool kArgmax>
__device__ __forceinline__ void put_aside(const ColumnScratch<A>& to, int i,
                                          const Extremes<A, kArgmax>& e) {
  to.sum[i] = e.sum;
  to.max[i] = e.max;
  if constexpr (kArgmax) to.argmax[i] = e.argmax;
}
template <class A, bool kArgmax>
__device__ __forceinline__ void merge_aside(const ColumnScratch<A>& from, int i,
                                            Extremes<A, kArgmax>& e) {
  Extremes<A, kArgmax> other;
  other.sum = from.sum[i];
  other.max = from.max[i];
  if constexpr (kArgmax) other.argmax = from.argmax[i];
  e.merge(other);
}
template <class A>
__device__ __forceinline__ void put_aside(const ColumnScratch<A>& to, int i, A sum) {
  to.sum[i] = sum;
}
template <class A>
__device__ __forceinline__ void merge_aside(const ColumnScratch<A>& from, int i, A& sum) {
  sum += from.sum[i];
}

// For columns [first, end) of `samples` samples: put(sample, column, what all rows have of it),
// where gather(sample, column, group) is what rows group, group + groups, ... have. An element at a
// time: from shared memory that is fast enough, and any number of columns will do.
template <class A, class Gather, class Put>
__device__ __forceinline__ void walk_columns(const ResidentGeometry& g, int samples, int first,
                                             int end, const ColumnScratch<A>& scratch,
                                             Gather gather, Put put) {
  const int count = end - first, total = samples * count;
  if (g.groups == 1) {
    for (int i = threadIdx.x; i < total; i += g.threads)
      put(i / count, first + i % count, gather(i / count, first + i % count, 0));
    return;
  }
  if (static_cast<int>(threadIdx.x) < total * g.groups) {
    const int i = threadIdx.x % total, group = threadIdx.x / total;
    put_aside(scratch, threadIdx.x, gather(i / count, first + i % count, group));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < total; i += g.threads) {
    decltype(gather(0, 0, 0)) merged{};
    for (int group = 0; group < g.groups; ++group) merge_aside(scratch, group * total + i, merged);
    put(i / count, first + i % count, merged);
  }
}

}  // namespace cbam::cuda
