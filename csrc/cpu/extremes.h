// Sums and maxima along the rows and down the columns of a sample, seen as a matrix, and where the
// maxima stand.
#pragma once

#include "fold.h"
#include "rows.h"

namespace cbam::cpu {
namespace {

// Fixed sizes of partial sums: they, not the number of threads, decide the order of every sum.
constexpr int64_t kColumnTile = 512;
constexpr int64_t kRowBlock = 32;
constexpr int64_t kSumBlock = 4096;

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

// What the lanes have of a row: sums, maxima and with kArgmax the first columns of
// the maxima.
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
    vec_t<A> v = in_register(lanes.load(row + j));
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

// The same of a whole row, block after block.
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
CBAM_INLINE void fold_rows(const Matrix<const T>& m, int64_t r, int64_t col,
                           const OfRows<kRows, A>& factor, L lanes, A* sum, A* max,
                           index_t<A>* argmax) {
  vec_t<A> v[kRows], best = load(max);
  for (int i = 0; i < kRows; ++i) {
    v[i] = in_register(lanes.load(m.row(r + i) + col));
    if constexpr (kScaled) v[i] *= factor[i];
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
  const int64_t whole = in_whole_vectors<A>(cols);
  for (int64_t j = 0; j < whole; ++j) {
    sum[j] = A(0);
    max[j] = minus_infinity<A>();
    if constexpr (kArgmax) argmax[j] = static_cast<index_t<A>>(begin);
  }
  for_rows<kRows>(begin, end, [&](auto together, int64_t r) {
    constexpr int kSome = decltype(together)::value;
    OfRows<kSome, A> some;
    if constexpr (kScaled) some = OfRows<kSome, A>(factor + r);
    for_slots<A>(cols, [&](int64_t slot, int64_t j, auto lanes) {
      fold_rows<kSome, kScaled, kArgmax>(m, r, col + j, some, lanes, sum + slot, max + slot,
                                         argmax + slot);
    });
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

}  // namespace
}  // namespace cbam::cpu
