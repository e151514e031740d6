// dx of the slice of a sample that a block of the resident backward holds; the formula stands in
// input_gradient.cu.
#pragma once

#include "../primitives/vector_io.cuh"
#include "backward.h"
#include "blocks.cuh"

namespace cbam::cuda {

// The slice, and how threads share it: `along` side by side take vectors of a group of rows, those
// below them the groups that follow.
template <class A>
struct GradientSlice {
  StagedTerms<A> rows, columns;
  int first_row, first_col;  // the channel and the pixel, or the other way round, of the first
  int cols, pitch;           // of a row of dout
  int row_group;             // 1 unless rows are packed
  int along;
};

// What belongs to the columns of a vector, in registers for all rows. A vector of packed rows
// starts `ahead` rows below its group and may go on in the row after that, from element `split` on.
template <int kCount, bool kPacked, class A>
struct VectorTerms {
  int start;  // its first column
  int ahead = 0, split = kCount;
  A gate[kCount], first[kCount], both[kCount];
  int index[kCount];  // of the group's first row where `both` is added instead of `first`

  __device__ __forceinline__ VectorTerms(const GradientSlice<A>& slice, int number)
      : start(number * kCount) {
    const StagedTerms<A>& columns = slice.columns;
    A second[kCount];
    if constexpr (kPacked) {
      ahead = start / slice.cols;
      start -= ahead * slice.cols;
      split = min(kCount, slice.cols - start);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        // Rows that are shorter than a vector are written without this.
        const int column = min(i < split ? start + i : start + i - slice.cols, slice.cols - 1);
        gate[i] = columns.gate()[column];
        first[i] = columns.first()[column];
        second[i] = columns.second()[column];
        index[i] = columns.index()[column] - ahead - (i < split ? 0 : 1);
      }
    } else {
      load_shared(columns.gate() + start, true, gate);
      load_shared(columns.first() + start, true, first);
      load_shared(columns.second() + start, true, second);
      load_shared(columns.index() + start, true, index);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      both[i] = first[i] + second[i];
      index[i] -= slice.first_row;
    }
  }
};

template <class T, bool kPacked, bool kChannelsFirst>
class SliceGradient {
 public:
  using A = acc_t<T>;

  __device__ __forceinline__ explicit SliceGradient(const GradientSlice<A>& slice)
      : slice_(slice),
        side_(static_cast<int>(threadIdx.x) % slice.along),
        below_(static_cast<int>(threadIdx.x) / slice.along),
        step_(static_cast<int>(blockDim.x) / slice.along),
        vectors_(slice.row_group * slice.cols / kCount),
        own_(slice, min(side_, vectors_ - 1)) {}

  // dx of rows [begin, end), which are whole groups, from dout as it is staged; both point to the
  // slice's first element.
  __device__ __forceinline__ void write(int begin, int end, const T* dout, T* dx,
                                        int64_t dx_stride) {
    if (below_ >= step_) return;
    for (int v = side_; v < vectors_; v += slice_.along) {
      // Once for all rows where there is a thread for every vector.
      if (vectors_ > slice_.along) own_ = Terms(slice_, v);
      const int step = step_ * slice_.row_group;
#pragma unroll 1  // other warps cover what a row waits for, and registers are few
      for (int row = begin + below_ * slice_.row_group; row < end; row += step) {
        const auto raw = load_staged<kCount>(dout + row * slice_.pitch + v * kCount);
        store(dx + row * dx_stride + v * kCount, gradient(row, raw));
      }
    }
  }

 private:
  static constexpr int kCount = kVector<T>;
  using Terms = VectorTerms<kCount, kPacked, A>;

  // The vector of the group that starts with `row`.
  __device__ __forceinline__ Pack<T, kCount> gradient(int row, const Raw<T, kCount>& raw) const {
    const StagedTerms<A>& rows = slice_.rows;
    const int upper = row + own_.ahead, lower = upper + (own_.split < kCount);
    const A gate = rows.gate()[upper], first = rows.first()[upper];
    const A lower_gate = kPacked ? rows.gate()[lower] : gate,
            lower_first = kPacked ? rows.first()[lower] : first;
    auto pack = widen(raw);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const A of_column = own_.index[i] == row ? own_.both[i] : own_.first[i];
      const A row_gate = i < own_.split ? gate : lower_gate,
              of_row = i < own_.split ? first : lower_first;
      pack.value[i] =
          kChannelsFirst
              ? input_gradient_of(pack.value[i], own_.gate[i], of_column, row_gate, of_row)
              : input_gradient_of(pack.value[i], row_gate, of_row, own_.gate[i], of_column);
    }
    add_at_maximum(upper, own_.start, 0, own_.split, pack);
    if constexpr (kPacked) add_at_maximum(lower, -own_.split, own_.split, kCount, pack);
    return pack;
  }

  // What a row has at its maximum alone, if that is among the elements [from, to) of the vector,
  // whose element 0 would be column `start` of the row.
  __device__ __forceinline__ void add_at_maximum(int row, int start, int from, int to,
                                                 Pack<T, kCount>& pack) const {
    const int at = slice_.rows.index()[row] - slice_.first_col - start;
    if (at < from || at >= to) return;
    const A second = slice_.rows.second()[row];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i == at) pack.value[i] += kChannelsFirst ? second : second * own_.gate[i];
  }

  const GradientSlice<A> slice_;
  const int side_, below_, step_, vectors_;
  Terms own_;
};

// The same by all threads where a row is shorter than a vector: an element at a time.
template <class T>
__device__ __forceinline__ void write_short_rows(const GradientSlice<acc_t<T>>& slice, int begin,
                                                 int end, const T* dout, T* dx, int64_t dx_stride) {
  using A = acc_t<T>;
  const StagedTerms<A>&rows = slice.rows, &columns = slice.columns;
  for (int i = threadIdx.x; i < (end - begin) * slice.cols; i += blockDim.x) {
    const int row = begin + i / slice.cols, col = i % slice.cols;
    const bool is_row = columns.index()[col] == slice.first_row + row,
               is_col = rows.index()[row] == slice.first_col + col;
    dx[row * dx_stride + col] = narrow<T>(input_gradient_of(
        A(widen(dout[row * slice.pitch + col])), columns.gate()[col],
        columns.first()[col] + (is_row ? columns.second()[col] : A(0)), rows.gate()[row],
        rows.first()[row] + (is_col ? rows.second()[row] : A(0))));
  }
}

}  // namespace cbam::cuda
