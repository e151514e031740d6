// The whole forward in one launch, on samples that stay on the chip: a team of blocks holds a few
// of them, each block a slice of the channels, and what concerns all channels goes round the team.
//
//   channel_gate[c] = sigmoid(W2 (relu(W1 avg + b1) + relu(W1 max + b1)) + 2 b2)
//   spatial_gate[s] = sigmoid(conv(mean and max over c of x * channel_gate) + bias)
//   out[c][s]       = x[c][s] * channel_gate[c] * spatial_gate[s]
//
// grid    teams * team blocks of 256 or 512 threads, as clusters of `team` blocks or all at once; a
//         team visits `samples` samples, then those `teams` visits further on, which begin to
//         arrive while it writes out
// shared  the slice; the weights of its channels, where there is room; the boxes of pixels whose
//         gates the block computes, with their halo; both gates; what it puts out for the other
//         blocks of a cluster
// bytes   reads x once, writes out once; reads the weights of the MLP once a visit, or once a team
//         where they stay. In training also writes what is saved. Blocks that are no cluster
//         exchange through global memory.
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "resident_channel_gate.cuh"
#include "resident_spatial_gate.cuh"

namespace cbam::cuda {
namespace {

template <bool kTraining, class T>
__device__ __forceinline__ ForwardMemory<T> memory_of(const ResidentForward& p) {
  using A = acc_t<T>;
  const ResidentForwardGeometry& g = p.geometry;
  LaidOutCarver carver(dynamic_shared_memory(), p.layout);
  const ResidentForwardShared<T, A> shared(carver, g, p.hidden, p.space, kTraining);
  if (kHasClusters && g.cluster) {
    const ForwardExchange<A> exchange(carver, g, p.hidden, p.space, kTraining);
    return {shared, exchange, exchange.maps};
  }
  ExchangeCarver global(p.exchange + g.counts() + blockIdx.x * g.exchange);
  return {shared, ForwardExchange<A>(global, g, p.hidden, p.space, kTraining), shared.spatial};
}

// The weights of the convolution, and where copies end.
template <class T>
__device__ __forceinline__ void prepare(const ResidentForward& p, const ForwardMemory<T>& m) {
  const ResidentForwardGeometry& g = p.geometry;
  if (threadIdx.x == 0) {
    init_landed(g, m.shared.landed, g.samples * g.chunks);
    publish_inits();
  }
  stage_conv_weights<T>(p.weights.conv_weight, p.weights.conv_bias, p.weights.dtype, p.space,
                        m.shared.weight);
  __syncthreads();
}

// put(sample, channel of the block, sum and maximum) where a channel's pixels are a row.
template <bool kTraining, class T, class Ready, class Put>
__device__ __forceinline__ void walk_rows(const ResidentForwardGeometry& g,
                                          const ResidentBlock<T, true>& block, const T* tile,
                                          Ready ready, Put put) {
  constexpr int kCount = kVector<T>;
  const int cols = block.cols();
  const auto walk = [&](auto count) {
    walk_along<count.value, false, kTraining>(g, block, tile, 0, block.channels, 0, nullptr, ready,
                                              put);
  };
  if (cols % kCount == 0)
    walk(std::integral_constant<int, kCount>());
  else if (cols % (kCount / 2) == 0)
    walk(std::integral_constant<int, kCount / 2>());
  else if (g.lanes > 1)
    walk(std::integral_constant<int, 1>());
  else
    walk_short_rows<kTraining>(g, block, tile, ready, put);
}

// Mean and maximum over space of the block's channels; zeros for samples that are not there.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void pool(const ResidentForward& p,
                                     const ResidentBlock<T, kChannelsFirst>& block,
                                     const ForwardMemory<T>& m) {
  using A = acc_t<T>;
  const ResidentForwardGeometry& g = p.geometry;
  A* pooled = m.shared.pooled;
  const int64_t first_sample = block.first_sample();
  const auto put = [&](int sample, int c, const Extremes<A, kTraining>& e) {
    const A mean = e.sum / static_cast<A>(block.pixels());
    pooled[c * g.pooled_pitch() + 2 * sample] = mean;
    pooled[c * g.pooled_pitch() + 2 * sample + 1] = e.max;
    if constexpr (kTraining) {
      const int64_t n = first_sample + sample, channel = block.first_channel + c;
      A* saved = static_cast<A*>(p.saved.pooled) + n * 2 * p.channels + channel;
      saved[0] = mean;
      saved[p.channels] = e.max;
      p.saved.pixel_argmax[n * p.channels + channel] = e.argmax_or(0);
    }
  };
  int chunk = 0, of_sample = 0;  // the next to be waited for: rows are asked for in their order
  const auto ready = [&](int sample, int to) {
    if (sample != of_sample) chunk = 0;
    of_sample = sample;
    for (; chunk * g.chunk <= to; ++chunk)
      wait_for_chunk(g, m.shared.landed + sample * g.chunks + chunk, block.parity());
  };
  if constexpr (kChannelsFirst)
    walk_rows<kTraining>(g, block, m.shared.tile, ready, put);
  else
    walk_columns<false, kTraining>(g, block, m, 0, block.channels, 0, nullptr, g.chunk, ready, put);
  for (int c = threadIdx.x; c < block.channels; c += g.threads)
    for (int v = 2 * block.samples; v < g.vectors(); ++v) pooled[c * g.pooled_pitch() + v] = A(0);
  __syncthreads();
}

// What a vector of out is multiplied by: its columns' gates, held by a thread, and its rows'.
template <class Columns, int kCount, class A>
struct ScaledColumns {
  Columns columns;
  A own[kCount];

  __device__ __forceinline__ ScaledColumns(int first, int cols, const A* of_column)
      : columns(first, cols, kCount) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) own[i] = of_column[columns.column(i)];
  }
  // An element is multiplied by the channel's gate first, then by the pixel's, as the plain form
  // does. `of_row` is the gate of the group's first row.
  template <bool kRowsFirst, class T>
  __device__ __forceinline__ void scale(const A* of_row, Pack<T, kCount>& pack) const {
    constexpr bool kTwoRows = !std::is_same_v<Columns, VectorColumns<true>>;
    A of_first = A(0), of_last = A(0);
    if constexpr (kTwoRows) {
      of_first = of_row[columns.first_row];
      of_last = of_row[columns.last_row];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      A by;
      if constexpr (kTwoRows)
        by = columns.of_element(i, of_first, of_last);
      else
        by = of_row[columns.row_of(i)];
      pack.value[i] *= kRowsFirst ? by : own[i];
      pack.value[i] *= kRowsFirst ? own[i] : by;
    }
  }
};

// Vectors of a thread that are under way: what registers allow, of which compilers take more for
// the architectures before sm_90, those without clusters.
template <bool kTraining>
constexpr int kScaledTogether = kTraining || !kHasClusters ? 2 : 4;

// out of a sample, chunk by chunk: done(number) is called by all threads once nothing reads a chunk
// any more. A thread keeps to the columns of one vector, or of a few where rows are long; rows that
// do not end with vectors are taken in groups that do, of g.channel_group.
template <bool kTraining, class Columns, bool kChannelsFirst, class T, class Done>
__device__ __forceinline__ void scale_sample(const ResidentForward& p,
                                             const ResidentBlock<T, kChannelsFirst>& block,
                                             const ForwardMemory<T>& m, int sample, Done done) {
  using A = acc_t<T>;
  constexpr int kCount = kVector<T>;
  const ResidentForwardGeometry& g = p.geometry;
  const A* channels = m.shared.gate + sample * g.channels;
  const A* pixels = m.spatial + sample * block.pixels();
  const A* of_row = kChannelsFirst ? channels : pixels;
  const A* of_column = kChannelsFirst ? pixels : channels;
  const T* tile = m.shared.tile + int64_t{sample} * g.rows * g.pitch;
  T* out = static_cast<T*>(p.out) + (block.first_sample() + sample) * p.out_sample_stride +
           block.first_channel * (kChannelsFirst ? p.out_row_stride : 1);
  const int group = std::is_same_v<Columns, VectorOfTwoRows<false>> ? 1 : g.channel_group;
  const int vectors = group * block.cols() / kCount;
  const int along = min(vectors, g.threads), below = g.threads / along;
  const int side = threadIdx.x % along, row_below = threadIdx.x / along * group;
  const int end = static_cast<int>(threadIdx.x) < along * below ? vectors : 0;
  int held = side;
  ScaledColumns<Columns, kCount, A> by(held * kCount, block.cols(), of_column);
  for (int number = 0; number < g.chunks; ++number) {
    const Chunk chunk(g, block.rows(), number);
    for (int v = side; v < end; v += along) {
      if (v != held) by = {v * kCount, block.cols(), of_column};
      held = v;
      for_batches<kScaledTogether<kTraining>>(
          chunk.first + row_below, chunk.first + chunk.count, below * group,
          [&](int row) { return load_staged<kCount>(tile + row * g.pitch + v * kCount); },
          [&](int row, const Raw<T, kCount>& raw) {
            auto pack = widen(raw);
            by.template scale<kChannelsFirst>(of_row + row, pack);
            store(out + int64_t{row} * p.out_row_stride + v * kCount, pack);
          });
    }
    __syncthreads();
    done(number);
  }
}

// The same for any rows.
template <bool kTraining, bool kChannelsFirst, class T, class Done>
__device__ __forceinline__ void scale_rows(const ResidentForward& p,
                                           const ResidentBlock<T, kChannelsFirst>& block,
                                           const ForwardMemory<T>& m, int sample, Done done) {
  constexpr int kCount = kVector<T>;
  if (!kChannelsFirst || block.cols() % kCount == 0)
    scale_sample<kTraining, VectorOfTwoRows<false>>(p, block, m, sample, done);
  else if (block.cols() >= kCount - 1)
    scale_sample<kTraining, VectorOfTwoRows<true>>(p, block, m, sample, done);
  else
    scale_sample<kTraining, VectorColumns<true>>(p, block, m, sample, done);
}

template <class T, bool kChannelsFirst, bool kTraining>
__global__ void __launch_bounds__(kForwardThreads, 1)
    resident_forward_kernel(const ResidentForward p) {
  const ResidentForwardGeometry& g = p.geometry;
  const ForwardMemory<T> m = memory_of<kTraining, T>(p);
  ResidentBlock<T, kChannelsFirst> block(p, g);
  prepare(p, m);
  const auto load = [&](int round, int sample, int number) {
    T* to = m.shared.tile + (int64_t{sample} * g.rows + number * g.chunk) * g.pitch;
    load_chunk(g, block, p.x, round, sample, number, to,
               m.shared.landed + sample * g.chunks + number);
  };
  for (int sample = 0; sample < block.samples_in(0); ++sample)
    for (int number = 0; number < g.chunks; ++number) load(0, sample, number);
  fetch_weights(block, m.shared.held);
  block.team.open();
  for (block.start(0); block.samples > 0; block.start(block.round + 1)) {
    __syncthreads();
    pool<kTraining>(p, block, m);
    gate_all_channels<kTraining>(p, block, m);
    gate_all_pixels<kTraining>(p, block, m);
    const int following = block.samples_in(block.round + 1);
    for (int sample = 0; sample < block.samples; ++sample)
      scale_rows<kTraining>(p, block, m, sample, [&](int number) {
        if (sample < following) load(block.round + 1, sample, number);
      });
  }
  if (kHasClusters && g.cluster)
    block.team.barrier();  // others may still read what this block put out
}

// Calls body with the kernel for these.
template <class Body>
void with_kernel(DType dtype, bool channels_first, bool training, Body body) {
  with_storage(dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    if constexpr (!std::is_same_v<T, double>)
      with_bool(channels_first, [&](auto first) {
        with_bool(training,
                  [&](auto kept) { body(resident_forward_kernel<T, first.value, kept.value>); });
      });
  });
}

}  // namespace

void resident_forward(DType dtype, bool channels_first, const ResidentForward& p, const Grid& grid,
                      Stream stream) {
  with_kernel(dtype, channels_first, p.saved.spatial_gate != nullptr,
              [&](auto kernel) { launch("resident_forward", kernel, grid, stream, p); });
}

const char* why_no_resident_forward(DType dtype, bool channels_first, bool training,
                                    const Grid& grid) {
  const char* reason = kNoResidentKernel;
  with_kernel(dtype, channels_first, training,
              [&](auto kernel) { reason = why_not_run(kernel, grid); });
  return reason;
}

}  // namespace cbam::cuda
