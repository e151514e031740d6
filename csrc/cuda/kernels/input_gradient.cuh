// dx of a part of a sample's matrix, by a block of blockDim.x threads, from what stands in shared
// memory for its rows and its columns.
//
//   dx[c][s] = (dout[c][s] * spatial_gate[s] + d_mean[s] + d_max[s] where c is s's maximum)
//              * channel_gate[c] + d_avg[c] + d_top[c] where s is c's maximum
//
// d_mean and d_avg are already divided by the channels and the pixels.
#pragma once

#include "../primitives/vector_io.cuh"
#include "backward.h"
#include "blocks.cuh"

namespace cbam::cuda {

// What belongs to the columns of one vector, in registers; what is added at the maximum alone is
// read from shared memory when it comes up.
template <int kCount, bool kPacked, class A>
struct ColumnTerms : VectorColumns<kPacked> {
  A gate[kCount], first[kCount];
  int index[kCount];
  const A* second;

  // `start` counts from the tile's first column.
  __device__ __forceinline__ ColumnTerms(const StagedTerms<A>& terms, int start, int cols)
      : VectorColumns<kPacked>(start, cols, kCount), second(terms.second()) {
    if constexpr (!kPacked && kCount > 1) {
      load_shared(terms.gate() + start, true, gate);
      load_shared(terms.first() + start, true, first);
      load_shared(terms.index() + start, true, index);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int column = this->column(i);
        gate[i] = terms.gate()[column];
        first[i] = terms.first()[column];
        index[i] = terms.index()[column];
      }
    }
  }
};

// One element: `of_maps` and `of_pools` are what reaches it through the maps and the pools.
template <class A>
__device__ __forceinline__ A input_gradient_of(A dout, A spatial_gate, A of_maps, A channel_gate,
                                               A of_pools) {
  return (dout * spatial_gate + of_maps) * channel_gate + of_pools;
}

// The part, and how threads share it: `threads_along` side by side keep the columns of their
// vectors, those below them take every so many-th group of `row_group` rows.
template <class A>
struct InputGradientTile {
  StagedTerms<A> rows, columns;
  int first_row, first_col;  // the channel and the pixel, or the other way round, of the first
  int cols;
  int row_group;  // 1 unless columns are packed
  int threads_along;
};

// What a thread does of it.
template <class T, Access kAccess, bool kChannelsFirst>
class InputGradientThread {
 public:
  using A = acc_t<T>;
  static constexpr int kCount = kAccess == Access::kScalar ? 1 : kVector<T>;

  __device__ __forceinline__ explicit InputGradientThread(const InputGradientTile<A>& tile)
      : tile_(tile),
        side_(static_cast<int>(threadIdx.x) % tile.threads_along),
        below_(static_cast<int>(threadIdx.x) / tile.threads_along),
        step_(static_cast<int>(blockDim.x) / tile.threads_along),
        vectors_((kPacked ? tile.row_group * tile.cols : tile.cols) / kCount),
        own_(tile.columns, min(side_, vectors_ - 1) * kCount, tile.cols) {}

  // dx of rows [begin, end) of the part; load(row, column) gives a vector of dout, kBatch of which
  // are under way at a time; `dx` points to the part's first element.
  template <int kBatch, class Load>
  __device__ __forceinline__ void write(int begin, int end, Load load, T* dx, int64_t row_stride) {
    if (below_ >= step_) return;
    for (int v = side_; v < vectors_; v += tile_.threads_along) {
      // Once for all rows where there is a thread for every vector.
      if (vectors_ > tile_.threads_along)
        own_ = ColumnTerms<kCount, kPacked, A>(tile_.columns, v * kCount, tile_.cols);
      for_batches<kBatch>(
          begin + below_ * tile_.row_group, end, step_ * tile_.row_group,
          [&](int row) { return load(row, v * kCount); },
          [&](int row, const Raw<T, kCount>& raw) {
            store(dx + row * row_stride + v * kCount, gradient(row, raw));
          });
    }
  }

 private:
  static constexpr bool kPacked = kAccess == Access::kPacked;

  __device__ __forceinline__ Pack<T, kCount> gradient(int row, const Raw<T, kCount>& raw) const {
    const StagedTerms<A>& rows = tile_.rows;
    auto pack = widen(raw);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int r = row + own_.row_of(i), c = own_.column(i);
      const A at_row = rows.index()[r] == tile_.first_col + c ? rows.second()[r] : A(0);
      const A at_column = own_.index[i] == tile_.first_row + r ? own_.second[c] : A(0);
      pack.value[i] =
          kChannelsFirst
              ? input_gradient_of(pack.value[i], own_.gate[i], own_.first[i] + at_column,
                                  rows.gate()[r], rows.first()[r] + at_row)
              : input_gradient_of(pack.value[i], rows.gate()[r], rows.first()[r] + at_row,
                                  own_.gate[i], own_.first[i] + at_column);
    }
    return pack;
  }

  const InputGradientTile<A> tile_;
  const int side_, below_, step_, vectors_;
  ColumnTerms<kCount, kPacked, A> own_;
};

}  // namespace cbam::cuda
