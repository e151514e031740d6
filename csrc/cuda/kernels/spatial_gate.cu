// The spatial gate and the last pass over x.
//
//   spatial_gate[s] = sigmoid(sum over m, k of conv_weight[m][k] * maps[m][s + k] + conv_bias)
//   out[c][s]       = x[c][s] * channel_gate[c] * spatial_gate[s], and what follows (ending.cuh)
//
// grid    samples * boxes * chunks blocks of 256 threads; a block takes a box of pixels and a chunk
//         of channels: maps with their halo come to shared memory, then the gate of every pixel of
//         the box, then x passes; weights come, and x is asked for, while the launch before ends
// shared  the box with its halo, twice; the weights; the gate of each pixel and of each channel
// bytes   reads x and the residual once, writes out once; every block reads the maps of its box and
//         halo, its channels' gates and the weights of the convolution
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/dependent_launch.cuh"
#include "../primitives/vector_io.cuh"
#include "convolution.cuh"
#include "ending.cuh"
#include "kernels.h"

namespace cbam::cuda {
namespace {

// What a thread has under way: loads of x, and pixels of both maps.
constexpr int kScaleLoads = 4;
template <class A>
constexpr int kMapLoads = sizeof(A) == 8 ? 3 : 5;

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
    // Of a channel the rows of the image that follow each other without a gap: whole vectors, which
    // the rows of one slice of a volume need not be.
    const int slices = block.height == p.space.height ? block.depth : 1;
    const int lines = block.width == p.space.width ? slices * block.height : 1;
    const int run = kChannelsFirst ? group * lines * block.width : block.channels;
    const T* first = static_cast<const T*>(p.x.data) + block.sample * p.x.sample_stride +
                     (kChannelsFirst ? block.first_channel : pixel) * p.x.row_stride +
                     (kChannelsFirst ? pixel : block.first_channel);
    prefetch_rows(first, group * p.x.row_stride,
                  kChannelsFirst ? block.channels / group : block.width,
                  run * static_cast<int>(sizeof(T)));
  }
}

// The maps of the box and its halo, which have one part: those of several pixels are under way at
// a time.
template <class A>
__device__ __forceinline__ void stage_whole(const SpatialGate& p, const ScaleBlock& block,
                                            A* staged) {
  Places place(block.staged_row, block.staged_height, threadIdx.x, kThreads);
  for_batches<kMapLoads<A>>(
      threadIdx.x, block.staged, kThreads,
      [&](int) {
        const int pixel = StagedPixel(block, p.space, place.x, place.y, place.z).pixel;
        place.next();
        Extremes<A, false> maps;
        maps.max = A(0);
        if (pixel >= 0)
          maps = read_part<false, A>(p.maps, block.sample, 0, p.space.pixels(), pixel);
        return maps;
      },
      [&](int i, const Extremes<A, false>& maps) {
        staged[i] = maps.sum;
        staged[block.staged + i] = maps.max;
      });
}

// The same, merged from their parts; where the maxima are is kept for backward.
template <class A>
__device__ __forceinline__ void stage_merged(const SpatialGate& p, const ScaleBlock& block,
                                             A* staged) {
  const int pixels = p.space.pixels();
  const auto maps_at = [&](int pixel, bool inside, A& mean, A& max) {
    if (inside && block.saves && p.saved_argmax) {
      const auto e = merge_parts<true, A, 6>(p.maps, block.sample, pixels, pixel);
      p.saved_argmax[block.sample * pixels + pixel] = e.argmax;
      mean = e.sum;
      max = e.max;
    } else {
      const auto e = merge_parts<false, A, 6>(p.maps, block.sample, pixels, pixel);
      mean = e.sum;
      max = e.max;
    }
  };
  stage_maps(block, p.space, staged, maps_at);
}

// What backward reads of the maps.
template <class T, class A>
__device__ __forceinline__ void save_block(const SpatialGate& p, const ScaleBlock& block,
                                           const A* staged) {
  const Space& s = p.space;
  const A* centre = staged + block.at(s.kernel_depth / 2, s.kernel_height / 2, s.kernel_width / 2);
  Places at(block.width, block.height, threadIdx.x, kThreads);
  for (int i = threadIdx.x; i < block.pixels(); i += kThreads, at.next()) {
    const A* maps = centre + block.at(at.z, at.y, at.x);
    save_maps<T>(p.saved_maps, block.sample, s.pixels(), block.pixel(s, at.z, at.y, at.x), maps[0],
                 maps[block.staged]);
  }
}

// The gates of the chunk's channels and the numbers of the box's pixels: before the wait these
// would take registers.
template <class A>
__device__ __forceinline__ void stage_constants(const SpatialGate& p, const ScaleBlock& block,
                                                const ScaleShared<A>& shared) {
  const A* gate =
      static_cast<const A*>(p.channel_gate) + block.sample * p.channels + block.first_channel;
  for (int i = threadIdx.x; i < block.channels; i += kThreads) shared.channel[i] = gate[i];
  Places at(block.width, block.height, threadIdx.x, kThreads);
  for (int i = threadIdx.x; i < block.pixels(); i += kThreads, at.next())
    shared.pixel[i] = block.pixel(p.space, at.z, at.y, at.x);
}

// The gate of every pixel of the box, from the staged maps.
template <class A>
__device__ __forceinline__ void gate_pixels(const SpatialGate& p, const ScaleBlock& block,
                                            const ScaleShared<A>& shared) {
  const int64_t first = block.sample * p.space.pixels();
  // The pixel's number as it was staged: computed anew it costs registers.
  const auto put = [&](int at, int, A gate) {
    shared.spatial[at] = gate;
    if (block.saves) static_cast<A*>(p.saved_gate)[first + shared.pixel[at]] = gate;
  };
  // Threads that share a run were no faster here, and took 12 registers more on sm_75.
  if (block.pixels() <= kThreads)
    gate_box<1, 1>(block, p.space, shared.maps, shared.weight, put);
  else
    gate_box<kRun, 1>(block, p.space, shared.maps, shared.weight, put);
}

// The last pass where every row of x's matrix is whole vectors. Threads take the vectors of the box
// and the chunk in the order in which they stand in x: neighbours are under way together.
template <Access kAccess, bool kChannelsFirst, Follows kFollows, class T, class A>
__device__ __forceinline__ void scale_rows(const SpatialGate& p, const ScaleBlock& block,
                                           const ScaleShared<A>& shared) {
  constexpr int kCount = kAccess == Access::kScalar ? 1 : kVector<T>;
  const A* row_gate = kChannelsFirst ? shared.channel : shared.spatial;
  const A* col_gate = kChannelsFirst ? shared.spatial : shared.channel;
  const int rows = kChannelsFirst ? block.channels : block.pixels();
  const int vectors = (kChannelsFirst ? block.pixels() : block.channels) / kCount;
  const T* x = static_cast<const T*>(p.x.data) + block.sample * p.x.sample_stride +
               block.first_channel * (kChannelsFirst ? p.x.row_stride : 1);
  T* out = static_cast<T*>(p.out) + block.sample * p.out_sample_stride +
           block.first_channel * (kChannelsFirst ? p.out_row_stride : 1);
  const EndingRows& e = p.ending;
  const EndingOf<T, kFollows> ending(
      e,
      block.sample * e.sample_stride + block.first_channel * (kChannelsFirst ? e.row_stride : 1));
  const auto offset = [&](const Places& at, int64_t stride) {
    const int row = kChannelsFirst ? at.y : shared.pixel[at.y];
    return row * stride + (kChannelsFirst ? shared.pixel[at.x * kCount] : at.x * kCount);
  };
  Places from(vectors, rows, threadIdx.x, kThreads), to = from;
  for_batches<kAtATime<kFollows, kScaleLoads>>(
      threadIdx.x, rows * vectors, kThreads,
      [&](int) {
        const auto loaded = UnderWay{load<kCount>(x + offset(from, p.x.row_stride)),
                                     ending.template load<kCount>(offset(from, e.row_stride))};
        from.next();
        return loaded;
      },
      [&](int, const auto& loaded) {
        auto pack = widen(loaded.scaled);
        // As the plain form does: first the channel's gate, then the pixel's.
        const A of_row = row_gate[to.y];
        A gate[kCount];
        load_shared(col_gate + to.x * kCount, true, gate);
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          pack.value[i] = pack.value[i] * (kChannelsFirst ? of_row : gate[i]) *
                          (kChannelsFirst ? gate[i] : of_row);
        ending.apply(loaded.added, pack);
        store(out + offset(to, p.out_row_stride), pack);
        to.next();
      });
}

// The same where channels are packed rows: `threads_along` threads side by side take the vectors of
// a group of rows, the others groups below; the gates of a vector's pixels stay in registers.
template <Follows kFollows, class T, class A>
__device__ __forceinline__ void scale_packed(const SpatialGate& p, const ScaleBlock& block,
                                             const ScaleShared<A>& shared) {
  constexpr int kCount = kVector<T>;
  // The choice between two rows takes registers.
  constexpr int kBatch = kNarrowsSlowly<T> ? 2 : 3;
  const int cols = block.pixels(), group = p.geometry.row_group;
  const int below = threadIdx.x / p.geometry.threads_along,
            threads_below = kThreads / p.geometry.threads_along;
  if (below >= threads_below) return;
  const T* x = static_cast<const T*>(p.x.data) + block.sample * p.x.sample_stride +
               int64_t{block.first_channel} * cols;
  T* out = static_cast<T*>(p.out) + block.sample * p.out_sample_stride +
           int64_t{block.first_channel} * cols;
  const EndingOf<T, kFollows> ending(
      p.ending, block.sample * p.ending.sample_stride + int64_t{block.first_channel} * cols);
  for (int v = threadIdx.x % p.geometry.threads_along; v < p.geometry.period;
       v += p.geometry.threads_along) {
    const VectorOfTwoRows<true> columns(v * kCount, cols, kCount);
    A gate[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) gate[i] = shared.spatial[columns.column(i)];
    const auto at = [&](int row) { return row * cols + v * kCount; };
    for_batches<kAtATime<kFollows, kBatch>>(
        below * group, block.channels, threads_below * group,
        [&](int row) {
          return UnderWay{load<kCount>(x + at(row)), ending.template load<kCount>(at(row))};
        },
        [&](int row, const auto& loaded) {
          auto pack = widen(loaded.scaled);
          const A of_first = shared.channel[row + columns.first_row];
          const A of_last = shared.channel[row + columns.last_row];
#pragma unroll
          for (int i = 0; i < kCount; ++i)
            pack.value[i] = pack.value[i] * columns.of_element(i, of_first, of_last) * gate[i];
          ending.apply(loaded.added, pack);
          store(out + at(row), pack);
        });
  }
}

template <class A>
__device__ __forceinline__ void stage(const SpatialGate& p, const ScaleBlock& block, A* staged) {
  if (p.maps.splits == 1)
    stage_whole(p, block, staged);
  else
    stage_merged(p, block, staged);
}

template <Access kAccess, bool kChannelsFirst, Follows kFollows, class T, class A>
__device__ __forceinline__ void scale_and_end(const SpatialGate& p, const ScaleBlock& block,
                                              const ScaleShared<A>& shared) {
  if constexpr (kAccess == Access::kPacked)
    scale_packed<kFollows, T>(p, block, shared);
  else
    scale_rows<kAccess, kChannelsFirst, kFollows, T>(p, block, shared);
}

template <Access kAccess, bool kChannelsFirst, class T, class A>
__device__ __forceinline__ void scale_block(const SpatialGate& p, const ScaleBlock& block,
                                            const ScaleShared<A>& shared) {
  with_ending(p.ending, [&](auto follows) {
    scale_and_end<kAccess, kChannelsFirst, follows.value, T>(p, block, shared);
  });
}

template <class T, Access kAccess, bool kChannelsFirst>
__global__ void __launch_bounds__(kThreads, kScaleBlocks) spatial_gate_kernel(const SpatialGate p) {
  using A = acc_t<T>;
  const ScaleBlock block(p);
  SharedCarver carver(dynamic_shared_memory());
  const ScaleShared<A> shared(carver, p.geometry, p.space);
  prefetch_first<kAccess, kChannelsFirst, T>(p, block);
  stage_conv_weights<T>(p.conv_weight, p.conv_bias, p.weight_dtype, p.space, shared.weight);
  wait_for_previous_launch();
  stage_constants(p, block, shared);
  stage(p, block, shared.maps);
  __syncthreads();
  if (block.saves) save_block<T>(p, block, shared.maps);
  gate_pixels(p, block, shared);
  __syncthreads();
  scale_block<kAccess, kChannelsFirst, T>(p, block, shared);
}

// The first half by itself:
//
//   saved_gate[s] = sum over m, k of conv_weight[m][k] * maps[m][s + k] + conv_bias
//
// grid    samples * boxes blocks of 256 threads; a block takes a box of pixels and no channels
// shared  as above, but for the channels
// bytes   every block reads the maps of its box and halo and the weights; writes a logit, and what
//         backward reads of the maps
template <class T>
__global__ void __launch_bounds__(kThreads, kScaleBlocks)
    spatial_logits_kernel(const SpatialGate p) {
  using A = acc_t<T>;
  const ScaleBlock block(p);
  SharedCarver carver(dynamic_shared_memory());
  const ScaleShared<A> shared(carver, p.geometry, p.space);
  stage_conv_weights<T>(p.conv_weight, p.conv_bias, p.weight_dtype, p.space, shared.weight);
  wait_for_previous_launch();
  stage(p, block, shared.maps);
  __syncthreads();
  save_block<T>(p, block, shared.maps);
  A* logits = static_cast<A*>(p.saved_gate) + block.sample * p.space.pixels();
  logit_box<1, 1>(block, p.space, shared.maps, shared.weight,
                  [&](int, int pixel, A logit) { logits[pixel] = logit; });
}

// The second half by itself:
//
//   saved_gate[s] = sigmoid(logits[s])
//   out[c][s]     = x[c][s] * channel_gate[c] * saved_gate[s], and what follows (ending.cuh)
//
// grid, shared  as of both halves
// bytes         reads x and the residual once, writes out once; every block reads its pixels'
//               logits and channels' gates, one for each pixel writes the gate
template <class T, Access kAccess, bool kChannelsFirst>
__global__ void __launch_bounds__(kThreads, kScaleBlocks) scale_kernel(const SpatialGate p) {
  using A = acc_t<T>;
  const ScaleBlock block(p);
  SharedCarver carver(dynamic_shared_memory());
  const ScaleShared<A> shared(carver, p.geometry, p.space);
  wait_for_previous_launch();
  stage_constants(p, block, shared);
  const int64_t first = block.sample * p.space.pixels();
  for (int i = threadIdx.x; i < block.pixels(); i += kThreads) {
    const int64_t at = first + shared.pixel[i];  // which this thread has staged
    const A gate = sigmoid(static_cast<const A*>(p.logits)[at]);
    shared.spatial[i] = gate;
    if (block.saves) static_cast<A*>(p.saved_gate)[at] = gate;
  }
  __syncthreads();
  scale_block<kAccess, kChannelsFirst, T>(p, block, shared);
}

}  // namespace

void spatial_gate(DType dtype, const SpatialGate& p, const Grid& grid, Stream stream) {
  with_layout(
      dtype, p.geometry.access, p.channels_first, [&](auto storage, auto access, auto first) {
        using T = typename decltype(storage)::type;
        launch("spatial_gate", spatial_gate_kernel<T, access.value, first.value>, grid, stream, p);
      });
}

void spatial_logits(DType dtype, const SpatialGate& p, const Grid& grid, Stream stream) {
  with_storage(dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    launch("spatial_logits", spatial_logits_kernel<T>, grid, stream, p);
  });
}

void scale(DType dtype, const SpatialGate& p, const Grid& grid, Stream stream) {
  with_layout(dtype, p.geometry.access, p.channels_first,
              [&](auto storage, auto access, auto first) {
                using T = typename decltype(storage)::type;
                launch("scale", scale_kernel<T, access.value, first.value>, grid, stream, p);
              });
}

}  // namespace cbam::cuda
