// Passes over one sample, seen as a matrix, that scale and sum it. What a pass over space is in one
// layout is a pass over channels in the other, so each is written once.
#pragma once

#include "extremes.h"

namespace cbam::cpu {
namespace {

// out[r][j] = ending(x[r][j] * row_factor[r] * col_factor[j], r, j, lanes) for rows [begin, end);
// `large`: past the caches. The rows of `next` are asked for meanwhile, so that memory never rests;
// x for none.
template <class T, class Ending, class A = acc_t<T>>
void scale_rows(const Matrix<const T>& x, const Matrix<T>& out, int64_t begin, int64_t end,
                const A* row_factor, const A* col_factor, bool large, const Matrix<const T>& next,
                Ending ending) {
  const auto scale = [&](auto, int64_t r, T* to, int64_t, auto for_columns) {
    const T* in = x.row(r);
    const A f = row_factor[r];
    for_columns(x.cols, [&](int64_t j, auto lanes) {
      lanes.store(to + j, ending(lanes.load(in + j) * f * lanes.load(col_factor + j), r, j, lanes));
    });
  };
  const auto write = [&](auto rows) {
    if (large)
      stream_rows<1>(out, begin, end, rows);
    else
      write_rows<1>(out, begin, end, rows);
  };
  if (next.data == x.data) return write(scale);
  const Matrix<const T> soon[] = {next};
  write([&](auto one, int64_t r, T* to, int64_t stride, auto for_columns) {
    scale(one, r, to, stride, fetching<1>(soon, r, for_columns));
  });
}

// kRows rows of p = a * b: each row's sum of p * col_factor, and p * row_factor added to col_sum.
template <int kRows, class T, class A>
CBAM_INLINE void cross_rows(const Matrix<const T>& a, const Matrix<const T>& b, int64_t r,
                            const A* row_factor, const A* col_factor, A* row_sum, A* col_sum) {
  const OfRows<kRows, A> own(row_factor + r);
  for (int i = 0; i < kRows; ++i) row_sum[r + i] = A(0);
  for (int64_t begin = 0; begin < a.cols; begin += kColumnTile) {
    const int64_t n = a.cols - begin < kColumnTile ? a.cols - begin : kColumnTile;
    vec_t<A> sum[kRows] = {};
    for_row_vectors<A>(begin, begin + n, [&](int64_t j, auto lanes) {
      const vec_t<A> f = lanes.load(col_factor + j);
      vec_t<A> column = lanes.load(col_sum + j);
      for (int i = 0; i < kRows; ++i) {
        // Short rows side by side are no streams that a processor foresees. 16 bits arrive in time.
        if constexpr (sizeof(T) >= 4) {
          __builtin_prefetch(a.row(r + kRows + i) + j);
          __builtin_prefetch(b.row(r + kRows + i) + j);
        }
        const vec_t<A> p = lanes.load(a.row(r + i) + j) * lanes.load(b.row(r + i) + j);
        sum[i] += p * f;
        column += p * own[i];
      }
      lanes.store(col_sum + j, column);
    });
    A sums[kRows];
    sums_of_lanes<A>(sum, sums);
    for (int i = 0; i < kRows; ++i) row_sum[r + i] += sums[i];
  }
}

// With p = a * b over rows [begin, end): row_sum[r] = sum_j p[r][j] * col_factor[j], and
// col_sum[j] = sum_r p[r][j] * row_factor[r]; kRows rows are walked together.
template <int kRows, class T, class A = acc_t<T>>
void cross_sums(const Matrix<const T>& a, const Matrix<const T>& b, int64_t begin, int64_t end,
                const A* row_factor, const A* col_factor, A* row_sum, A* col_sum) {
  for (int64_t j = 0; j < a.cols; ++j) col_sum[j] = A(0);
  for_rows<kRows>(begin, end, [&](auto together, int64_t r) {
    cross_rows<decltype(together)::value>(a, b, r, row_factor, col_factor, row_sum, col_sum);
  });
}

// sums[i] = sum_j of row r + i of m times weight(j, lanes)(i), for kRows rows.
template <int kRows, class T, class Weight>
CBAM_INLINE void weighted_sums(const Matrix<const T>& m, int64_t r, Weight weight, acc_t<T>* sums) {
  using A = acc_t<T>;
  for (int i = 0; i < kRows; ++i) sums[i] = A(0);
  for (int64_t begin = 0; begin < m.cols; begin += kSumBlock) {
    const int64_t end = m.cols - begin < kSumBlock ? m.cols : begin + kSumBlock;
    vec_t<A> sum[kRows] = {};
    for_row_vectors<A>(begin, end, [&](int64_t j, auto lanes) {
      const auto of_column = weight(j, lanes);
      for (int i = 0; i < kRows; ++i) sum[i] += lanes.load(m.row(r + i) + j) * of_column(i);
    });
    A of_block[kRows];
    sums_of_lanes<A>(sum, of_block);
    for (int i = 0; i < kRows; ++i) sums[i] += of_block[i];
  }
}

// to[j] += factor * row[j]
template <class T>
void add_scaled(const T* row, acc_t<T> factor, acc_t<T>* to, int64_t cols) {
  using A = acc_t<T>;
  for_row_vectors<A>(0, cols, [&](int64_t j, auto lanes) {
    lanes.store(to + j, lanes.load(to + j) + factor * lanes.load(row + j));
  });
}

// kRows rows of out(k)[j] = sum over r, in its order, of factor(r, k) * matrix[r][j], for kVectors
// vectors of columns from j on.
template <int kRows, int kVectors, class W, class Factor, class Out, class L>
CBAM_INLINE void combine_some(int64_t rows, int64_t k, Factor factor, const W* matrix, int64_t cols,
                              int64_t j, L lanes, Out out) {
  using A = acc_t<W>;
  vec_t<A> sum[kRows][kVectors] = {};
  for (int64_t r = 0; r < rows; ++r) {
    vec_t<A> v[kVectors];
    for (int i = 0; i < kVectors; ++i) v[i] = lanes.load(matrix + r * cols + j + i * kLanes<A>);
    for (int row = 0; row < kRows; ++row) {
      const A f = factor(r, k + row);
      for (int i = 0; i < kVectors; ++i) sum[row][i] += f * v[i];
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int i = 0; i < kVectors; ++i) lanes.store(out(k + row) + j + i * kLanes<A>, sum[row][i]);
}

// Combinations [begin, end) of the rows of matrix [rows, cols]: sums stay in registers.
template <class W, class Factor, class Out>
void combine(int64_t begin, int64_t end, int64_t rows, Factor factor, const W* matrix, int64_t cols,
             Out out) {
  using A = acc_t<W>;
  constexpr int kMost = 4, kVectors = 2;
  for (int64_t k = begin; k < end; k += kMost)
    for_count<kMost>(end - k < kMost ? end - k : kMost, [&](auto some) {
      constexpr int kRows = decltype(some)::value;
      int64_t j = 0;
      for (; j + kVectors * kLanes<A> <= cols; j += kVectors * kLanes<A>)
        combine_some<kRows, kVectors>(rows, k, factor, matrix, cols, j, AllLanes<A>{}, out);
      for_vectors<A>(cols - j, [&](int64_t i, auto lanes) {
        combine_some<kRows, 1>(rows, k, factor, matrix, cols, j + i, lanes, out);
      });
    });
}

}  // namespace
}  // namespace cbam::cpu
