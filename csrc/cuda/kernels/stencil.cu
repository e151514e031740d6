// The spatial gate backwards, from the sums over channels that the first pass left:
//
//   dz[s]        = (d_spatial[s] + what else reached the gate) * gate[s] * (1 - gate[s])
//   d_maps[m][s] = sum_k dz[s - k] * conv_weight[m][k], the first divided by the channels
//   d_conv[m][k] = sum_s dz[s] * maps[m][s + k]      d_bias = sum_s dz[s]
//
// grid    samples * boxes blocks of 256 threads; a block takes a box of pixels
// shared  dz of the box and its halo; with d_conv both maps of the same; the weights
// bytes   reads the parts of d_spatial, the gate and with d_conv the maps, halo included; writes
//         d_maps, and 2 * taps + 1 sums a block
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/reduce.cuh"
#include "tile_sums.cuh"

namespace cbam::cuda {
namespace {

struct StencilBlock {
  int64_t sample;
  int z, y, x;                            // of the box's first pixel
  int depth, height, width;               // of the box, cut at the edges of the image
  int staged_height, staged_row, staged;  // of the box with its halo, rows padded

  __device__ __forceinline__ explicit StencilBlock(const Stencil& p) {
    const ScaleGeometry& g = p.geometry;
    int rest = blockIdx.x;
    x = rest % g.boxes_width * g.box_width;
    rest /= g.boxes_width;
    y = rest % g.boxes_height * g.box_height;
    rest /= g.boxes_height;
    z = rest % g.boxes_depth * g.box_depth;
    sample = rest / g.boxes_depth;
    depth = min(g.box_depth, p.depth - z);
    height = min(g.box_height, p.height - y);
    width = min(g.box_width, p.width - x);
    staged_height = height + p.kernel_height - 1;
    staged_row = staged_width(width, p.kernel_width);
    staged = staged_row * staged_height * (depth + p.kernel_depth - 1);
  }
  __device__ __forceinline__ int at(int kz, int ky, int kx) const {
    return (kz * staged_height + ky) * staged_row + kx;
  }
};

// dz and, where asked for, the maps of the box and its halo; zero outside the image.
template <class T, class A>
__device__ __forceinline__ void stage(const Stencil& p, const StencilBlock& block,
                                      const StencilShared<A>& shared) {
  const int64_t pixels = int64_t{p.depth} * p.height * p.width;
  const A* gate = static_cast<const A*>(p.spatial_gate) + block.sample * pixels;
  const A* more = static_cast<const A*>(p.d_spatial_gate);
  const T* maps = static_cast<const T*>(p.maps) + block.sample * 2 * pixels;
  for (int i = threadIdx.x; i < block.staged; i += kThreads) {
    const int x = block.x + i % block.staged_row - p.kernel_width / 2;
    const int y = block.y + i / block.staged_row % block.staged_height - p.kernel_height / 2;
    const int z = block.z + i / block.staged_row / block.staged_height - p.kernel_depth / 2;
    const bool inside = z >= 0 && z < p.depth && y >= 0 && y < p.height && x >= 0 && x < p.width &&
                        x < block.x + block.width + p.kernel_width / 2;
    const int64_t pixel = (int64_t{z} * p.height + y) * p.width + x;
    A dz = A(0);
    if (inside) {
      const A d = total_of<A>(p.d_spatial, block.sample, pixels, pixel) +
                  (more ? more[block.sample * pixels + pixel] : A(0));
      dz = d * sigmoid_derivative<A>(gate[pixel]);
    }
    shared.dz[i] = dz;
    if (p.d_conv) {
      shared.maps[i] = inside ? widen(maps[pixel]) : A(0);
      shared.maps[block.staged + i] = inside ? widen(maps[pixels + pixel]) : A(0);
    }
  }
  const int taps = p.kernel_depth * p.kernel_height * p.kernel_width;
  const bool in_storage = p.weight_dtype != DType::kFloat32 && p.weight_dtype != DType::kFloat64;
  for (int i = threadIdx.x; i < 2 * taps; i += kThreads)
    shared.weight[i] = in_storage ? A(widen(static_cast<const T*>(p.conv_weight)[i]))
                                  : static_cast<const A*>(p.conv_weight)[i];
}

// Both maps' gradients of one pixel of the box: the kernel, turned around, over dz.
template <class A>
__device__ __forceinline__ void correlate_pixel(const Stencil& p, const StencilBlock& block,
                                                const StencilShared<A>& shared, int z, int y, int x,
                                                A& mean, A& max) {
  const int taps = p.kernel_depth * p.kernel_height * p.kernel_width;
  const A* weight = shared.weight + taps - 1;
  for (int kz = 0; kz < p.kernel_depth; ++kz)
    for (int ky = 0; ky < p.kernel_height; ++ky) {
      const A* row = shared.dz + block.at(z + kz, y + ky, x);
#pragma unroll 4
      for (int kx = 0; kx < p.kernel_width; ++kx, --weight) {
        mean += row[kx] * weight[0];
        max += row[kx] * weight[taps];
      }
    }
}

template <class A>
__device__ __forceinline__ void write_maps(const Stencil& p, const StencilBlock& block,
                                           const StencilShared<A>& shared) {
  const int64_t pixels = int64_t{p.depth} * p.height * p.width;
  A* d_maps = static_cast<A*>(p.d_maps) + block.sample * 2 * pixels;
  for (int q = threadIdx.x; q < block.depth * block.height * block.width; q += kThreads) {
    const int x = q % block.width, y = q / block.width % block.height,
              z = q / block.width / block.height;
    A mean = A(0), max = A(0);
    correlate_pixel(p, block, shared, z, y, x, mean, max);
    const int64_t pixel = (int64_t{block.z + z} * p.height + block.y + y) * p.width + block.x + x;
    d_maps[pixel] = mean / static_cast<A>(p.channels);
    d_maps[pixels + pixel] = max;
  }
}

// This box's share of the gradients of the convolution, a warp for each tap and for the bias.
template <class A>
__device__ __forceinline__ void write_conv(const Stencil& p, const StencilBlock& block,
                                           const StencilShared<A>& shared) {
  const int taps = p.kernel_depth * p.kernel_height * p.kernel_width;
  const int pixels = block.depth * block.height * block.width, lane = threadIdx.x % 32;
  const int centre = block.at(p.kernel_depth / 2, p.kernel_height / 2, p.kernel_width / 2);
  A* out = static_cast<A*>(p.d_conv) + int64_t{blockIdx.x} * (2 * taps + 1);
  for (int tap = threadIdx.x / 32; tap <= 2 * taps; tap += kThreads / 32) {
    const int k = tap % taps, kx = k % p.kernel_width, ky = k / p.kernel_width % p.kernel_height,
              kz = k / p.kernel_width / p.kernel_height;
    const A* map = shared.maps + tap / taps * block.staged + block.at(kz, ky, kx);
    A sum = A(0);
    for (int q = lane; q < pixels; q += 32) {
      const int at =
          block.at(q / block.width / block.height, q / block.width % block.height, q % block.width);
      sum += shared.dz[centre + at] * (tap < 2 * taps ? map[at] : A(1));
    }
    sum = sum_of_warp(sum);
    if (lane == 0) out[tap] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) stencil_kernel(const Stencil p) {
  using A = acc_t<T>;
  const StencilBlock block(p);
  SharedCarver carver(dynamic_shared_memory());
  const StencilShared<A> shared(carver, p.geometry, p.kernel_depth, p.kernel_height, p.kernel_width,
                                p.d_conv != nullptr);
  stage<T>(p, block, shared);
  __syncthreads();
  write_maps(p, block, shared);
  if (p.d_conv) write_conv(p, block, shared);
}

}  // namespace

void stencil(DType dtype, const Stencil& p, const Grid& grid, Stream stream) {
  with_storage(dtype, [&](auto storage) {
    launch("stencil", stencil_kernel<typename decltype(storage)::type>, grid, stream, p);
  });
}

}  // namespace cbam::cuda
