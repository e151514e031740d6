// The convolution backwards over a box of pixels, from dz around it, by all threads of a block of
// blockDim.x.
//
//   d_maps[m][s]  = sum_k dz[s - k] * weight[m][k]
//   d_weight[m][k] = sum_s dz[s] * maps[m][s + k]      d_bias = sum_s dz[s]
#pragma once

#include "blocks.cuh"

namespace cbam::cuda {

// value_at(pixel) of the box and its halo, zeros outside the image.
template <class A, class ValueAt>
__device__ __forceinline__ void stage_pixels(const Box& box, const Space& s, A* staged,
                                             ValueAt value_at) {
  for (int i = threadIdx.x; i < box.staged; i += blockDim.x) {
    const int pixel = StagedPixel(box, s, i).pixel;
    staged[i] = pixel >= 0 ? value_at(pixel) : A(0);
  }
}

// Both maps' gradients of one pixel of the box: the kernel, turned around, over dz.
template <class A>
__device__ __forceinline__ void correlate_pixel(const Box& box, const Space& s, const A* dz,
                                                const A* weights, int z, int y, int x, A& mean,
                                                A& max) {
  const int taps = s.taps();
  const A* weight = weights + taps - 1;
  for (int kz = 0; kz < s.kernel_depth; ++kz)
    for (int ky = 0; ky < s.kernel_height; ++ky) {
      const A* row = dz + box.at(z + kz, y + ky, x);
#pragma unroll 4
      for (int kx = 0; kx < s.kernel_width; ++kx, --weight) {
        mean += row[kx] * weight[0];
        max += row[kx] * weight[taps];
      }
    }
}

// put(pixel of the image, d_maps[0], d_maps[1]) for every pixel of the box.
template <class A, class Put>
__device__ __forceinline__ void map_gradients(const Box& box, const Space& s, const A* dz,
                                              const A* weights, Put put) {
  for (int q = threadIdx.x; q < box.pixels(); q += blockDim.x) {
    const int x = q % box.width, y = q / box.width % box.height, z = q / box.width / box.height;
    A mean = A(0), max = A(0);
    correlate_pixel(box, s, dz, weights, z, y, x, mean, max);
    put(box.pixel(s, z, y, x), mean, max);
  }
}

// Places of a box that a lane takes, every 32nd, as staged() counts them: without a division for
// each.
class LanePlaces {
 public:
  __device__ __forceinline__ explicit LanePlaces(const Box& box)
      : box_(box),
        step_x_(32 % box.width),
        step_y_(32 / box.width % box.height),
        step_z_(32 / box.width / box.height) {
    const int lane = threadIdx.x % 32;
    x_ = lane % box.width;
    y_ = lane / box.width % box.height;
    z_ = lane / box.width / box.height;
  }
  __device__ __forceinline__ bool inside() const { return z_ < box_.depth; }
  __device__ __forceinline__ int at() const { return box_.at(z_, y_, x_); }
  __device__ __forceinline__ void next() {
    x_ += step_x_;
    y_ += step_y_;
    z_ += step_z_;
    if (x_ >= box_.width) {
      x_ -= box_.width;
      ++y_;
    }
    if (y_ >= box_.height) {
      y_ -= box_.height;
      ++z_;
    }
  }

 private:
  const Box& box_;
  int step_x_, step_y_, step_z_, x_, y_, z_;
};

// Taps whose gradients a warp sums together: dz is read once for them.
constexpr int kTapsTogether = 4;

// The box's share of the gradients of map m's taps, some taps to each warp; with the first map's
// also that of the bias, by the last warp. `out` is [2 * taps + 1], the bias last.
template <class A>
__device__ __forceinline__ void weight_gradients(const Box& box, const Space& s, const A* dz,
                                                 const A* map, int m, A* out) {
  const int taps = s.taps(), lane = threadIdx.x % 32, warp = threadIdx.x / 32,
            warps = static_cast<int>(blockDim.x) / 32;
  const A* centre = dz + box.at(s.kernel_depth / 2, s.kernel_height / 2, s.kernel_width / 2);
  for (int first = warp * kTapsTogether; first < taps; first += warps * kTapsTogether) {
    const A* shifted[kTapsTogether];
#pragma unroll
    for (int k = 0; k < kTapsTogether; ++k) {
      const int tap = min(first + k, taps - 1);
      shifted[k] = map + box.at(tap / s.kernel_width / s.kernel_height,
                                tap / s.kernel_width % s.kernel_height, tap % s.kernel_width);
    }
    A sum[kTapsTogether] = {};
    for (LanePlaces place(box); place.inside(); place.next()) {
      const int at = place.at();
#pragma unroll
      for (int k = 0; k < kTapsTogether; ++k) sum[k] += centre[at] * shifted[k][at];
    }
    sum_lanes(sum, 32);
#pragma unroll
    for (int k = 0; k < kTapsTogether; ++k)
      if (lane == 0 && first + k < taps) out[m * taps + first + k] = sum[k];
  }
  if (m > 0 || warp + 1 < warps) return;
  A sum[1] = {};
  for (LanePlaces place(box); place.inside(); place.next()) sum[0] += centre[place.at()];
  sum_lanes(sum, 32);
  if (lane == 0) out[2 * taps] = sum[0];
}

// All of them: maps is x's dtype [2, pixels] of the box's sample, `staged` has room for one map of
// the box with its halo.
template <class T, class A>
__device__ __forceinline__ void all_weight_gradients(const Box& box, const Space& s, const A* dz,
                                                     const T* maps, A* staged, A* out) {
  for (int m = 0; m < 2; ++m) {
    const T* map = maps + int64_t{m} * s.pixels();
    stage_pixels(box, s, staged, [&](int pixel) { return A(widen(map[pixel])); });
    __syncthreads();
    weight_gradients(box, s, dz, staged, m, out);
    __syncthreads();
  }
}

}  // namespace cbam::cuda
