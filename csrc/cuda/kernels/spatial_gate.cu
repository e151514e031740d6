// The spatial gate and the last pass over x.
//
//   spatial_gate[s] = sigmoid(sum over m, k of conv_weight[m][k] * maps[m][s + k] + conv_bias)
//   out[c][s]       = x[c][s] * channel_gate[c] * spatial_gate[s]
//
// grid    samples * boxes * chunks blocks of 256 threads; a block takes a box of pixels and a chunk
//         of channels: maps with their halo come to shared memory, then the gate of every pixel of
//         the box, then x passes
// shared  the box with its halo, twice; the weights; the gate of each pixel and of each channel
// bytes   reads x once, writes out once; every block reads the maps of its box and halo, its
//         channels' gates and the weights of the convolution
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/vector_io.cuh"
#include "blocks.cuh"
#include "kernels.h"

namespace cbam::cuda {
namespace {

// The box of pixels and the chunk of channels of this block.
struct ScaleBlock : Box {
  int first_channel, channels;
  bool saves;  // one block for each pixel

  __device__ __forceinline__ explicit ScaleBlock(const SpatialGate& p)
      : Box(p.geometry, p.space, blockIdx.x / p.geometry.chunks) {
    const int chunk = blockIdx.x % p.geometry.chunks;
    first_channel = chunk * p.geometry.chunk;
    channels = min(p.geometry.chunk, p.channels - first_channel);
    saves = chunk == 0 && p.saved_gate;
  }
};

// The maps of the box and its halo, zero outside the image; kept for backward where asked for.
template <class T, class A>
__device__ __forceinline__ void stage_maps(const SpatialGate& p, const ScaleBlock& block,
                                           A* staged) {
  const int pixels = p.space.pixels();
  for (int i = threadIdx.x; i < block.staged; i += kThreads) {
    const StagedPixel at(block, p.space, i);
    const int pixel = at.pixel;
    A mean = A(0), max = A(0);
    if (pixel >= 0) {
      const bool saves = at.inside && block.saves;
      if (saves && p.saved_argmax) {
        const auto e = merge_parts<true, A>(p.maps, block.sample, pixels, pixel);
        p.saved_argmax[block.sample * pixels + pixel] = e.argmax;
        mean = e.sum;
        max = e.max;
      } else {
        const auto e = merge_parts<false, A>(p.maps, block.sample, pixels, pixel);
        mean = e.sum;
        max = e.max;
      }
      if (saves) {
        T* saved = static_cast<T*>(p.saved_maps) + block.sample * 2 * pixels + pixel;
        saved[0] = narrow<T>(mean);
        saved[pixels] = narrow<T>(max);
      }
    }
    staged[i] = mean;
    staged[block.staged + i] = max;
  }
}

// Weights and bias of the convolution, the gates of the chunk's channels, the numbers of the box's
// pixels.
template <class T, class A>
__device__ __forceinline__ void stage_constants(const SpatialGate& p, const ScaleBlock& block,
                                                const ScaleShared<A>& shared) {
  const int weights = 2 * p.space.taps();
  for (int i = threadIdx.x; i < weights; i += kThreads)
    shared.weight[i] = conv_weight_at<T>(p.conv_weight, p.weight_dtype, i);
  if (threadIdx.x == 0)
    shared.weight[weights] = p.conv_bias ? conv_weight_at<T>(p.conv_bias, p.weight_dtype, 0) : A(0);
  const A* gate =
      static_cast<const A*>(p.channel_gate) + block.sample * p.channels + block.first_channel;
  for (int i = threadIdx.x; i < block.channels; i += kThreads) shared.channel[i] = gate[i];
  for (int i = threadIdx.x; i < block.pixels(); i += kThreads) {
    const int x = i % block.width, y = i / block.width % block.height,
              z = i / block.width / block.height;
    shared.pixel[i] = block.pixel(p.space, z, y, x);
  }
}

// kRun neighbours of a row of the box, from x on: every value of the maps is read once for all.
template <class A>
__device__ __forceinline__ void correlate_run(const SpatialGate& p, const ScaleBlock& block,
                                              const ScaleShared<A>& shared, int z, int y, int x,
                                              A (&sum)[kRun]) {
  const A* weight = shared.weight;
  for (int m = 0; m < 2; ++m)
    for (int kz = 0; kz < p.space.kernel_depth; ++kz)
      for (int ky = 0; ky < p.space.kernel_height; ++ky) {
        const A* row = shared.maps + m * block.staged + block.at(z + kz, y + ky, 0);
        A window[kRun];
#pragma unroll
        for (int i = 0; i < kRun - 1; ++i) window[i] = row[x + i];
#pragma unroll 4
        for (int kx = 0; kx < p.space.kernel_width; ++kx) {
          window[kRun - 1] = row[x + kx + kRun - 1];
          const A w = *weight++;
#pragma unroll
          for (int i = 0; i < kRun; ++i) sum[i] += w * window[i];
#pragma unroll
          for (int i = 0; i < kRun - 1; ++i) window[i] = window[i + 1];
        }
      }
}

// The gate of every pixel of the box, from the staged maps.
template <class T, class A>
__device__ __forceinline__ void gate_pixels(const SpatialGate& p, const ScaleBlock& block,
                                            const ScaleShared<A>& shared) {
  const A bias = shared.weight[2 * p.space.taps()];
  const int runs = (block.width + kRun - 1) / kRun;
  for (int i = threadIdx.x; i < runs * block.height * block.depth; i += kThreads) {
    const int x = i % runs * kRun, y = i / runs % block.height, z = i / runs / block.height;
    A sum[kRun];
#pragma unroll
    for (int k = 0; k < kRun; ++k) sum[k] = bias;
    correlate_run(p, block, shared, z, y, x, sum);
#pragma unroll
    for (int k = 0; k < kRun; ++k)
      if (x + k < block.width) {
        const int q = (z * block.height + y) * block.width + x + k;
        const A gate = sigmoid(sum[k]);
        shared.spatial[q] = gate;
        if (block.saves)
          static_cast<A*>(p.saved_gate)[block.sample * p.space.pixels() + shared.pixel[q]] = gate;
      }
  }
}

// The last pass. `threads_along` threads side by side take the vectors of a row of x's matrix, the
// others rows below; the gates of a vector's columns stay in registers.
template <Access kAccess, bool kChannelsFirst, class T, class A>
__device__ __forceinline__ void scale(const SpatialGate& p, const ScaleBlock& block,
                                      const ScaleShared<A>& shared) {
  constexpr int kCount = kAccess == Access::kScalar ? 1 : kVector<T>;
  constexpr bool kPacked = kAccess == Access::kPacked;
  const A* row_gate = kChannelsFirst ? shared.channel : shared.spatial;
  const A* col_gate = kChannelsFirst ? shared.spatial : shared.channel;
  const int rows = kChannelsFirst ? block.channels : block.pixels();
  const int cols = kChannelsFirst ? block.pixels() : block.channels;
  const int vectors = kPacked ? p.geometry.period : cols / kCount;
  const int group = kPacked ? p.geometry.row_group : 1;
  const int threads_below = kThreads / p.geometry.threads_along;
  const int side = threadIdx.x % p.geometry.threads_along,
            below = threadIdx.x / p.geometry.threads_along;
  if (below >= threads_below) return;
  const T* x = static_cast<const T*>(p.x.data) + block.sample * p.x.sample_stride;
  T* out = static_cast<T*>(p.out) + block.sample * p.out_sample_stride;
  for (int v = side; v < vectors; v += p.geometry.threads_along) {
    const VectorColumns<kPacked> columns(v * kCount, cols, kCount);
    A gate[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) gate[i] = col_gate[columns.column(i)];
    const int col = kPacked          ? v * kCount
                    : kChannelsFirst ? shared.pixel[v * kCount]
                                     : block.first_channel + v * kCount;
    const auto start = [&](int row, int64_t stride) {
      return (kChannelsFirst ? block.first_channel + row : shared.pixel[row]) * stride + col;
    };
    for_batches(
        below * group, rows, threads_below * group,
        [&](int row) { return load<kCount>(x + start(row, p.x.row_stride)); },
        [&](int row, const Raw<T, kCount>& raw) {
          auto pack = widen(raw);
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const A of_row = row_gate[row + columns.row_of(i)];
            // As the plain form does: first the channel's gate, then the pixel's.
            pack.value[i] = pack.value[i] * (kChannelsFirst ? of_row : gate[i]) *
                            (kChannelsFirst ? gate[i] : of_row);
          }
          store(out + start(row, p.out_row_stride), pack);
        });
  }
}

template <class T, Access kAccess, bool kChannelsFirst>
__global__ void __launch_bounds__(kThreads, kAccess == Access::kPacked ? 2 : 3)
    spatial_gate_kernel(const SpatialGate p) {
  using A = acc_t<T>;
  const ScaleBlock block(p);
  SharedCarver carver(dynamic_shared_memory());
  const ScaleShared<A> shared(carver, p.geometry, p.space);
  stage_constants<T>(p, block, shared);
  stage_maps<T>(p, block, shared.maps);
  __syncthreads();
  gate_pixels<T>(p, block, shared);
  __syncthreads();
  scale<kAccess, kChannelsFirst, T>(p, block, shared);
}

}  // namespace

void spatial_gate(DType dtype, const SpatialGate& p, const Grid& grid, Stream stream) {
  with_layout(
      dtype, p.geometry.access, p.channels_first, [&](auto storage, auto access, auto first) {
        using T = typename decltype(storage)::type;
        launch("spatial_gate", spatial_gate_kernel<T, access.value, first.value>, grid, stream, p);
      });
}

}  // namespace cbam::cuda
