// A sample as a matrix of rows whose columns lie side by side in memory - channels x pixels where
// channels come first, pixels x channels where they come last - and how its rows are written.
#pragma once

#include "../problem.h"
#include "lanes.h"

namespace cbam::cpu {
namespace {

// Rows that are walked, or folded, together.
constexpr int kRowsTogether = 4;
// Elements that are kept aside at most, until they make whole vectors: of the nearest cache.
constexpr int64_t kAside = 2048;

// Asks for what is read soon.
CBAM_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, stride;

  CBAM_INLINE_MEMBER T* row(int64_t r) const { return data + r * stride; }

  // The fewest rows that fill whole vectors in memory, counted from the first row; 0 if none do, or
  // only more than can be kept aside.
  int64_t rows_of_whole_vectors() const {
    constexpr int64_t kVector = kLanes<acc_t<T>>, kRegister = kVectorBytes / sizeof(T);
    if (reinterpret_cast<uintptr_t>(data) % kVectorBytes) return 0;
    if (stride % kVector == 0 && cols % kVector == 0) return 1;
    int64_t together = 2;
    while (together * cols % kRegister) together *= 2;
    return stride == cols && together * cols <= kAside ? together : 0;
  }
};

// Sample n of a tensor of x's size.
template <class E>
Matrix<E> sample_of(E* base, const Shape& shape, const Strides& s, int64_t n) {
  E* data = base + n * s.sample;
  return s.channels_first() ? Matrix<E>{data, shape.channels, shape.pixels(), s.channel}
                            : Matrix<E>{data, shape.pixels(), shape.channels, s.pixel};
}

// write(Count<n>{}, r, to, stride, for_columns) writes n rows from r on: the first at `to`, each
// `stride` after the one before, by for_columns(columns, body). Calls it for rows [begin, end) of
// `out`, up to kRows at a time.
template <int kRows, class T, class Write>
void write_rows(const Matrix<T>& out, int64_t begin, int64_t end, Write write) {
  for_rows<kRows>(begin, end, [&](auto together, int64_t r) {
    write(together, r, out.row(r), out.stride,
          [](int64_t n, auto body) { for_vectors_again<acc_t<T>>(n, body); });
  });
}

// The same past the caches, as far as whole vectors go: short rows are written aside until they
// make some.
template <int kRows, class T, class Write>
void stream_rows(const Matrix<T>& out, int64_t begin, int64_t end, Write write) {
  using A = acc_t<T>;
  const int64_t group = out.rows_of_whole_vectors();
  if (group == 0) return write_rows<kRows>(out, begin, end, write);
  if (group == 1) {
    for_rows<kRows>(begin, end, [&](auto together, int64_t r) {
      write(together, r, out.row(r), out.stride,
            [](int64_t n, auto body) { for_streamed_vectors<A>(n, body); });
    });
    return finish_streams();
  }
  const int64_t first = (begin + group - 1) / group * group, last = end / group * group;
  if (first >= last) return write_rows<kRows>(out, begin, end, write);
  write_rows<kRows>(out, begin, first, write);
  for (int64_t r = first; r < last; r += group) {
    T aside[kAside];
    const Matrix<T> some{aside, group, out.cols, out.cols};
    write_rows<kRows>(some, 0, group, [&](auto together, int64_t i, auto... where) {
      write(together, r + i, where...);
    });
    for (int64_t j = 0; j < group * out.cols; j += kVectorBytes / sizeof(T))
      stream<kVectorBytes>(out.row(r) + j, aside + j);
  }
  finish_streams();
  write_rows<kRows>(out, last, end, write);
}

// for_columns(columns, body) that before each vector asks for the same columns of kRows rows, from
// r on, of the matrices `soon`.
template <int kRows, int kMatrices, class T, class ForColumns>
CBAM_INLINE auto fetching(const Matrix<const T> (&soon)[kMatrices], int64_t r,
                          ForColumns for_columns) {
  return [&soon, r, for_columns](int64_t columns, auto body) {
    for_columns(columns, [&](int64_t j, auto lanes) {
      for (const auto& m : soon)
        for (int i = 0; i < kRows; ++i) fetch(m.row(r + i) + j);
      body(j, lanes);
    });
  };
}

}  // namespace
}  // namespace cbam::cpu
