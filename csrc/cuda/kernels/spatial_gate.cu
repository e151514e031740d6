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
#include "../primitives/dependent_launch.cuh"
#include "../primitives/vector_io.cuh"
#include "convolution.cuh"
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

// Asks for the first of the block's rows of x.
template <Access kAccess, bool kChannelsFirst, class T>
__device__ __forceinline__ void prefetch_first(const SpatialGate& p, const ScaleBlock& block) {
  if constexpr (kAccess != Access::kScalar) {
    const int group = kAccess == Access::kPacked ? p.geometry.row_group : 1;
    const int pixel = block.pixel(p.space, 0, 0, 0);
    // Of a channel the rows of the image that follow each other without a gap.
    const int lines = block.width == p.space.width ? block.height : 1;
    const int run = kChannelsFirst ? group * lines * block.width : block.channels;
    const T* first = static_cast<const T*>(p.x.data) + block.sample * p.x.sample_stride +
                     (kChannelsFirst ? block.first_channel : pixel) * p.x.row_stride +
                     (kChannelsFirst ? pixel : block.first_channel);
    prefetch_rows(first, group * p.x.row_stride,
                  kChannelsFirst ? block.channels / group : block.width,
                  run * static_cast<int>(sizeof(T)));
  }
}

// The maps of the box and its halo; kept for backward where asked for.
template <class T, class A>
__device__ __forceinline__ void stage_block(const SpatialGate& p, const ScaleBlock& block,
                                            A* staged) {
  const int pixels = p.space.pixels();
  const auto maps_at = [&](int pixel, bool inside, A& mean, A& max) {
    const bool saves = inside && block.saves;
    if (saves && p.saved_argmax) {
      const auto e = merge_parts<true, A, 6>(p.maps, block.sample, pixels, pixel);
      p.saved_argmax[block.sample * pixels + pixel] = e.argmax;
      mean = e.sum;
      max = e.max;
    } else {
      const auto e = merge_parts<false, A, 6>(p.maps, block.sample, pixels, pixel);
      mean = e.sum;
      max = e.max;
    }
    if (saves) save_maps<T>(p.saved_maps, block.sample, pixels, pixel, mean, max);
  };
  stage_maps(block, p.space, 0, pixels, staged, maps_at);
}

// Weights and bias of the convolution and the numbers of the box's pixels.
template <class T, class A>
__device__ __forceinline__ void stage_constants(const SpatialGate& p, const ScaleBlock& block,
                                                const ScaleShared<A>& shared) {
  stage_conv_weights<T>(p.conv_weight, p.conv_bias, p.weight_dtype, p.space, shared.weight);
  for (int i = threadIdx.x; i < block.pixels(); i += kThreads) {
    const int x = i % block.width, y = i / block.width % block.height,
              z = i / block.width / block.height;
    shared.pixel[i] = block.pixel(p.space, z, y, x);
  }
}

// The gates of the chunk's channels.
template <class A>
__device__ __forceinline__ void stage_channels(const SpatialGate& p, const ScaleBlock& block,
                                               A* channel) {
  const A* gate =
      static_cast<const A*>(p.channel_gate) + block.sample * p.channels + block.first_channel;
  for (int i = threadIdx.x; i < block.channels; i += kThreads) channel[i] = gate[i];
}

// The gate of every pixel of the box, from the staged maps.
template <class A>
__device__ __forceinline__ void gate_pixels(const SpatialGate& p, const ScaleBlock& block,
                                            const ScaleShared<A>& shared) {
  const int64_t first = block.sample * p.space.pixels();
  // The pixel's number as it was staged: computed anew it costs registers.
  gate_box(block, p.space, shared.maps, shared.weight, [&](int at, int, A gate) {
    shared.spatial[at] = gate;
    if (block.saves) static_cast<A*>(p.saved_gate)[first + shared.pixel[at]] = gate;
  });
}

// Where the rows of a thread's vector stand, asked for one after another: every step-th channel or,
// packed, a channel by its number from the first on; a pixel of a box by its number in the image.
template <Access kAccess, bool kChannelsFirst, class P>
class RowWalk {
 public:
  static constexpr bool kSteps = kChannelsFirst && kAccess != Access::kPacked;

  __device__ __forceinline__ RowWalk(P first, int col, int64_t stride, int step, const int* pixel)
      : at_(kPacked ? first : first + col),
        col_(col),
        stride_(kSteps ? stride * step : stride),
        pixel_(pixel) {}
  __device__ __forceinline__ P next(int row) {
    if constexpr (kSteps) {
      const P at = at_;
      at_ += stride_;
      return at;
    } else if constexpr (kPacked) {
      return at_ + (row * static_cast<int>(stride_) + col_);  // no longer than kThreads vectors
    } else {
      return at_ + pixel_[row] * stride_;
    }
  }

 private:
  static constexpr bool kPacked = kAccess == Access::kPacked;
  P at_;
  int col_;
  int64_t stride_;
  const int* pixel_;
};

// The last pass. `threads_along` threads side by side take the vectors of a row of x's matrix, the
// others rows below; the gates of a vector's columns stay in registers.
template <Access kAccess, bool kChannelsFirst, class T, class A>
__device__ __forceinline__ void scale(const SpatialGate& p, const ScaleBlock& block,
                                      const ScaleShared<A>& shared) {
  constexpr int kCount = kAccess == Access::kScalar ? 1 : kVector<T>;
  constexpr bool kPacked = kAccess == Access::kPacked;
  // The choice between two rows takes registers.
  constexpr int kBatch = !kPacked ? 4 : kNarrowsSlowly<T> ? 2 : 3;
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
  const int start = below * group, step = threads_below * group;
  using From = RowWalk<kAccess, kChannelsFirst, const T*>;
  using To = RowWalk<kAccess, kChannelsFirst, T*>;
  const int first_row = (kChannelsFirst ? block.first_channel : 0) + (From::kSteps ? start : 0);
  const T* x = static_cast<const T*>(p.x.data) + block.sample * p.x.sample_stride +
               first_row * p.x.row_stride;
  T* out =
      static_cast<T*>(p.out) + block.sample * p.out_sample_stride + first_row * p.out_row_stride;
  for (int v = side; v < vectors; v += p.geometry.threads_along) {
    const VectorOfTwoRows<kPacked> columns(v * kCount, cols, kCount);
    A gate[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) gate[i] = col_gate[columns.column(i)];
    const int col = kPacked          ? v * kCount
                    : kChannelsFirst ? shared.pixel[v * kCount]
                                     : block.first_channel + v * kCount;
    From from(x, col, p.x.row_stride, step, shared.pixel);
    To to(out, col, p.out_row_stride, step, shared.pixel);
    for_batches<kBatch>(
        start, rows, step, [&](int row) { return load<kCount>(from.next(row)); },
        [&](int row, const Raw<T, kCount>& raw) {
          auto pack = widen(raw);
          const A of_first = row_gate[row + columns.first_row];
          const A of_last = row_gate[row + columns.last_row];
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const A of_row = columns.of_element(i, of_first, of_last);
            // As the plain form does: first the channel's gate, then the pixel's.
            pack.value[i] = pack.value[i] * (kChannelsFirst ? of_row : gate[i]) *
                            (kChannelsFirst ? gate[i] : of_row);
          }
          store(to.next(row), pack);
        });
  }
}

template <class T, Access kAccess, bool kChannelsFirst>
__global__ void __launch_bounds__(kThreads, kScaleBlocks) spatial_gate_kernel(const SpatialGate p) {
  using A = acc_t<T>;
  const ScaleBlock block(p);
  SharedCarver carver(dynamic_shared_memory());
  const ScaleShared<A> shared(carver, p.geometry, p.space);
  prefetch_first<kAccess, kChannelsFirst, T>(p, block);
  stage_constants<T>(p, block, shared);
  wait_for_previous_launch();
  stage_channels(p, block, shared.channel);
  stage_block<T>(p, block, shared.maps);
  __syncthreads();
  gate_pixels(p, block, shared);
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
