// The k-tap "same" convolution over the maps of one sample in 1, 2 or 3 dimensions, and its two
// derivatives. Maps live in padded planes: rows of zeros are skipped, columns of zeros are stored.
#pragma once

#include "../problem.h"
#include "reduce.h"

namespace cbam::cpu {
namespace {

// A plane holds depth * height image rows of `pitch` elements; pixel w of a row stands at
// pad_width + w. The pitch leaves room to read a whole vector at any tap of any pixel.
template <class A>
struct Planes {
  const Shape& shape;
  int64_t pad_depth, pad_height, pad_width, pitch;

  explicit Planes(const Shape& s)
      : shape(s),
        pad_depth(s.kernel_depth / 2),
        pad_height(s.kernel_height / 2),
        pad_width(s.kernel_width / 2),
        pitch(in_whole_vectors<A>(s.width) + s.kernel_width - 1) {}

  int64_t image_rows() const { return shape.depth * shape.height; }
  int64_t size() const { return image_rows() * pitch; }

  // Pixels [begin, end) of one map into its plane.
  void insert(const A* values, int64_t begin, int64_t end, A* plane) const {
    while (begin < end) {
      const int64_t row = begin / shape.width, w = begin % shape.width;
      const int64_t n = shape.width - w < end - begin ? shape.width - w : end - begin;
      std::memcpy(plane + row * pitch + pad_width + w, values, n * sizeof(A));
      values += n;
      begin += n;
    }
  }

  // Calls body(input row, first tap of its kernel row) for the kernel rows that meet the image.
  template <class Body>
  CBAM_INLINE_MEMBER void for_kernel_rows(int64_t image_row, Body body) const {
    const int64_t d0 = image_row / shape.height - pad_depth;
    const int64_t h0 = image_row % shape.height - pad_height;
    for (int64_t kd = 0; kd < shape.kernel_depth; ++kd) {
      if (d0 + kd < 0 || d0 + kd >= shape.depth) continue;
      for (int64_t kh = 0; kh < shape.kernel_height; ++kh) {
        if (h0 + kh < 0 || h0 + kh >= shape.height) continue;
        body((d0 + kd) * shape.height + h0 + kh,
             (kd * shape.kernel_height + kh) * shape.kernel_width);
      }
    }
  }
};

// kVectors vectors of one image row, from pixel w on:
// acc[p] = sum over planes m and taps t of weight[m][t] * plane[m][p + t - pad]
template <int kVectors, class A>
CBAM_INLINE void correlate_vectors(const Planes<A>& g, const A* planes, int64_t count,
                                   const A* weight, int64_t image_row, int64_t w, A bias, A* out,
                                   int64_t n) {
  vec_t<A> acc[kVectors];
  for (auto& a : acc) a = splat(bias);
  for (int64_t m = 0; m < count; ++m)
    g.for_kernel_rows(image_row, [&](int64_t row, int64_t tap) {
      const A* in = planes + m * g.size() + row * g.pitch + w;
      const A* wt = weight + m * g.shape.taps() + tap;
      for (int64_t kw = 0; kw < g.shape.kernel_width; ++kw)
        for (int v = 0; v < kVectors; ++v) acc[v] += wt[kw] * load(in + kw + v * kLanes<A>);
    });
  for (int v = 0; v < kVectors; ++v) {
    const int64_t rest = n - v * kLanes<A>;
    if (rest >= kLanes<A>)
      store(out + v * kLanes<A>, acc[v]);
    else
      store_first(out + v * kLanes<A>, acc[v], rest);
  }
}

// One image row of the correlation of `count` planes with weight [count, taps], plus bias.
template <class A>
void correlate_row(const Planes<A>& g, const A* planes, int64_t count, const A* weight, A bias,
                   int64_t image_row, A* out) {
  constexpr int kMost = 8;  // accumulators in flight: enough to hide the latency of an addition
  const int64_t width = g.shape.width;
  for (int64_t w = 0; w < width; w += kMost * kLanes<A>) {
    const int64_t n = width - w < kMost * kLanes<A> ? width - w : kMost * kLanes<A>;
    const int64_t vectors = (n + kLanes<A> - 1) / kLanes<A>;
    auto run = [&](auto v) {
      correlate_vectors<decltype(v)::value>(g, planes, count, weight, image_row, w, bias, out + w,
                                            n);
    };
    for_count<kMost>(vectors, run);
  }
}

// kTaps taps of one kernel row (kd, kh), from kw on, over the whole image in blocks of about
// kSumBlock pixels.
template <int kTaps, class A>
CBAM_INLINE void tap_gradients(const Planes<A>& g, const A* dz, const A* plane, int64_t kd,
                               int64_t kh, int64_t kw, A* out) {
  const int64_t width = g.shape.width, rows = g.image_rows();
  const int64_t rows_of_block = width < kSumBlock ? kSumBlock / width : 1;
  vec_t<A> total[kTaps] = {};
  for (int64_t first = 0; first < rows; first += rows_of_block)
    for (int64_t begin = 0; begin < width; begin += kSumBlock) {
      const int64_t last = first + rows_of_block < rows ? first + rows_of_block : rows;
      const int64_t end = begin + kSumBlock < width ? begin + kSumBlock : width;
      vec_t<A> sum[kTaps] = {};
      for (int64_t row = first; row < last; ++row) {
        const int64_t d = row / g.shape.height + kd - g.pad_depth;
        const int64_t h = row % g.shape.height + kh - g.pad_height;
        if (d < 0 || d >= g.shape.depth || h < 0 || h >= g.shape.height) continue;
        const A* z = dz + row * g.pitch + g.pad_width;
        const A* in = plane + (d * g.shape.height + h) * g.pitch + kw;
        for (int64_t w = begin; w < end; w += kLanes<A>) {
          const vec_t<A> v = load(z + w);
          for (int t = 0; t < kTaps; ++t) sum[t] += v * load(in + w + t);
        }
      }
      for (int t = 0; t < kTaps; ++t) total[t] += sum[t];
    }
  sums_of_lanes<A>(total, out);
}

// weight_grad[t] = sum_p dz[p] * plane[p + t - pad] for the taps t of one kernel row. dz is a
// plane, too: what lies beyond a row of it is zero.
template <class A>
void weight_gradient(const Planes<A>& g, const A* dz, const A* plane, int64_t kernel_row,
                     A* weight_grad) {
  constexpr int kMost = 8;
  const int64_t kd = kernel_row / g.shape.kernel_height, kh = kernel_row % g.shape.kernel_height;
  for (int64_t kw = 0; kw < g.shape.kernel_width; kw += kMost) {
    const int64_t left = g.shape.kernel_width - kw;
    A* out = weight_grad + kernel_row * g.shape.kernel_width + kw;
    for_count<kMost>(left < kMost ? left : kMost, [&](auto taps) {
      tap_gradients<decltype(taps)::value>(g, dz, plane, kd, kh, kw, out);
    });
  }
}

}  // namespace
}  // namespace cbam::cpu
