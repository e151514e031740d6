// Passes over one sample, seen as a matrix of rows whose columns lie side by side in memory:
// channels x pixels where channels come first, pixels x channels where they come last. What a pass
// over space is in one layout is a pass over channels in the other, so each is written once.
#pragma once

#include "fold.h"
#include "lanes.h"

namespace cbam::cpu {
namespace {

// Fixed sizes of partial sums: they, not the number of threads, decide the order of every sum.
constexpr int64_t kColumnTile = 512;
constexpr int64_t kRowBlock = 32;
constexpr int64_t kSumBlock = 4096;
// Rows that share what is loaded for each column.
constexpr int kRowsTogether = 4;

template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, stride;

  CBAM_INLINE_MEMBER T* row(int64_t r) const { return data + r * stride; }

  // Whether every row begins and ends on the bounds of vectors.
  bool whole_vectors() const {
    constexpr int64_t kVector = kLanes<acc_t<T>>;
    return reinterpret_cast<uintptr_t>(data) % (kVector * sizeof(T)) == 0 &&
           stride % kVector == 0 && cols % kVector == 0;
  }
};

template <class A>
struct Extremes {
  A sum, max;
  int64_t argmax;
};

// Sums and maxima are made as if there were no NaN, which loses every comparison but shows in the
// sum. Only then is it looked for: the first i in [begin, end) for which value(i) is NaN, or `end`.
template <class Value>
int64_t first_nan(int64_t begin, int64_t end, Value value) {
  for (int64_t i = begin; i < end; ++i)
    if (const auto v = value(i); v != v) return i;
  return end;
}

// What the lanes have of a row: sums, maxima and with kArgmax the first columns of these.
template <class A>
struct OfLanes {
  vec_t<A> sum, max;
  ivec_t<A> column;
};

// Of row[j] * factor[j] for columns [begin, end).
template <bool kScaled, bool kArgmax, class T, class A = acc_t<T>>
CBAM_INLINE OfLanes<A> lanes_of_block(const T* row, const acc_t<T>* factor, int64_t begin,
                                      int64_t end) {
  constexpr int kUnroll = 4, kStep = kUnroll * kLanes<A>;
  vec_t<A> sum[kUnroll] = {}, max[kUnroll];
  for (auto& m : max) m = splat(minus_infinity<A>());
  ivec_t<A> at[kUnroll] = {};  // lane l of max[u] stood in column at[u] + l
  const auto add = [&](int u, int64_t j, auto lanes) {
    vec_t<A> v = lanes.load(row + j);
    if constexpr (kScaled) v *= lanes.load(factor + j);
    sum[u] += v;
    v = lanes.or_else(v, splat(minus_infinity<A>()));
    if constexpr (kArgmax) {
      const ivec_t<A> column = ivec_t<A>{} + static_cast<index_t<A>>(j - lanes.skipped());
      at[u] = v > max[u] ? column : at[u];
    }
    max[u] = maximum<A>(v, max[u]);
  };
  int64_t j = begin;
  for (; j + kStep <= end; j += kStep)
    for (int u = 0; u < kUnroll; ++u) add(u, j + u * kLanes<A>, AllLanes<A>{});
  for_row_vectors<A>(j, end, [&](int64_t i, auto lanes) { add(0, i, lanes); });
  OfLanes<A> r{sum[0], max[0], at[0]};
  if (end - begin >= kStep) {
    r.sum = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    r.max = maximum<A>(maximum<A>(max[0], max[1]), maximum<A>(max[2], max[3]));
    r.column = largest_index<A>();
    for (int u = 0; u < kUnroll; ++u)
      r.column = (max[u] == r.max) & (at[u] < r.column) ? at[u] : r.column;
  }
  r.column += iota<A>();
  return r;
}

template <bool kScaled, bool kArgmax, class T, class A = acc_t<T>>
CBAM_INLINE OfLanes<A> lanes_of_row(const T* row, const acc_t<T>* factor, int64_t cols) {
  OfLanes<A> r =
      lanes_of_block<kScaled, kArgmax>(row, factor, 0, cols < kSumBlock ? cols : kSumBlock);
  for (int64_t begin = kSumBlock; begin < cols; begin += kSumBlock) {
    const int64_t end = cols - begin < kSumBlock ? cols : begin + kSumBlock;
    const auto block = lanes_of_block<kScaled, kArgmax>(row, factor, begin, end);
    r.sum += block.sum;
    r.column = block.max > r.max ? block.column : r.column;
    r.max = maximum<A>(block.max, r.max);
  }
  return r;
}

// Of kRows rows from r on: sum and maximum of row[j] * factor[j], and with kArgmax the first column
// of the maximum. Without kArgmax a NaN shows in the sum alone.
template <int kRows, bool kScaled, bool kArgmax, class T>
CBAM_INLINE void reduce_rows(const Matrix<const T>& m, int64_t r, const acc_t<T>* factor,
                             Extremes<acc_t<T>> (&of)[kRows]) {
  using A = acc_t<T>;
  vec_t<A> sum[kRows], max[kRows];
  ivec_t<A> column[kRows];
  for (int i = 0; i < kRows; ++i) {
    const auto lanes = lanes_of_row<kScaled, kArgmax>(m.row(r + i), factor, m.cols);
    sum[i] = lanes.sum;
    max[i] = lanes.max;
    column[i] = lanes.column;
  }
  A sums[kRows], maxima[kRows];
  sums_of_lanes<A>(sum, sums);
  maxima_of_lanes<A>(max, maxima);
  for (int i = 0; i < kRows; ++i) of[i] = {sums[i], maxima[i], 0};
  if constexpr (kArgmax) {
    for (int i = 0; i < kRows; ++i)
      column[i] = max[i] == maxima[i] ? column[i] : largest_index<A>();
    index_t<A> first[kRows];
    minima_of_lanes<A>(column, first);
    for (int i = 0; i < kRows; ++i) {
      of[i].argmax = first[i];
      if (sums[i] == sums[i]) continue;
      const T* row = m.row(r + i);
      const int64_t nan = first_nan(0, m.cols, [&](int64_t j) {
        return kScaled ? load_one(row + j) * factor[j] : load_one(row + j);
      });
      if (nan < m.cols) of[i] = {sums[i], sums[i], nan};
    }
  }
}

template <class A>
A sum_of_row(const A* row, int64_t cols) {
  A sum[1];
  sums_of_lanes<A>({lanes_of_row<false, false>(row, nullptr, cols).sum}, sum);
  return sum[0];
}

// kRows rows at once into one vector of columns.
template <int kRows, bool kScaled, bool kArgmax, class T, class A, class L>
CBAM_INLINE void fold_rows(const Matrix<const T>& m, int64_t r, int64_t col, const A* factor,
                           L lanes, A* sum, A* max, index_t<A>* argmax) {
  vec_t<A> v[kRows], best = load(max);
  for (int i = 0; i < kRows; ++i) {
    v[i] = lanes.load(m.row(r + i) + col);
    if constexpr (kScaled) v[i] *= factor[r + i];
  }
  if constexpr (kArgmax) {
    ivec_t<A> index;
    __builtin_memcpy(&index, argmax, sizeof index);
    for (int i = 0; i < kRows; ++i) {
      index = v[i] > best ? ivec_t<A>{} + static_cast<index_t<A>>(r + i) : index;
      best = maximum<A>(v[i], best);
    }
    __builtin_memcpy(argmax, &index, sizeof index);
  } else {
    for (int i = 0; i < kRows; ++i) best = maximum<A>(v[i], best);
  }
  store(max, best);
  for (int width = kRows / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  store(sum, load(sum) + v[0]);
}

// Per column of [col, col + cols): sum, maximum and with kArgmax the first row of the maximum of
// m[r][c] * factor[r] over rows [begin, end). cols <= kColumnTile; the outputs hold kColumnTile.
template <bool kScaled, bool kArgmax, class T>
void reduce_columns(const Matrix<const T>& m, int64_t begin, int64_t end, int64_t col, int64_t cols,
                    const acc_t<T>* factor, acc_t<T>* sum, acc_t<T>* max,
                    index_t<acc_t<T>>* argmax) {
  using A = acc_t<T>;
  constexpr int kRows = 8;
  // Of whole vectors: their last lanes are made, and not read.
  const int64_t whole = (cols + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  for (int64_t j = 0; j < whole; ++j) {
    sum[j] = A(0);
    max[j] = minus_infinity<A>();
    if constexpr (kArgmax) argmax[j] = static_cast<index_t<A>>(begin);
  }
  int64_t r = begin;
  for (; r + kRows <= end; r += kRows)
    for_slots<A>(cols, [&](int64_t slot, int64_t j, auto lanes) {
      fold_rows<kRows, kScaled, kArgmax>(m, r, col + j, factor, lanes, sum + slot, max + slot,
                                         argmax + slot);
    });
  for (; r < end; ++r)
    for_slots<A>(cols, [&](int64_t slot, int64_t j, auto lanes) {
      fold_rows<1, kScaled, kArgmax>(m, r, col + j, factor, lanes, sum + slot, max + slot,
                                     argmax + slot);
    });
  settle_slots<A>(sum, cols);
  settle_slots<A>(max, cols);
  if constexpr (kArgmax) {
    settle_slots<A>(argmax, cols);
    for (int64_t j = 0; j < cols; ++j) {
      if (sum[j] == sum[j]) continue;
      const int64_t nan = first_nan(begin, end, [&](int64_t row) {
        const A v = load_one(m.row(row) + col + j);
        return kScaled ? v * factor[row] : v;
      });
      if (nan == end) continue;
      max[j] = sum[j];
      argmax[j] = static_cast<index_t<A>>(nan);
    }
  }
}

// out[r][j] = x[r][j] * row_factor[r] * col_factor[j] for rows [begin, end); `streamed`: past the
// caches. What stands `ahead` elements after x is read next: memory is slower than these stores.
template <class T, class A = acc_t<T>>
void scale_rows(const Matrix<const T>& x, const Matrix<T>& out, int64_t begin, int64_t end,
                const A* row_factor, const A* col_factor, bool streamed, int64_t ahead) {
  for (int64_t r = begin; r < end; ++r) {
    const T* in = x.row(r);
    T* to = out.row(r);
    const A f = row_factor[r];
    const auto scale = [&](int64_t j, auto lanes) {
      __builtin_prefetch(in + ahead + j, 0, 2);
      lanes.store(to + j, lanes.load(in + j) * f * lanes.load(col_factor + j));
    };
    if (streamed)
      for_streamed_vectors<A>(x.cols, scale);
    else
      for_vectors_again<A>(x.cols, scale);
  }
  if (streamed) finish_streams();
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
