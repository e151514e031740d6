// out of the slice that a block of the resident forward holds.
//
//   out[c][s] = x[c][s] * channel_gate[c] * spatial_gate[s], and what follows (ending.cuh)
#pragma once

#include "ending.cuh"
#include "resident_extremes.cuh"

namespace cbam::cuda {

// What a vector of out is multiplied by: its columns' gates, held by a thread, and its rows'.
template <class Columns, int kCount, class A>
struct ScaledColumns {
  Columns columns;
  A own[kCount];

  __device__ __forceinline__ ScaledColumns(int first, int cols, const A* of_column)
      : columns(first, cols, kCount) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) own[i] = of_column[columns.column(i)];
  }
  // An element is multiplied by the channel's gate first, then by the pixel's, as the plain form
  // does. `of_row` is the gate of the group's first row.
  template <bool kRowsFirst, class T>
  __device__ __forceinline__ void scale(const A* of_row, Pack<T, kCount>& pack) const {
    constexpr bool kTwoRows = !std::is_same_v<Columns, VectorColumns<true>>;
    A of_first = A(0), of_last = A(0);
    if constexpr (kTwoRows) {
      of_first = of_row[columns.first_row];
      of_last = of_row[columns.last_row];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      A by;
      if constexpr (kTwoRows)
        by = columns.of_element(i, of_first, of_last);
      else
        by = of_row[columns.row_of(i)];
      pack.value[i] *= kRowsFirst ? by : own[i];
      pack.value[i] *= kRowsFirst ? own[i] : by;
    }
  }
};

// Vectors of a thread that are under way: what registers allow, of which compilers take more for
// the architectures before sm_90, those without clusters.
template <bool kTraining>
constexpr int kScaledTogether = kTraining || !kHasClusters ? 2 : 4;

// out of a sample, chunk by chunk: done(number) is called by all threads once nothing reads a chunk
// any more. A thread keeps to the columns of one vector, or of a few where rows are long; rows that
// do not end with vectors are taken in groups that do, of g.channel_group.
template <bool kTraining, Follows kFollows, class Columns, bool kChannelsFirst, Split kSplit,
          class T, class Done>
__device__ __forceinline__ void scale_sample(const ResidentForward& p,
                                             const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                             const ForwardMemory<T>& m, int sample, Done done) {
  using A = acc_t<T>;
  constexpr int kCount = kVector<T>;
  const ResidentForwardGeometry& g = p.geometry;
  const A* channels = m.shared.gate + sample * g.held_channels;
  const A* pixels = m.spatial + sample * block.pixels();
  const A* of_row = kChannelsFirst ? channels : pixels;
  const A* of_column = kChannelsFirst ? pixels : channels;
  const T* tile = m.shared.tile + int64_t{sample} * g.rows * g.pitch;
  T* out = static_cast<T*>(p.out) + (block.first_sample() + sample) * p.out_sample_stride +
           block.first_row() * p.out_row_stride + block.first_col();
  const EndingRows& e = p.ending;
  const EndingOf<T, kFollows> ending(e, (block.first_sample() + sample) * e.sample_stride +
                                            block.first_row() * e.row_stride + block.first_col());
  const int group = std::is_same_v<Columns, VectorOfTwoRows<false>> ? 1 : g.channel_group;
  const int vectors = group * block.cols() / kCount;
  const int along = min(vectors, g.threads), below = g.threads / along;
  const int side = threadIdx.x % along, row_below = threadIdx.x / along * group;
  const int end = static_cast<int>(threadIdx.x) < along * below ? vectors : 0;
  int held = side;
  ScaledColumns<Columns, kCount, A> by(held * kCount, block.cols(), of_column);
  for (int number = 0; number < g.chunks; ++number) {
    const Chunk chunk(g, block.rows(), number);
    for (int v = side; v < end; v += along) {
      if (v != held) by = {v * kCount, block.cols(), of_column};
      held = v;
      for_mostly_whole_batches<kAtATime<kFollows, kScaledTogether<kTraining>>>(
          chunk.first + row_below, chunk.first + chunk.count, below * group,
          [&](int row) {
            return UnderWay{load_staged<kCount>(tile + row * g.pitch + v * kCount),
                            ending.template load<kCount>(row * e.row_stride + v * kCount)};
          },
          [&](int row, const auto& loaded) {
            auto pack = widen(loaded.scaled);
            by.template scale<kChannelsFirst>(of_row + row, pack);
            ending.apply(loaded.added, pack);
            store(out + int64_t{row} * p.out_row_stride + v * kCount, pack);
          });
    }
    hand_over_rows(g);
    __syncthreads();
    done(number);
  }
}

// The same for any rows.
template <bool kTraining, Follows kFollows, bool kChannelsFirst, Split kSplit, class T, class Done>
__device__ __forceinline__ void scale_and_end(const ResidentForward& p,
                                              const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                              const ForwardMemory<T>& m, int sample, Done done) {
  constexpr int kCount = kVector<T>;
  if (block.kHoldsPixels || !kChannelsFirst || block.cols() % kCount == 0)
    scale_sample<kTraining, kFollows, VectorOfTwoRows<false>>(p, block, m, sample, done);
  else if (block.cols() >= kCount - 1)
    scale_sample<kTraining, kFollows, VectorOfTwoRows<true>>(p, block, m, sample, done);
  else
    scale_sample<kTraining, kFollows, VectorColumns<true>>(p, block, m, sample, done);
}

template <bool kTraining, bool kChannelsFirst, Split kSplit, class T, class Done>
__device__ __forceinline__ void scale_rows(const ResidentForward& p,
                                           const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                           const ForwardMemory<T>& m, int sample, Done done) {
  with_ending(p.ending, [&](auto follows) {
    scale_and_end<kTraining, follows.value>(p, block, m, sample, done);
  });
}

}  // namespace cbam::cuda
