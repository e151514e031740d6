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
#include "convolution.cuh"
#include "resident_tile.cuh"

namespace cbam::cuda {
namespace {

template <class T>
struct Memory {
  using A = acc_t<T>;
  ResidentShared<T, A> shared;
  Exchange<A> exchange;
  A* spatial;  // [samples, pixels]
};

template <bool kTraining, class T>
__device__ __forceinline__ Memory<T> carve(const Resident& p) {
  using A = acc_t<T>;
  const ResidentGeometry& g = p.geometry;
  SharedCarver carver(dynamic_shared_memory());
  const ResidentShared<T, A> shared(carver, g, p.hidden, p.space, kTraining);
  if (g.cluster) {
    const Exchange<A> exchange(carver, g, p.hidden, p.space, kTraining);
    return {shared, exchange, exchange.maps};
  }
  ExchangeCarver global(static_cast<char*>(p.exchange) + blockIdx.x * g.exchange);
  return {shared, Exchange<A>(global, g, p.hidden, p.space, kTraining), shared.spatial};
}

// The weights of the convolution, and where copies end.
template <class T>
__device__ __forceinline__ void prepare(const Resident& p, const Memory<T>& m) {
  const ResidentGeometry& g = p.geometry;
  if (threadIdx.x == 0 && g.copy != Copy::kPlain) {
    for (int i = 0; i < g.samples * g.chunks; ++i)
      init(m.shared.landed + i, g.copy == Copy::kBulk ? 1 : g.threads);
    publish_inits();
  }
  stage_conv_weights<T>(p.weights.conv_weight, p.weights.conv_bias, p.weights.dtype, p.space,
                        m.shared.weight);
  __syncthreads();
}

// Brings the weights of the block's channels to the cache while the first samples arrive.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void prefetch_weights(const Resident& p,
                                                 const ResidentBlock<T, kChannelsFirst>& block) {
  const auto size = static_cast<int64_t>(bytes_of(p.weights.dtype));
  const int64_t lines = (block.channels * size + kLineBytes - 1) / kLineBytes;
  const int64_t row = p.hidden * size, end = block.channels * row;
  const auto* fc1 = static_cast<const char*>(p.weights.fc1_weight) + block.first_channel * size;
  const auto* fc2 = static_cast<const char*>(p.weights.fc2_weight) + block.first_channel * row;
  for (int64_t i = threadIdx.x; i < lines * p.hidden; i += p.geometry.threads) {
    prefetch(fc1 + i / lines * p.channels * size + i % lines * kLineBytes);
    if (i * kLineBytes < end) prefetch(fc2 + i * kLineBytes);
  }
}

// Mean and maximum over space of the block's channels; zeros for samples that are not there.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void pool(const Resident& p,
                                     const ResidentBlock<T, kChannelsFirst>& block,
                                     const Memory<T>& m) {
  using A = acc_t<T>;
  const ResidentGeometry& g = p.geometry;
  A* pooled = m.shared.pooled;
  const auto put = [&](int sample, int c, const Extremes<A, kTraining>& e) {
    const A mean = e.sum / static_cast<A>(block.pixels);
    pooled[2 * sample * g.channels + c] = mean;
    pooled[(2 * sample + 1) * g.channels + c] = e.max;
    if constexpr (kTraining) {
      const int64_t n = block.first_sample + sample, channel = block.first_channel + c;
      A* saved = static_cast<A*>(p.saved.pooled) + n * 2 * p.channels + channel;
      saved[0] = mean;
      saved[p.channels] = e.max;
      p.saved.pixel_argmax[n * p.channels + channel] = e.argmax_or(0);
    }
  };
  if constexpr (kChannelsFirst)
    walk_rows<false, kTraining>(
        g, block, m.shared.tile, 0, block.channels, 0, nullptr,
        [&](int sample, int row) {
          wait_for_chunk(p, block, m.shared.landed, sample, row / g.chunk);
        },
        put);
  else
    walk_columns<false, kTraining>(
        g, block, m.shared, 0, block.channels, 0, nullptr,
        [&](int sample, int chunk) { wait_for_chunk(p, block, m.shared.landed, sample, chunk); },
        put);
  for (int i = 2 * block.samples * g.channels + threadIdx.x; i < g.vectors() * g.channels;
       i += g.threads)
    pooled[i] = A(0);
  __syncthreads();
}

// A warp's products of kRows rows of a matrix with kVectors vectors: lane i gets that of row
// i / kVectors and vector i % kVectors.
template <int kRows, int kVectors, class A, class Weight>
__device__ __forceinline__ A warp_products(int count, const A* vectors, int pitch, Weight weight) {
  constexpr int kAtOnce = kRows < 8 ? kRows : 8;  // weights under way
  A sum[kRows * kVectors] = {};
  for (int k = threadIdx.x % 32; k < count; k += 32) {
#pragma unroll
    for (int first = 0; first < kRows; first += kAtOnce) {
      A of_row[kAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) of_row[r] = weight(first + r, k);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const A value = vectors[v * pitch + k];
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) sum[(first + r) * kVectors + v] += of_row[r] * value;
      }
    }
  }
  return sums_of_warp(sum);
}

// This block's share of the first layer: the sums over its own channels.
template <int kVectors, bool kChannelsFirst, class T>
__device__ __forceinline__ void hidden_shares(const Resident& p,
                                              const ResidentBlock<T, kChannelsFirst>& block,
                                              const Memory<T>& m) {
  constexpr int kRows = 32 / kVectors;
  const int row = threadIdx.x % 32 / kVectors, vector = threadIdx.x % kVectors;
  for (int unit = threadIdx.x / 32 * kRows; unit < p.hidden;
       unit += p.geometry.threads / 32 * kRows) {
    const auto sum = warp_products<kRows, kVectors>(
        block.channels, m.shared.pooled, p.geometry.channels, [&](int r, int k) {
          const int64_t at = int64_t{unit + r} * p.channels + block.first_channel + k;
          return unit + r < p.hidden ? weight_at<T>(p.weights.fc1_weight, p.weights.dtype, at)
                                     : acc_t<T>(0);
        });
    if (unit + row < p.hidden) m.exchange.hidden[(unit + row) * kVectors + vector] = sum;
  }
}

// The hidden vectors of mean and max, summed over the team and then over both.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void merge_hidden(const Resident& p,
                                             const ResidentBlock<T, kChannelsFirst>& block,
                                             const Memory<T>& m) {
  using A = acc_t<T>;
  const int vectors = p.geometry.vectors(), samples = vectors / 2;
  const Team& team = block.team;
  for (int i = threadIdx.x; i < p.hidden * samples; i += p.geometry.threads) {
    const int unit = i / samples, sample = i % samples;
    const A* own = m.exchange.hidden + unit * vectors + 2 * sample;
    A mean = A(0), max = A(0);
    for (int from = 0; from < team.size; ++from) {
      mean += team.read(own, from);
      max += team.read(own + 1, from);
    }
    const void* bias = p.weights.fc1_bias;
    const A b = bias ? weight_at<T>(bias, p.weights.dtype, unit) : A(0);
    mean = relu(mean + b);
    max = relu(max + b);
    m.shared.both[sample * p.hidden + unit] = mean + max;
    if (kTraining && team.rank == 0 && sample < block.samples) {
      const int64_t n = block.first_sample + sample;
      A* saved = static_cast<A*>(p.saved.hidden) + n * 2 * p.hidden + unit;
      saved[0] = mean;
      saved[p.hidden] = max;
    }
  }
  __syncthreads();
}

// The gates of the block's own channels.
template <int kSamples, bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void gate_channels(const Resident& p,
                                              const ResidentBlock<T, kChannelsFirst>& block,
                                              const Memory<T>& m) {
  using A = acc_t<T>;
  constexpr int kRows = 32 / kSamples;
  const int row = threadIdx.x % 32 / kSamples, sample = threadIdx.x % kSamples;
  for (int first = threadIdx.x / 32 * kRows; first < block.channels;
       first += p.geometry.threads / 32 * kRows) {
    const A sum =
        warp_products<kRows, kSamples>(p.hidden, m.shared.both, p.hidden, [&](int r, int k) {
          const int64_t at = int64_t{block.first_channel + first + r} * p.hidden + k;
          return first + r < block.channels
                     ? weight_at<T>(p.weights.fc2_weight, p.weights.dtype, at)
                     : A(0);
        });
    const int c = first + row, channel = block.first_channel + c;
    if (c >= block.channels || sample >= block.samples) continue;
    const void* bias = p.weights.fc2_bias;
    const A b = bias ? weight_at<T>(bias, p.weights.dtype, channel) : A(0);
    const A gate = sigmoid(sum + A(2) * b);
    m.shared.gate[sample * p.geometry.channels + c] = gate;
    if constexpr (kTraining)
      static_cast<A*>(p.saved.channel_gate)[(block.first_sample + sample) * p.channels + channel] =
          gate;
  }
  __syncthreads();
}

template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void gate_all_channels(const Resident& p,
                                                  const ResidentBlock<T, kChannelsFirst>& block,
                                                  const Memory<T>& m) {
  const bool one = p.geometry.samples == 1;
  if (block.samples > 0 && one)
    hidden_shares<2>(p, block, m);
  else if (block.samples > 0)
    hidden_shares<2 * kMostVisited>(p, block, m);
  block.team.barrier();
  if (block.samples == 0) return;
  merge_hidden<kTraining>(p, block, m);
  if (one)
    gate_channels<1, kTraining>(p, block, m);
  else
    gate_channels<kMostVisited, kTraining>(p, block, m);
}

// Mean and maximum over the block's channels, for the pixels of a band.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void put_out_maps(const Resident& p,
                                             const ResidentBlock<T, kChannelsFirst>& block,
                                             const Memory<T>& m, int first, int end) {
  using A = acc_t<T>;
  const ResidentGeometry& g = p.geometry;
  const auto put = [&](int sample, int pixel, const Extremes<A, kTraining>& e) {
    const int at = sample * g.band + pixel - first;
    m.exchange.maps[at] = e.sum / static_cast<A>(p.channels);
    m.exchange.maps[g.samples * g.band + at] = e.max;
    if constexpr (kTraining) m.exchange.argmax[at] = e.argmax_or(block.first_channel);
  };
  const auto ready = [](int, int) {};  // the pool has waited
  if constexpr (kChannelsFirst)
    walk_columns<true, kTraining>(g, block, m.shared, first, end, block.first_channel,
                                  m.shared.gate, ready, put);
  else
    walk_rows<true, kTraining>(g, block, m.shared.tile, first, end, block.first_channel,
                               m.shared.gate, ready, put);
}

// A pixel's maps, merged over the team; kept for backward where the pixel is one of this block's.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void merge_maps(const Resident& p,
                                           const ResidentBlock<T, kChannelsFirst>& block,
                                           const Memory<T>& m, int sample, int pixel, int first,
                                           bool inside, acc_t<T>& mean, acc_t<T>& max) {
  using A = acc_t<T>;
  const ResidentGeometry& g = p.geometry;
  const int at = sample * g.band + pixel - first;
  const auto read = [&](int from) {
    Extremes<A, kTraining> e;
    e.sum = block.team.read(m.exchange.maps + at, from);
    e.max = block.team.read(m.exchange.maps + g.samples * g.band + at, from);
    if constexpr (kTraining) e.argmax = block.team.read(m.exchange.argmax + at, from);
    return e;
  };
  auto merged = read(0);
  for (int from = 1; from < g.team; ++from) merged.merge(read(from));
  mean = merged.sum;
  max = merged.max;
  if constexpr (kTraining) {
    if (!inside) return;
    const int64_t n = block.first_sample + sample;
    T* saved = static_cast<T*>(p.saved.maps) + n * 2 * block.pixels + pixel;
    saved[0] = narrow<T>(mean);
    saved[block.pixels] = narrow<T>(max);
    p.saved.channel_argmax[n * block.pixels + pixel] = merged.argmax;
  }
}

// Of this block's boxes: the maps as far as they are in the band, and behind the last band the
// gates.
template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void gate_boxes(const Resident& p,
                                           const ResidentBlock<T, kChannelsFirst>& block,
                                           const Memory<T>& m, int first, int end) {
  using A = acc_t<T>;
  const ResidentGeometry& g = p.geometry;
  const auto boxes = static_cast<int>(block.samples * g.boxes.boxes());
  for (int k = 0; k < g.boxes_each; ++k) {
    const int number = block.team.rank + k * g.team;
    if (number >= boxes) return;
    const Box box(g.boxes, p.space, number);
    const auto sample = static_cast<int>(box.sample);
    stage_maps(box, p.space, first, end, m.shared.staged,
               [&](int pixel, bool inside, A& mean, A& max) {
                 merge_maps<kTraining>(p, block, m, sample, pixel, first, inside, mean, max);
               });
    if (end < block.pixels) return;
    __syncthreads();
    A* gates = m.exchange.gates + k * g.boxes.pixels();
    gate_box(box, p.space, m.shared.staged, m.shared.weight, [&](int at, int pixel, A gate) {
      gates[at] = gate;
      if constexpr (kTraining)
        static_cast<A*>(
            p.saved.spatial_gate)[(block.first_sample + sample) * block.pixels + pixel] = gate;
    });
    __syncthreads();
  }
}

// The gates of all pixels, from the blocks that computed them.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void collect_gates(const Resident& p,
                                              const ResidentBlock<T, kChannelsFirst>& block,
                                              const Memory<T>& m) {
  const ResidentGeometry& g = p.geometry;
  using A = acc_t<T>;
  const auto boxes = static_cast<int>(block.samples * g.boxes.boxes());
  for (int i = threadIdx.x; i < g.boxes.pixels(); i += g.threads)
    for_batches(
        0, boxes, 1,
        [&](int number) {
          const Box box(g.boxes, p.space, number);
          const A* gates = m.exchange.gates + number / g.team * g.boxes.pixels();
          return i < box.pixels() ? block.team.read(gates + i, number % g.team) : A(0);
        },
        [&](int number, A gate) {
          const Box box(g.boxes, p.space, number);
          const int x = i % box.width, y = i / box.width % box.height,
                    z = i / box.width / box.height;
          if (i < box.pixels())
            m.spatial[box.sample * block.pixels + box.pixel(p.space, z, y, x)] = gate;
        });
  __syncthreads();
}

template <bool kTraining, bool kChannelsFirst, class T>
__device__ __forceinline__ void gate_all_pixels(const Resident& p,
                                                const ResidentBlock<T, kChannelsFirst>& block,
                                                const Memory<T>& m) {
  const int band = p.geometry.band;
  for (int first = 0; first < block.pixels; first += band) {
    const int end = min(first + band, block.pixels);
    put_out_maps<kTraining>(p, block, m, first, end);
    block.team.barrier();
    gate_boxes<kTraining>(p, block, m, first, end);
    block.team.barrier();
  }
  collect_gates(p, block, m);
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
__device__ __forceinline__ void scale_chunk(const Resident& p,
                                            const ResidentBlock<T, kChannelsFirst>& block,
                                            const Memory<T>& m, int sample, int number) {
  using A = acc_t<T>;
  constexpr int kCount = kVector<T>;
  const ResidentGeometry& g = p.geometry;
  const Chunk chunk(g, block.rows, number);
  const A* channels = m.shared.gate + sample * g.channels;
  const A* pixels = m.spatial + sample * block.pixels;
  const T* tile = m.shared.tile + int64_t{sample} * g.rows * g.pitch;
  T* out = static_cast<T*>(p.out) + (block.first_sample + sample) * p.out_sample_stride +
           block.first_channel * (kChannelsFirst ? p.out_row_stride : 1);
  // Counted from the slice's first element, as if there were no gaps between rows.
  const int begin = chunk.first * block.cols, vectors = chunk.count * block.cols / kCount;
  for (int v = threadIdx.x; v < vectors; v += g.threads) {
    const int at = begin + v * kCount, row = at / block.cols, col = at - row * block.cols;
    const T* from = tile + (kChannelsFirst ? at : row * g.pitch + col);
    auto pack = widen(load_staged<kCount>(from));
    const VectorGates<kChannelsFirst, kWhole, kCount, A> gates(channels, pixels, row, col,
                                                               block.cols);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      pack.value[i] = pack.value[i] * gates.channel[i] * gates.pixel[i];
    store(kChannelsFirst ? out + at : out + row * p.out_row_stride + col, pack);
  }
}

template <class T, bool kChannelsFirst, bool kTraining>
__global__ void __launch_bounds__(kMostTeamThreads, 1) resident_forward_kernel(const Resident p) {
  const ResidentGeometry& g = p.geometry;
  const Memory<T> m = carve<kTraining, T>(p);
  ResidentBlock<T, kChannelsFirst> block(p);
  prepare(p, m);
  const auto load = [&](int64_t visit, int sample, int number) {
    load_chunk(p, block, m.shared.tile, m.shared.landed, visit * g.samples, sample, number);
  };
  for (int sample = 0; sample < block.samples_of(p, block.number); ++sample)
    for (int number = 0; number < g.chunks; ++number) load(block.number, sample, number);
  prefetch_weights(p, block);
  const bool whole = block.cols % kVector<T> == 0;  // of a row: always so where channels come last
  const int64_t visits = (p.samples + g.samples - 1) / g.samples;
  const int64_t rounds = (visits + g.teams - 1) / g.teams;  // of every team, for its barriers' sake
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t visit = block.number + round * g.teams, next = visit + g.teams;
    block.start(p, visit, round);
    __syncthreads();
    pool<kTraining>(p, block, m);
    gate_all_channels<kTraining>(p, block, m);
    gate_all_pixels<kTraining>(p, block, m);
    const int following = block.samples_of(p, next);
    for (int sample = 0; sample < block.samples; ++sample)
      for (int number = 0; number < g.chunks; ++number) {
        if (whole)
          scale_chunk<true>(p, block, m, sample, number);
        else
          scale_chunk<false>(p, block, m, sample, number);
        __syncthreads();
        if (sample < following) load(next, sample, number);
      }
  }
  if (g.cluster) block.team.barrier();  // others may still read what this block put out
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

void resident_forward(DType dtype, bool channels_first, const Resident& p, const Grid& grid,
                      Stream stream) {
  with_kernel(dtype, channels_first, p.saved.spatial_gate != nullptr,
              [&](auto kernel) { launch("resident_forward", kernel, grid, stream, p); });
}

bool can_run_resident(DType dtype, bool channels_first, bool training, const Grid& grid) {
  bool can = false;
  with_kernel(dtype, channels_first, training, [&](auto kernel) { can = can_run(kernel, grid); });
  return can;
}

}  // namespace cbam::cuda
