// The spatial gate of a box of pixels, from the maps around it, by all threads of a block of
// blockDim.x.
//
//   gate[s] = sigmoid(sum over m, k of weight[m][k] * maps[m][s + k] + bias)
#pragma once

#include "blocks.cuh"

namespace cbam::cuda {

// Both maps of the box and its halo, zeros outside the image. maps_at(pixel, inside, mean, max)
// sets the two values; `inside` tells a pixel of the box from one of its halo.
template <class A, class MapsAt>
__device__ __forceinline__ void stage_maps(const Box& box, const Space& s, A* staged,
                                           MapsAt maps_at) {
  for_staged_pixels(box, s, [&](int i, const StagedPixel& at) {
    A mean = A(0), max = A(0);
    if (at.pixel >= 0) maps_at(at.pixel, at.inside, mean, max);
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
__device__ __forceinline__ void stage_conv_weights(const ConvWeight& weight, const void* bias,
                                                   DType dtype, const Space& s, A* to) {
  const int count = 2 * s.taps();
  for (int i = threadIdx.x; i < count; i += blockDim.x)
    to[i] = weight_at<T>(weight.data, dtype, weight.place(i, s.taps()));
  if (threadIdx.x == 0) to[count] = bias ? weight_at<T>(bias, dtype, 0) : A(0);
}

// Every `step`th row of the kernel, which is [2, depth, height] rows of weights.
struct KernelRows {
  int m = 0, z = 0, y, row;

  __device__ __forceinline__ KernelRows(const Space& s, int first) : y(first), row(first) {
    carry(s);
  }
  __device__ __forceinline__ void next(const Space& s, int step) {
    row += step;
    y += step;
    carry(s);
  }

 private:
  __device__ __forceinline__ void carry(const Space& s) {
    while (y >= s.kernel_height) {
      y -= s.kernel_height;
      if (++z < s.kernel_depth) continue;
      z = 0;
      ++m;
    }
  }
};

// kCount neighbours of a row of the box, from x on, and the kernel's rows `part`, part + parts and
// so on: every value of the maps is read once for all neighbours.
template <int kCount, class A>
__device__ __forceinline__ void correlate_run(const Box& box, const Space& s, const A* staged,
                                              const A* weights, int z, int y, int x, int part,
                                              int parts, A (&sum)[kCount]) {
  for (KernelRows of(s, part); of.m < 2; of.next(s, parts)) {
    const A* row = staged + of.m * box.staged + box.at(z + of.z, y + of.y, x);
    const A* weight = weights + of.row * s.kernel_width;
    A window[kCount];
#pragma unroll
    for (int i = 0; i < kCount - 1; ++i) window[i] = row[i];
#pragma unroll 4
    for (int kx = 0; kx < s.kernel_width; ++kx) {
      window[kCount - 1] = row[kx + kCount - 1];
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += weight[kx] * window[i];
#pragma unroll
      for (int i = 0; i < kCount - 1; ++i) window[i] = window[i + 1];
    }
  }
}

// put(index within the box, pixel of the image, logit) for every pixel of the box, kCount
// neighbours to kSharing threads side by side, each of which takes some of the kernel's rows.
template <int kCount, int kSharing, class A, class Put>
__device__ __forceinline__ void logit_box(const Box& box, const Space& s, const A* staged,
                                          const A* weight, Put put) {
  const A bias = weight[2 * s.taps()];
  const int runs = (box.width + kCount - 1) / kCount, total = runs * box.height * box.depth;
  const int part = threadIdx.x % kSharing;
  for (int done = 0; done < total * kSharing; done += blockDim.x) {
    const int i = (done + static_cast<int>(threadIdx.x)) / kSharing;
    const int x = i % runs * kCount, y = i / runs % box.height, z = i / runs / box.height;
    A sum[kCount] = {};
    if (i < total) correlate_run(box, s, staged, weight, z, y, x, part, kSharing, sum);
    if constexpr (kSharing > 1) sum_lanes(sum, kSharing);
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (i < total && k % kSharing == part && x + k < box.width)
        put((z * box.height + y) * box.width + x + k, box.pixel(s, z, y, x + k), sum[k] + bias);
  }
}

// The same of the gates.
template <int kCount, int kSharing, class A, class Put>
__device__ __forceinline__ void gate_box(const Box& box, const Space& s, const A* staged,
                                         const A* weight, Put put) {
  logit_box<kCount, kSharing>(box, s, staged, weight,
                              [&](int at, int pixel, A logit) { put(at, pixel, sigmoid(logit)); });
}

// The same, by a thread or by two for a pixel where there are so many.
template <class A, class Put>
__device__ __forceinline__ void gate_box(const Box& box, const Space& s, const A* staged,
                                         const A* weight, Put put) {
  // Runs of four pixels by eight threads take two threads a pixel; each has a row of the kernel.
  constexpr int kSharing = 8;
  const int threads = static_cast<int>(blockDim.x);
  const bool rows = 2 * s.kernel_depth * s.kernel_height >= kSharing;
  if (rows && 2 * box.pixels() <= threads)
    gate_box<kRun, kSharing>(box, s, staged, weight, put);
  else if (box.pixels() <= threads)
    gate_box<1, 1>(box, s, staged, weight, put);
  else
    gate_box<kRun, 1>(box, s, staged, weight, put);
}

}  // namespace cbam::cuda
