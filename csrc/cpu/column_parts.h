// Sums and maxima down the columns of a sample, seen as a matrix, by parts of its rows: threads
// share the parts, and the last step adds what these have in their order.
#pragma once

#include "extremes.h"
#include "schedule.h"

namespace cbam::cpu {
namespace {

template <class T>
class ColumnParts {
 public:
  using A = acc_t<T>;
  using Index = index_t<A>;

  // A single part has no results of its own.
  ColumnParts(int64_t rows, int64_t cols, int64_t rows_of_part)
      : rows_(rows_of_part),
        count_((rows + rows_of_part - 1) / rows_of_part),
        pitch_(in_whole_vectors<A>(cols)) {}

  // What each part has of each column: [parts, columns in whole vectors].
  struct Results {
    A* sum;
    A* max;
    Index* argmax;
  };
  Results carve(Carver& carver) const {
    const int64_t results = count_ > 1 ? count_ * pitch_ : 0;
    A* sum = carver.array<A>(results);
    A* max = carver.array<A>(results);
    return {sum, max, carver.array<Index>(results)};
  }

  // The parts of m[r][c] * factor[r], where there are several.
  template <bool kScaled, bool kArgmax>
  void reduce(const Matrix<const T>& m, const A* factor, const Results& to, const Run& run) const {
    if (count_ == 1) return;
    const int64_t tiles = (m.cols + kColumnTile - 1) / kColumnTile;
    run(count_, [&](int64_t first, int64_t last) {
      A sum[kColumnTile], max[kColumnTile];
      Index argmax[kColumnTile];
      for (int64_t i = first * tiles; i < last * tiles; ++i) {
        const int64_t begin = i / tiles * rows_, col = i % tiles * kColumnTile;
        const int64_t end = m.rows - begin < rows_ ? m.rows : begin + rows_;
        const int64_t cols = m.cols - col < kColumnTile ? m.cols - col : kColumnTile;
        reduce_columns<kScaled, kArgmax>(m, begin, end, col, cols, factor, sum, max, argmax);
        const int64_t at = i / tiles * pitch_ + col;
        const int64_t whole = pitch_ - col < kColumnTile ? pitch_ - col : kColumnTile;
        std::memcpy(to.sum + at, sum, whole * sizeof(A));
        std::memcpy(to.max + at, max, whole * sizeof(A));
        if constexpr (kArgmax) std::memcpy(to.argmax + at, argmax, whole * sizeof(Index));
      }
    });
  }

  // What all rows have of columns [begin, begin + count), at most kColumnTile; the outputs hold so
  // many.
  template <bool kScaled, bool kArgmax>
  void merge(const Matrix<const T>& m, const A* factor, const Results& of, int64_t begin,
             int64_t count, A* sum, A* max, Index* argmax) const {
    if (count_ == 1)
      return reduce_columns<kScaled, kArgmax>(m, 0, m.rows, begin, count, factor, sum, max, argmax);
    for (int64_t j = 0; j < count; j += kLanes<A>) {
      const int64_t at = begin + j;
      vec_t<A> total = load(of.sum + at), best = load(of.max + at);
      ivec_t<A> place{};
      if constexpr (kArgmax) __builtin_memcpy(&place, of.argmax + at, sizeof place);
      for (int64_t i = at + pitch_; i < count_ * pitch_; i += pitch_) {
        total += load(of.sum + i);
        const vec_t<A> v = load(of.max + i);
        if constexpr (kArgmax) {
          ivec_t<A> index;
          __builtin_memcpy(&index, of.argmax + i, sizeof index);
          const auto takes = takes_maximum(v, best);
          place = takes ? index : place;
          best = takes ? v : best;
        } else {
          best = maximum<A>(v, best);
        }
      }
      store(sum + j, total);
      store(max + j, best);
      if constexpr (kArgmax) __builtin_memcpy(argmax + j, &place, sizeof place);
    }
  }

 private:
  int64_t rows_, count_, pitch_;
};

}  // namespace
}  // namespace cbam::cpu
