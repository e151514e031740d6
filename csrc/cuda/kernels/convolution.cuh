// The spatial gate of a box of pixels, from the maps around it, by all threads of a block of
// blockDim.x.
//
//   gate[s] = sigmoid(sum over m, k of weight[m][k] * maps[m][s + k] + bias)
#pragma once

#include "blocks.cuh"

namespace cbam::cuda {

// Both maps of the box and its halo, as far as their pixels are among [first, end), and with the
// first of them zeros outside the image. maps_at(pixel, inside, mean, max) sets the two values;
// `inside` tells a pixel of the box from one of its halo.
template <class A, class MapsAt>
__device__ __forceinline__ void stage_maps(const Box& box, const Space& s, int first, int end,
                                           A* staged, MapsAt maps_at) {
  for_staged_pixels(box, s, [&](int i, const StagedPixel& at) {
    const bool outside = at.pixel < 0;
    if (outside ? first > 0 : at.pixel < first || at.pixel >= end) return;
    A mean = A(0), max = A(0);
    if (!outside) maps_at(at.pixel, at.inside, mean, max);
    staged[i] = mean;
    staged[box.staged + i] = max;
  });
}

// What backward reads of a pixel's maps: x's dtype [samples, 2, pixels].
template <class T>
__device__ __forceinline__ void save_maps(void* maps, int64_t sample, int pixels, int pixel,
                                          acc_t<T> mean, acc_t<T> max) {
  T* saved = static_cast<T*>(maps) + sample * 2 * pixels + pixel;
  saved[0] = narrow<T>(mean);
  saved[pixels] = narrow<T>(max);
}

// Weights of the convolution, and behind them the bias.
template <class T, class A>
__device__ __forceinline__ void stage_conv_weights(const void* weights, const void* bias,
                                                   DType dtype, const Space& s, A* to) {
  const int count = 2 * s.taps();
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = weight_at<T>(weights, dtype, i);
  if (threadIdx.x == 0) to[count] = bias ? weight_at<T>(bias, dtype, 0) : A(0);
}

// kCount neighbours of a row of the box, from x on: every value of the maps is read once for all.
template <int kCount, class A>
__device__ __forceinline__ void correlate_run(const Box& box, const Space& s, const A* staged,
                                              const A* weight, int z, int y, int x,
                                              A (&sum)[kCount]) {
  for (int m = 0; m < 2; ++m)
    for (int kz = 0; kz < s.kernel_depth; ++kz)
      for (int ky = 0; ky < s.kernel_height; ++ky) {
        const A* row = staged + m * box.staged + box.at(z + kz, y + ky, 0);
        A window[kCount];
#pragma unroll
        for (int i = 0; i < kCount - 1; ++i) window[i] = row[x + i];
#pragma unroll 4
        for (int kx = 0; kx < s.kernel_width; ++kx) {
          window[kCount - 1] = row[x + kx + kCount - 1];
          const A w = *weight++;
#pragma unroll
          for (int i = 0; i < kCount; ++i) sum[i] += w * window[i];
#pragma unroll
          for (int i = 0; i < kCount - 1; ++i) window[i] = window[i + 1];
        }
      }
}

// put(index within the box, pixel of the image, gate) for every pixel of the box, kCount neighbours
// to a thread, at most kRun: fewer where there are threads for them.
template <int kCount = kRun, class A, class Put>
__device__ __forceinline__ void gate_box(const Box& box, const Space& s, const A* staged,
                                         const A* weight, Put put) {
  const A bias = weight[2 * s.taps()];
  const int runs = (box.width + kCount - 1) / kCount;
  for (int i = threadIdx.x; i < runs * box.height * box.depth; i += blockDim.x) {
    const int x = i % runs * kCount, y = i / runs % box.height, z = i / runs / box.height;
    A sum[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum[k] = bias;
    correlate_run(box, s, staged, weight, z, y, x, sum);
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (x + k < box.width)
        put((z * box.height + y) * box.width + x + k, box.pixel(s, z, y, x + k), sigmoid(sum[k]));
  }
}

}  // namespace cbam::cuda
