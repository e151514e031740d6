// The convolution backwards over a box of pixels, from dz around it, by all threads of a block of
// blockDim.x.
//
//   d_maps[m][s]  = sum_k dz[s - k] * weight[m][k]
//   d_weight[m][k] = sum_s maps[m][s] * dz[s - k]      d_bias = sum_s dz[s]
#pragma once

#include "backward.h"
#include "blocks.cuh"

namespace cbam::cuda {

// dz at index i of what is staged. Where a row of the kernel ends, what lies behind it is read and
// dropped: behind all of it, zeros.
template <class A>
__device__ __forceinline__ void stage_dz(const Box& box, int i, A value, A* dz) {
  dz[i] = value;
  if (i < kTapsTogether - 1) dz[box.staged + i] = A(0);
}

// Both maps of a pixel, which is place `place` of `count`: `maps` is x's dtype [2, pixels] of the
// sample, `to` is [2, count].
template <class T, class A>
__device__ __forceinline__ void stage_saved_maps(const Space& s, const T* maps, int pixel,
                                                 int place, int count, A* to) {
  to[place] = A(widen(maps[pixel]));
  to[count + place] = A(widen(maps[s.pixels() + pixel]));
}

// Both maps' gradients of kRun neighbours of a row of the box, from x on: the kernel, turned
// around, over dz, every value of which is read once for all.
template <class A>
__device__ __forceinline__ void correlate_back(const Box& box, const Space& s, const A* dz,
                                               const A* weights, int z, int y, int x,
                                               A (&mean)[kRun], A (&max)[kRun]) {
  const int taps = s.taps();
  const A* weight = weights + taps - 1;
  for (int kz = 0; kz < s.kernel_depth; ++kz)
    for (int ky = 0; ky < s.kernel_height; ++ky) {
      const A* row = dz + box.at(z + kz, y + ky, x);
      A window[kRun];
#pragma unroll
      for (int i = 0; i < kRun - 1; ++i) window[i] = row[i];
#pragma unroll 4
      for (int kx = 0; kx < s.kernel_width; ++kx, --weight) {
        window[kRun - 1] = row[kx + kRun - 1];
        const A of_mean = weight[0], of_max = weight[taps];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          mean[i] += window[i] * of_mean;
          max[i] += window[i] * of_max;
        }
#pragma unroll
        for (int i = 0; i < kRun - 1; ++i) window[i] = window[i + 1];
      }
    }
}

// put(pixel of the image, d_maps[0], d_maps[1]) for every pixel of the box.
template <class A, class Put>
__device__ __forceinline__ void map_gradients(const Box& box, const Space& s, const A* dz,
                                              const A* weights, Put put) {
  const int runs = (box.width + kRun - 1) / kRun;
  for (int i = threadIdx.x; i < runs * box.height * box.depth; i += blockDim.x) {
    const int x = i % runs * kRun, y = i / runs % box.height, z = i / runs / box.height;
    A mean[kRun] = {}, max[kRun] = {};
    correlate_back(box, s, dz, weights, z, y, x, mean, max);
#pragma unroll
    for (int k = 0; k < kRun; ++k)
      if (x + k < box.width) put(box.pixel(s, z, y, x + k), mean[k], max[k]);
  }
}

// Places of a box that follow each other, of which a lane takes every 32nd.
class LanePlaces {
 public:
  __device__ __forceinline__ LanePlaces(const Box& box, int first, int count)
      : box_(box),
        count_(count),
        number_(static_cast<int>(threadIdx.x) % 32),
        place_(box.width, box.height, first + number_, 32) {}
  __device__ __forceinline__ bool inside() const { return number_ < count_; }
  __device__ __forceinline__ int number() const { return number_; }
  __device__ __forceinline__ int at() const { return box_.at(place_.z, place_.y, place_.x); }
  __device__ __forceinline__ void next() {
    number_ += 32;
    place_.next();
  }

 private:
  const Box& box_;
  int count_, number_;
  Places place_;
};

// These places' share of the bias's gradient, by a warp.
template <class A>
__device__ __forceinline__ void bias_gradient(LanePlaces place, const A* centre, A* out) {
  A sum = A(0);
  for (; place.inside(); place.next()) sum += centre[place.at()];
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) *out = sum;
}

// The share of all gradients that `count` places of the box have, from its place `first` on: a few
// taps of both maps or the bias to each warp. `maps` is [2, count], `out` [2 * taps + 1], the bias
// last.
template <class A>
__device__ __forceinline__ void weight_gradients(const Box& box, int first, int count,
                                                 const Space& s, const A* dz, const A* maps,
                                                 A* out) {
  const int taps = s.taps(), lane = threadIdx.x % 32, warps = static_cast<int>(blockDim.x) / 32;
  const int runs = (s.kernel_width + kTapsTogether - 1) / kTapsTogether;
  const int shares = runs * s.kernel_height * s.kernel_depth;
  const A* centre = dz + box.at(s.kernel_depth / 2, s.kernel_height / 2, s.kernel_width / 2);
  for (int share = threadIdx.x / 32; share <= shares; share += warps) {
    if (share == shares) {
      bias_gradient(LanePlaces(box, first, count), centre, out + 2 * taps);
      continue;
    }
    // Of the kernel turned around.
    const int row = share / runs, column = share % runs * kTapsTogether;
    const A* shifted = dz + box.at(row / s.kernel_height, row % s.kernel_height, column);
    A sum[2 * kTapsTogether] = {};
#pragma unroll 2
    for (LanePlaces place(box, first, count); place.inside(); place.next()) {
      const A mean = maps[place.number()], max = maps[count + place.number()];
      const A* d = shifted + place.at();
#pragma unroll
      for (int k = 0; k < kTapsTogether; ++k) {
        sum[k] += mean * d[k];
        sum[kTapsTogether + k] += max * d[k];
      }
    }
    const A total = sums_of_warp(sum);
    const int map = lane / kTapsTogether, tap = column + lane % kTapsTogether;
    if (map < 2 && tap < s.kernel_width)
      out[(map + 1) * taps - 1 - (row * s.kernel_width + tap)] = total;
  }
}

}  // namespace cbam::cuda
