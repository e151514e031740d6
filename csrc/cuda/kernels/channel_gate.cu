// The channel gate: one MLP over both pooled vectors of every sample, a launch for each layer, or
// one for both where a block has warps for all hidden units.
//
//   hidden[p] = relu(W1 pooled[p] + b1)                      p: mean, max
//   gate      = sigmoid(W2 (hidden[mean] + hidden[max]) + 2 b2)
//
// Both layers take several samples at a time, so that the weights are read once for all of them.
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/dependent_launch.cuh"
#include "blocks.cuh"
#include "kernels.h"

namespace cbam::cuda {
namespace {

// What the block's pooled vectors have at one channel, mean and maximum of each sample.
template <class A, int kSamples>
struct PooledChannel {
  A value[2 * kSamples];
};

// Channels [first, first + count) of pooled vectors that have one part, into shared memory; absent
// samples are zeros.
template <int kSamples, class A>
__device__ __forceinline__ void stage_pooled(const ChannelGate& p, int64_t first_sample, int first,
                                             int count, A* pooled) {
  using Channel = PooledChannel<A, kSamples>;
  const auto read = [&](int k) {
    Channel channel;
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      const int64_t n = first_sample + s;
      Extremes<A, false> e;
      e.max = A(0);
      if (n < p.samples) e = read_part<false, A>(p.parts, n, 0, p.channels, first + k);
      channel.value[2 * s] = e.sum;
      channel.value[2 * s + 1] = e.max;
    }
    return channel;
  };
  for_batches<8 / kSamples>(threadIdx.x, count, kThreads, read, [&](int k, const Channel& channel) {
    store_shared(pooled + k * HiddenShared<A, kSamples>::kPitch, channel.value);
  });
}

// The same where parts are to be merged; the first block of a group of samples may save them.
template <bool kSaves, int kSamples, class A>
__device__ __forceinline__ void stage_merged(const ChannelGate& p, int64_t first_sample, int first,
                                             int count, A* pooled) {
  for (int i = threadIdx.x; i < kSamples * count; i += kThreads) {
    const int s = i / count, k = i - s * count, c = first + k;
    const int64_t n = first_sample + s;
    A mean = A(0), max = A(0);
    if (n < p.samples) {
      const auto e = merge_parts<kSaves, A, 8>(p.parts, n, p.channels, c);
      mean = e.sum;
      max = e.max;
      if constexpr (kSaves) {
        A* saved = static_cast<A*>(p.pooled) + n * 2 * p.channels + c;
        saved[0] = mean;
        saved[p.channels] = max;
        p.argmax[n * p.channels + c] = e.argmax;
      }
    }
    A* at = pooled + k * HiddenShared<A, kSamples>::kPitch + 2 * s;
    at[0] = mean;
    at[1] = max;
  }
}

// Weights of a warp's hidden units for one channel; zeros for units that do not exist.
template <class W>
struct UnitWeights {
  W value[kUnitsPerWarp];
};

// What channels [first, first + count) add to the sums of a warp; its lanes, and those of the other
// warps that have the same units, take every `step`-th channel.
template <int kSamples, class W, class A>
__device__ __forceinline__ void add_channels(const ChannelGate& p, int first_unit, int first,
                                             int own, int count, int step, const A* pooled,
                                             A (&sum)[HiddenShared<A, kSamples>::kSums]) {
  const W* weights = static_cast<const W*>(p.fc1_weight) + int64_t{first_unit} * p.channels + first;
  const auto read = [&](int k) {
    UnitWeights<W> weight;
#pragma unroll
    for (int u = 0; u < kUnitsPerWarp; ++u)
      weight.value[u] =
          first_unit + u < p.hidden_units ? weights[int64_t{u} * p.channels + k] : W();
    return weight;
  };
  constexpr int kBatch = 4;
  for_batches<kBatch>(own, count, step, read, [&](int k, const UnitWeights<W>& weight) {
    A value[2 * kSamples];
    load_shared(pooled + k * HiddenShared<A, kSamples>::kPitch, true, value);
#pragma unroll
    for (int u = 0; u < kUnitsPerWarp; ++u) {
      const A w = widen(weight.value[u]);
#pragma unroll
      for (int v = 0; v < 2 * kSamples; ++v) sum[u * 2 * kSamples + v] += w * value[v];
    }
  });
}

// The sums over the warp of each lane's `sum`, to shared memory.
template <int kCount, class A>
__device__ __forceinline__ void put_sums(const A (&sum)[kCount], A* to) {
  constexpr int kTogether = kCount < 32 ? kCount : 32;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int first = 0; first < kCount; first += kTogether) {
    A some[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) some[i] = sum[first + i];
    const A total = sums_of_warp(some);
    if (lane < kTogether) to[first + lane] = total;
  }
}

// Hidden units of a block: those from `first` on, so many of them for all its warps.
struct UnitTile {
  int number, first, units;

  __device__ __forceinline__ UnitTile(const ChannelGate& p, int number_)
      : number(number_),
        first(number * p.geometry.unit_warps * kUnitsPerWarp),
        units(p.geometry.unit_warps * kUnitsPerWarp) {}
};

template <class W, int kSamples, class A>
__device__ __forceinline__ void stage_bias(const ChannelGate& p, const UnitTile& tile,
                                           const HiddenShared<A, kSamples>& shared) {
  if (threadIdx.x >= tile.units) return;
  const int unit = tile.first + threadIdx.x;
  shared.bias[threadIdx.x] = p.fc1_bias && unit < p.hidden_units
                                 ? A(widen(static_cast<const W*>(p.fc1_bias)[unit]))
                                 : A(0);
}

// Hidden units of a tile for the block's samples. put(i, v, value): unit i of the tile in vector v,
// which is the mean's or the maximum's of sample v / 2; absent samples have some value.
template <class W, int kSamples, class A, class Put>
__device__ __forceinline__ void make_hidden(const ChannelGate& p, const UnitTile& tile,
                                            int64_t first_sample,
                                            const HiddenShared<A, kSamples>& shared, Put put) {
  using Shared = HiddenShared<A, kSamples>;
  const int unit_warps = p.geometry.unit_warps, slices = kThreads / 32 / unit_warps;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  A sum[Shared::kSums] = {};
  for (int first = 0; first < p.channels; first += Shared::kChunk) {
    const int count = min(Shared::kChunk, p.channels - first);
    if (p.parts.splits == 1)
      stage_pooled<kSamples>(p, first_sample, first, count, shared.pooled);
    else if (p.pooled && tile.number == 0)
      stage_merged<true, kSamples>(p, first_sample, first, count, shared.pooled);
    else
      stage_merged<false, kSamples>(p, first_sample, first, count, shared.pooled);
    __syncthreads();
    add_channels<kSamples, W>(p, tile.first + warp % unit_warps * kUnitsPerWarp, first,
                              warp / unit_warps * 32 + lane, count, slices * 32, shared.pooled,
                              sum);
    __syncthreads();
  }
  put_sums(sum, shared.partial + warp * Shared::kSums);
  __syncthreads();
  for (int i = threadIdx.x; i < unit_warps * Shared::kSums; i += kThreads) {
    const int within = i / Shared::kVectors, unit = tile.first + within;
    const int v = i % Shared::kVectors;
    if (unit >= p.hidden_units) continue;
    A total = A(0);
    for (int slice = 0; slice < slices; ++slice)
      total += shared.partial[slice * unit_warps * Shared::kSums + i];
    const A value = relu(total + shared.bias[within]);
    const int64_t n = first_sample + v / 2;
    if (n < p.samples) static_cast<A*>(p.hidden)[(n * 2 + v % 2) * p.hidden_units + unit] = value;
    put(within, v, value);
  }
}

// grid    ceil(samples / kSamples) * tiles blocks of 256 threads; a warp takes kUnitsPerWarp hidden
//         units, its lanes and those of the warps beside it the channels
// shared  pooled vectors of a chunk of channels, biases, the warps' sums
// bytes   reads W1 once a group of samples; every block of the group reads the pooled parts
template <class W, class A, int kSamples>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 8 ? 1 : 2)
    hidden_layer_kernel(const ChannelGate p) {
  const int units = p.geometry.unit_warps * kUnitsPerWarp;
  const int tiles = (p.hidden_units + units - 1) / units;
  const UnitTile tile(p, blockIdx.x % tiles);
  SharedCarver carver(dynamic_shared_memory());
  const HiddenShared<A, kSamples> shared(carver);
  stage_bias<W>(p, tile, shared);
  wait_for_previous_launch();
  make_hidden<W>(p, tile, static_cast<int64_t>(blockIdx.x / tiles) * kSamples, shared,
                 [](int, int, A) {});
}

// The hidden vectors of mean and max, added, hidden units [first, first + count), into shared
// memory, a unit a thread; absent samples are zeros.
template <int kSamples, class A>
__device__ __forceinline__ void stage_hidden(const ChannelGate& p, int64_t first_sample, int first,
                                             int count, A* hidden) {
  static_assert(kUnitChunk == kGateChannels, "a thread for each unit");
  const int u = threadIdx.x;
  if (u >= count) return;
  A mean[kSamples], max[kSamples];
#pragma unroll
  for (int s = 0; s < kSamples; ++s) {
    const int64_t n = first_sample + s;
    const A* at = static_cast<const A*>(p.hidden) + n * 2 * p.hidden_units + first + u;
    mean[s] = n < p.samples ? at[0] : A(0);
    max[s] = n < p.samples ? at[p.hidden_units] : A(0);
  }
#pragma unroll
  for (int s = 0; s < kSamples; ++s) mean[s] += max[s];
  store_shared(hidden + u * kSamples, mean);
}

// What `count` hidden units add to the sums of one channel, whose row of weights is read kCount
// elements at a time.
template <int kCount, int kSamples, class W, class A>
__device__ __forceinline__ void add_units(const W* row, int count, const A* hidden,
                                          A (&z)[kSamples]) {
  constexpr int kBatch = kSamples == kFewSamples ? 8 : 4;
  const auto read = [&](int i) { return load<kCount>(row + i * kCount); };
  for_batches<kBatch>(0, count / kCount, 1, read, [&](int i, const Raw<W, kCount>& raw) {
    const Pack<W, kCount> weight = widen<W>(raw);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      A value[kSamples];
      load_shared(hidden + (i * kCount + e) * kSamples, true, value);
#pragma unroll
      for (int s = 0; s < kSamples; ++s) z[s] += weight.value[e] * value[s];
    }
  });
}

// The same of a row read in vectors where that can be.
template <int kSamples, class W, class A>
__device__ __forceinline__ void add_units(const ChannelGate& p, const W* row, int count,
                                          const A* hidden, A (&z)[kSamples]) {
  if (p.geometry.vectors)
    add_units<kVector<W>>(row, count, hidden, z);
  else
    add_units<1>(row, count, hidden, z);
}

template <class W>
__device__ __forceinline__ acc_t<W> bias_of_gate(const ChannelGate& p, int channel) {
  return p.fc2_bias ? widen(static_cast<const W*>(p.fc2_bias)[channel]) : acc_t<W>(0);
}

// The gates of one channel, from its sums.
template <int kSamples, class A>
__device__ __forceinline__ void put_gates(const ChannelGate& p, int64_t first_sample, int channel,
                                          A bias, const A (&z)[kSamples]) {
#pragma unroll
  for (int s = 0; s < kSamples; ++s)
    if (first_sample + s < p.samples)
      static_cast<A*>(p.gate)[(first_sample + s) * p.channels + channel] =
          sigmoid(z[s] + A(2) * bias);
}

// grid    ceil(samples / kSamples) * ceil(channels / kGateChannels) blocks of kGateChannels
//         threads; a thread takes one channel of the group's samples
// shared  kUnitChunk * kSamples * acc
// bytes   reads W2 once a group of samples; every block of the group reads the hidden vectors
template <class W, class A, int kSamples>
__global__ void __launch_bounds__(kGateChannels, 4) gate_layer_kernel(const ChannelGate p) {
  const int tiles = (p.channels + kGateChannels - 1) / kGateChannels;
  const int channel = blockIdx.x % tiles * kGateChannels + threadIdx.x;
  const bool inside = channel < p.channels;
  const int64_t first_sample = static_cast<int64_t>(blockIdx.x / tiles) * kSamples;
  SharedCarver carver(dynamic_shared_memory());
  const GateShared<A, kSamples> shared(carver);
  const A bias = inside ? bias_of_gate<W>(p, channel) : A(0);
  const W* row =
      static_cast<const W*>(p.fc2_weight) + (inside ? int64_t{channel} * p.hidden_units : 0);
  wait_for_previous_launch();
  A z[kSamples] = {};
  for (int first = 0; first < p.hidden_units; first += kUnitChunk) {
    const int count = min(kUnitChunk, p.hidden_units - first);
    stage_hidden<kSamples>(p, first_sample, first, count, shared.hidden);
    __syncthreads();
    if (inside) add_units(p, row + first, count, shared.hidden, z);
    __syncthreads();
  }
  if (inside) put_gates(p, first_sample, channel, bias, z);
}

// grid    ceil(samples / kSamples) blocks of 256 threads: as in the first layer, then every 256th
//         channel a thread
// shared  what the first layer takes, and the hidden vectors
// bytes   reads W1, W2 and the pooled parts once a group of samples
template <class W, class A, int kSamples>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 8 ? 1 : 2)
    both_layers_kernel(const ChannelGate p) {
  const UnitTile all(p, 0);
  const int64_t first_sample = int64_t{blockIdx.x} * kSamples;
  SharedCarver carver(dynamic_shared_memory());
  const BothShared<A, kSamples> shared(carver);
  stage_bias<W>(p, all, shared.first);
  wait_for_previous_launch();
  // [hidden units, samples, mean and maximum], where the pooled vectors were.
  A* pairs = shared.first.pooled;
  make_hidden<W>(p, all, first_sample, shared.first,
                 [&](int unit, int v, A value) { pairs[unit * 2 * kSamples + v] = value; });
  __syncthreads();
  for (int i = threadIdx.x; i < p.hidden_units * kSamples; i += kThreads)
    shared.hidden[i] = pairs[2 * i] + pairs[2 * i + 1];
  __syncthreads();
  for (int channel = threadIdx.x; channel < p.channels; channel += kThreads) {
    A z[kSamples] = {};
    add_units(p, static_cast<const W*>(p.fc2_weight) + int64_t{channel} * p.hidden_units,
              p.hidden_units, shared.hidden, z);
    put_gates(p, first_sample, channel, bias_of_gate<W>(p, channel), z);
  }
}

}  // namespace

void hidden_layer(const ChannelGate& p, const Grid& grid, Stream stream) {
  with_walk(p.dtype, p.geometry.hidden_samples, [&](auto weight, auto samples) {
    using W = typename decltype(weight)::type;
    launch("hidden_layer", hidden_layer_kernel<W, acc_t<W>, samples()>, grid, stream, p);
  });
}

void gate_layer(const ChannelGate& p, const Grid& grid, Stream stream) {
  with_walk(p.dtype, p.geometry.gate_samples, [&](auto weight, auto samples) {
    using W = typename decltype(weight)::type;
    launch("gate_layer", gate_layer_kernel<W, acc_t<W>, samples()>, grid, stream, p);
  });
}

void both_layers(const ChannelGate& p, const Grid& grid, Stream stream) {
  with_walk(p.dtype, p.geometry.hidden_samples, [&](auto weight, auto samples) {
    using W = typename decltype(weight)::type;
    launch("both_layers", both_layers_kernel<W, acc_t<W>, samples()>, grid, stream, p);
  });
}

}  // namespace cbam::cuda
