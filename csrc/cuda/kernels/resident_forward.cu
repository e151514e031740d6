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
// shared  the slice; the boxes of pixels whose gates the block computes, with their halo; both
//         gates; what it puts out for the other blocks of a cluster
// bytes   reads x once, writes out once; reads the weights of the MLP once a visit. In training
//         also writes what is saved. Blocks that are no cluster exchange through global memory.
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
  ExchangeCarver global(static_cast<char*>(p.exchange) + blockIdx.x * g.exchange);
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

// Mean and maximum over space of the block's channels; zeros for samples that are not there.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void pool(const ResidentForward& p,
                                     const ResidentBlock<T, kChannelsFirst>& block,
                                     const ForwardMemory<T>& m) {
  using A = acc_t<T>;
  const ResidentForwardGeometry& g = p.geometry;
  A* pooled = m.shared.pooled;
  const auto put = [&](int sample, int c, const Extremes<A, kTraining>& e) {
    const A mean = e.sum / static_cast<A>(block.pixels());
    pooled[2 * sample * g.channels + c] = mean;
    pooled[(2 * sample + 1) * g.channels + c] = e.max;
    if constexpr (kTraining) {
      const int64_t n = block.first_sample() + sample, channel = block.first_channel + c;
      A* saved = static_cast<A*>(p.saved.pooled) + n * 2 * p.channels + channel;
      saved[0] = mean;
      saved[p.channels] = e.max;
      p.saved.pixel_argmax[n * p.channels + channel] = e.argmax_or(0);
    }
  };
  const auto ready = [&](int sample, int chunk) {
    wait_for_chunk(g, m.shared.landed + sample * g.chunks + chunk, block.parity());
  };
  if constexpr (kChannelsFirst)
    walk_rows<false, kTraining>(
        g, block, m.shared.tile, 0, block.channels, 0, nullptr,
        [&](int sample, int row) { ready(sample, row / g.chunk); }, put);
  else
    walk_columns<false, kTraining>(g, block, m, 0, block.channels, 0, nullptr, ready, put);
  for (int i = 2 * block.samples * g.channels + threadIdx.x; i < g.vectors() * g.channels;
       i += g.threads)
    pooled[i] = A(0);
  __syncthreads();
}

// Element i of a vector that starts at (row, col) of the slice, times its gates: first the
// channel's, then the pixel's, as the plain form does. Where rows end with vectors, gates along the
// row come in vectors as well.
template <bool kChannelsFirst, bool kWhole, int kCount, class A>
struct VectorGates {
  A channel[kCount], pixel[kCount];

  __device__ __forceinline__ VectorGates(const A* channels, const A* pixels, int row, int col,
                                         int cols) {
    const A* of_row = kChannelsFirst ? channels : pixels;
    const A* of_col = kChannelsFirst ? pixels : channels;
    A along[kCount];
    if constexpr (kWhole) load_shared(of_col + col, true, along);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      (kChannelsFirst ? channel : pixel)[i] = of_row[row];
      (kChannelsFirst ? pixel : channel)[i] = kWhole ? along[i] : of_col[col];
      if (kWhole || ++col < cols) continue;
      col = 0;
      ++row;
    }
  }
};

// out of one chunk.
template <bool kWhole, bool kChannelsFirst, class T>
__device__ __forceinline__ void scale_chunk(const ResidentForward& p,
                                            const ResidentBlock<T, kChannelsFirst>& block,
                                            const ForwardMemory<T>& m, int sample, int number) {
  using A = acc_t<T>;
  constexpr int kCount = kVector<T>;
  const ResidentForwardGeometry& g = p.geometry;
  const Chunk chunk(g, block.rows(), number);
  const A* channels = m.shared.gate + sample * g.channels;
  const A* pixels = m.spatial + sample * block.pixels();
  const T* tile = m.shared.tile + int64_t{sample} * g.rows * g.pitch;
  T* out = static_cast<T*>(p.out) + (block.first_sample() + sample) * p.out_sample_stride +
           block.first_channel * (kChannelsFirst ? p.out_row_stride : 1);
  // Counted from the slice's first element, as if there were no gaps between rows.
  const int begin = chunk.first * block.cols(), vectors = chunk.count * block.cols() / kCount;
  for (int v = threadIdx.x; v < vectors; v += g.threads) {
    const int at = begin + v * kCount, row = at / block.cols(), col = at - row * block.cols();
    const T* from = tile + (kChannelsFirst ? at : row * g.pitch + col);
    auto pack = widen(load_staged<kCount>(from));
    const VectorGates<kChannelsFirst, kWhole, kCount, A> gates(channels, pixels, row, col,
                                                               block.cols());
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      pack.value[i] = pack.value[i] * gates.channel[i] * gates.pixel[i];
    store(kChannelsFirst ? out + at : out + row * p.out_row_stride + col, pack);
  }
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
  prefetch_weights(p, block);
  const bool whole =
      block.cols() % kVector<T> == 0;  // of a row: always so where channels come last
  for (int round = 0; round < rounds_of(p, g); ++round) {
    block.start(round);
    __syncthreads();
    pool<kTraining>(p, block, m);
    gate_all_channels<kTraining>(p, block, m);
    gate_all_pixels<kTraining>(p, block, m);
    const int following = block.samples_in(round + 1);
    for (int sample = 0; sample < block.samples; ++sample)
      for (int number = 0; number < g.chunks; ++number) {
        if (whole)
          scale_chunk<true>(p, block, m, sample, number);
        else
          scale_chunk<false>(p, block, m, sample, number);
        __syncthreads();
        if (sample < following) load(round + 1, sample, number);
      }
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
