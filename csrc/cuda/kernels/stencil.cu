// The spatial gate backwards, from the sums over channels that the first pass left:
//
//   dz[s]        = (d_spatial[s] + what else reached the gate) * gate[s] * (1 - gate[s])
//   d_maps[m][s] = sum_k dz[s - k] * conv_weight[m][k], the first divided by the channels
//   d_conv[m][k] = sum_s dz[s] * maps[m][s + k]      d_bias = sum_s dz[s]
//
// grid    samples * boxes blocks of 256 threads; a block takes a box of pixels
// shared  dz of the box and its halo; with d_conv one map at a time of the same; the weights
// bytes   reads the parts of d_spatial, the gate and with d_conv the maps, halo included; writes
//         d_maps, and 2 * taps + 1 sums a block
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/reduce.cuh"
#include "tile_sums.cuh"

namespace cbam::cuda {
namespace {

// dz of the box and its halo, zero outside the image, and the weights.
template <class T, class A>
__device__ __forceinline__ void stage(const Stencil& p, const Box& block,
                                      const StencilShared<A>& shared) {
  const int64_t pixels = p.space.pixels();
  const A* gate = static_cast<const A*>(p.spatial_gate) + block.sample * pixels;
  const A* more = static_cast<const A*>(p.d_spatial_gate);
  for (int i = threadIdx.x; i < block.staged; i += kThreads) {
    const int pixel = StagedPixel(block, p.space, i).pixel;
    A dz = A(0);
    if (pixel >= 0) {
      const A d = total_of<A>(p.d_spatial, block.sample, pixels, pixel) +
                  (more ? __ldg(more + block.sample * pixels + pixel) : A(0));
      dz = d * sigmoid_derivative<A>(gate[pixel]);
    }
    shared.dz[i] = dz;
  }
  for (int i = threadIdx.x; i < 2 * p.space.taps(); i += kThreads)
    shared.weight[i] = weight_at<T>(p.conv_weight, p.weight_dtype, i);
}

template <class T, class A>
__device__ __forceinline__ void stage_map(const Stencil& p, const Box& block, int m, A* staged) {
  const int64_t pixels = p.space.pixels();
  const T* map = static_cast<const T*>(p.maps) + (block.sample * 2 + m) * pixels;
  for (int i = threadIdx.x; i < block.staged; i += kThreads) {
    const int pixel = StagedPixel(block, p.space, i).pixel;
    staged[i] = pixel >= 0 ? widen(map[pixel]) : A(0);
  }
}

// Both maps' gradients of one pixel of the box: the kernel, turned around, over dz.
template <class A>
__device__ __forceinline__ void correlate_pixel(const Stencil& p, const Box& block,
                                                const StencilShared<A>& shared, int z, int y, int x,
                                                A& mean, A& max) {
  const int taps = p.space.taps();
  const A* weight = shared.weight + taps - 1;
  for (int kz = 0; kz < p.space.kernel_depth; ++kz)
    for (int ky = 0; ky < p.space.kernel_height; ++ky) {
      const A* row = shared.dz + block.at(z + kz, y + ky, x);
#pragma unroll 4
      for (int kx = 0; kx < p.space.kernel_width; ++kx, --weight) {
        mean += row[kx] * weight[0];
        max += row[kx] * weight[taps];
      }
    }
}

template <class A>
__device__ __forceinline__ void write_maps(const Stencil& p, const Box& block,
                                           const StencilShared<A>& shared) {
  const int64_t pixels = p.space.pixels();
  A* d_maps = static_cast<A*>(p.d_maps) + block.sample * 2 * pixels;
  for (int q = threadIdx.x; q < block.pixels(); q += kThreads) {
    const int x = q % block.width, y = q / block.width % block.height,
              z = q / block.width / block.height;
    A mean = A(0), max = A(0);
    correlate_pixel(p, block, shared, z, y, x, mean, max);
    const int pixel = block.pixel(p.space, z, y, x);
    d_maps[pixel] = mean / static_cast<A>(p.channels);
    d_maps[pixels + pixel] = max;
  }
}

// Sum over the box of dz * value(position), by one warp.
template <class A, class Value>
__device__ __forceinline__ A sum_over_box(const Space& s, const Box& block, const A* dz,
                                          Value value) {
  const int lane = threadIdx.x % 32;
  const int centre = block.at(s.kernel_depth / 2, s.kernel_height / 2, s.kernel_width / 2);
  A sum = A(0);
  for (int z = 0; z < block.depth; ++z)
    for (int y = 0; y < block.height; ++y)
      for (int x = lane; x < block.width; x += 32) {
        const int at = block.at(z, y, x);
        sum += dz[centre + at] * value(at);
      }
  return sum_of_warp(sum);
}

// This box's share of the gradients of map m's taps, a warp for each tap; with the first map's also
// that of the bias.
template <class A>
__device__ __forceinline__ void write_conv(const Stencil& p, const Box& block,
                                           const StencilShared<A>& shared, int m) {
  const Space& s = p.space;
  const int taps = s.taps(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  A* out = static_cast<A*>(p.d_conv) + int64_t{blockIdx.x} * (2 * taps + 1);
  for (int tap = warp; tap < taps; tap += kThreads / 32) {
    const int kx = tap % s.kernel_width, ky = tap / s.kernel_width % s.kernel_height,
              kz = tap / s.kernel_width / s.kernel_height;
    const A* map = shared.map + block.at(kz, ky, kx);
    const A sum = sum_over_box(s, block, shared.dz, [&](int at) { return map[at]; });
    if (lane == 0) out[m * taps + tap] = sum;
  }
  if (m > 0 || warp > 0) return;
  const A bias = sum_over_box(s, block, shared.dz, [](int) { return A(1); });
  if (lane == 0) out[2 * taps] = bias;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) stencil_kernel(const Stencil p) {
  using A = acc_t<T>;
  const Box block(p.geometry, p.space, blockIdx.x);
  SharedCarver carver(dynamic_shared_memory());
  const StencilShared<A> shared(carver, p.geometry, p.space, p.d_conv != nullptr);
  stage<T>(p, block, shared);
  __syncthreads();
  write_maps(p, block, shared);
  if (!p.d_conv) return;
  for (int m = 0; m < 2; ++m) {
    stage_map<T>(p, block, m, shared.map);
    __syncthreads();
    write_conv(p, block, shared, m);
    __syncthreads();
  }
}

}  // namespace

void stencil(DType dtype, const Stencil& p, const Grid& grid, Stream stream) {
  with_storage(dtype, [&](auto storage) {
    launch("stencil", stencil_kernel<typename decltype(storage)::type>, grid, stream, p);
  });
}

}  // namespace cbam::cuda
