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
  const int halo_z = p.space.kernel_depth / 2, halo_y = p.space.kernel_height / 2,
            halo_x = p.space.kernel_width / 2;
  const int box_width = staged_width(block.width, p.space.kernel_width);
  const int box_height = block.height + p.space.kernel_height - 1;
  const int count = box_width * box_height * (block.depth + p.space.kernel_depth - 1);
  const int pixels = p.space.pixels();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int bx = i % box_width - halo_x, by = i / box_width % box_height - halo_y,
              bz = i / box_width / box_height - halo_z;
    const int z = block.z + bz, y = block.y + by, x = block.x + bx;
    A mean = A(0), max = A(0);
    if (z >= 0 && z < p.space.depth && y >= 0 && y < p.space.height && x >= 0 &&
        x < p.space.width && bx < block.width + halo_x) {
      const int pixel = (z * p.space.height + y) * p.space.width + x;
      const bool inside = bz >= 0 && bz < block.depth && by >= 0 && by < block.height && bx >= 0 &&
                          bx < block.width;
      const bool saves = inside && block.saves;
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
    staged[count + i] = max;
  }
}

// Weights and bias of the convolution, the gates of the chunk's channels, the numbers of the box's
// pixels.
template <class T, class A>
__device__ __forceinline__ void stage_constants(const SpatialGate& p, const ScaleBlock& block,
                                                const ScaleShared<A>& shared) {
  const int taps = p.space.taps();
  const bool in_storage = p.weight_dtype != DType::kFloat32 && p.weight_dtype != DType::kFloat64;
  for (int i = threadIdx.x; i <= 2 * taps; i += kThreads) {
    const void* from = i < 2 * taps ? p.conv_weight : p.conv_bias;
    const int at = i < 2 * taps ? i : 0;
    shared.weight[i] = !from        ? A(0)
                       : in_storage ? A(widen(static_cast<const T*>(from)[at]))
                                    : static_cast<const A*>(from)[at];
  }
  const A* gate =
      static_cast<const A*>(p.channel_gate) + block.sample * p.channels + block.first_channel;
  for (int i = threadIdx.x; i < block.channels; i += kThreads) shared.channel[i] = gate[i];
  for (int i = threadIdx.x; i < block.pixels(); i += kThreads) {
    const int x = i % block.width, y = i / block.width % block.height,
              z = i / block.width / block.height;
    shared.pixel[i] = ((block.z + z) * p.space.height + block.y + y) * p.space.width + block.x + x;
  }
}

// kRun neighbours of a row of the box, from x on: every value of the maps is read once for all.
template <class A>
__device__ __forceinline__ void correlate_run(const SpatialGate& p, const ScaleBlock& block,
                                              const ScaleShared<A>& shared, int z, int y, int x,
                                              A (&sum)[kRun]) {
  const int box_width = staged_width(block.width, p.space.kernel_width);
  const int box_height = block.height + p.space.kernel_height - 1;
  const int count = box_width * box_height * (block.depth + p.space.kernel_depth - 1);
  const A* weight = shared.weight;
  for (int m = 0; m < 2; ++m)
    for (int kz = 0; kz < p.space.kernel_depth; ++kz)
      for (int ky = 0; ky < p.space.kernel_height; ++ky) {
        const A* row = shared.maps + m * count + ((z + kz) * box_height + y + ky) * box_width;
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

// The last pass. `tile` threads side by side take the vectors of a row of x's matrix, the others
// rows below; the gates of a vector's columns stay in registers.
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
    A gate[kCount];
    int row_of[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int flat = v * kCount + i;
      row_of[i] = kPacked ? flat / cols : 0;
      gate[i] = col_gate[kPacked ? flat % cols : flat];
    }
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
            const A of_row = row_gate[row + row_of[i]];
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
  const ScaleShared<A> shared(carver, p.geometry, p.space.kernel_depth, p.space.kernel_height,
                              p.space.kernel_width);
  stage_constants<T>(p, block, shared);
  stage_maps<T>(p, block, shared.maps);
  __syncthreads();
  gate_pixels<T>(p, block, shared);
  __syncthreads();
  scale<kAccess, kChannelsFirst, T>(p, block, shared);
}

}  // namespace

void spatial_gate(DType dtype, const SpatialGate& p, const Grid& grid, Stream stream) {
  with_storage(dtype, [&](auto storage) {
    with_bool(p.channels_first, [&](auto channels_first) {
      using T = typename decltype(storage)::type;
      constexpr bool kFirst = decltype(channels_first)::value;
      with_access(p.geometry.access, [&](auto access) {
        launch("spatial_gate", spatial_gate_kernel<T, access.value, kFirst>, grid, stream, p);
      });
    });
  });
}

}  // namespace cbam::cuda
