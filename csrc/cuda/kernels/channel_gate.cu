// The channel gate: one MLP over both pooled vectors of every sample, a launch for each layer.
//
//   hidden[p] = relu(W1 pooled[p] + b1)                      p: mean, max
//   gate      = sigmoid(W2 (hidden[mean] + hidden[max]) + 2 b2)
//
// Both layers take kSamplesPerWalk samples at a time, so that the weights are read once for all of
// them.
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/reduce.cuh"
#include "blocks.cuh"
#include "kernels.h"

namespace cbam::cuda {
namespace {

constexpr int kPooled = 2 * kSamplesPerWalk;  // pooled vectors of a block

// Channels [first, first + count) of the block's pooled vectors, their parts merged, into shared
// memory; absent samples are zeros. The first block of a group also saves them.
template <class A>
__device__ __forceinline__ void stage_pooled(const ChannelGate& p, int64_t first_sample, int first,
                                             int count, bool saves, A* pooled) {
  for (int i = threadIdx.x; i < kSamplesPerWalk * kChannelChunk; i += blockDim.x) {
    const int s = i / kChannelChunk, k = i % kChannelChunk, c = first + k;
    const int64_t n = first_sample + s;
    A mean = A(0), max = A(0);
    if (n < p.samples && k < count) {
      if (saves) {
        const auto e = merge_parts<true, A>(p.parts, n, p.channels, c);
        A* saved = static_cast<A*>(p.pooled) + n * 2 * p.channels + c;
        saved[0] = mean = e.sum;
        saved[p.channels] = max = e.max;
        p.argmax[n * p.channels + c] = e.argmax;
      } else {
        const auto e = merge_parts<false, A>(p.parts, n, p.channels, c);
        mean = e.sum;
        max = e.max;
      }
    }
    pooled[(2 * s) * kChannelChunk + k] = mean;
    pooled[(2 * s + 1) * kChannelChunk + k] = max;
  }
}

// grid    ceil(samples / kSamplesPerWalk) * tiles blocks of 32 to 256 threads; a warp takes
//         kUnitsPerWarp hidden units, its lanes the channels
// shared  kPooled * kChannelChunk * acc
// bytes   reads W1 once a group of samples; every block of the group reads the pooled parts
template <class W, class A>
__global__ void __launch_bounds__(kThreads) hidden_layer_kernel(const ChannelGate p) {
  const int units_per_block = blockDim.x / 32 * kUnitsPerWarp;
  const int tiles = (p.hidden_units + units_per_block - 1) / units_per_block;
  const int tile = blockIdx.x % tiles;
  const int64_t first_sample = static_cast<int64_t>(blockIdx.x / tiles) * kSamplesPerWalk;
  const int lane = threadIdx.x % 32;
  const int first_unit = tile * units_per_block + threadIdx.x / 32 * kUnitsPerWarp;
  SharedCarver carver(dynamic_shared_memory());
  const HiddenShared<A> shared(carver);
  A sum[kUnitsPerWarp][kPooled] = {};
  for (int first = 0; first < p.channels; first += kChannelChunk) {
    const int count = min(kChannelChunk, p.channels - first);
    stage_pooled(p, first_sample, first, count, p.pooled && tile == 0, shared.pooled);
    __syncthreads();
    for (int k = lane; k < count; k += 32) {
      A weight[kUnitsPerWarp];
#pragma unroll
      for (int u = 0; u < kUnitsPerWarp; ++u)
        weight[u] = first_unit + u < p.hidden_units
                        ? widen(static_cast<const W*>(
                              p.fc1_weight)[int64_t{first_unit + u} * p.channels + first + k])
                        : A(0);
#pragma unroll
      for (int v = 0; v < kPooled; ++v) {
        const A value = shared.pooled[v * kChannelChunk + k];
#pragma unroll
        for (int u = 0; u < kUnitsPerWarp; ++u) sum[u][v] += weight[u] * value;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int u = 0; u < kUnitsPerWarp; ++u) {
    const int unit = first_unit + u;
    const bool inside = unit < p.hidden_units;
    A bias = A(0);
    if (lane == 0 && inside && p.fc1_bias) bias = widen(static_cast<const W*>(p.fc1_bias)[unit]);
    bias = __shfl_sync(0xffffffffu, bias, 0);
#pragma unroll
    for (int v = 0; v < kPooled; ++v) {
      const A total = sum_of_warp(sum[u][v]);
      const int64_t n = first_sample + v / 2;
      if (inside && lane == v && n < p.samples)
        static_cast<A*>(p.hidden)[(n * 2 + v % 2) * p.hidden_units + unit] = relu(total + bias);
    }
  }
}

// W2's rows and the summed hidden vectors, hidden units [first, first + count), into shared memory.
template <class W, class A>
__device__ __forceinline__ void stage_units(const ChannelGate& p, int64_t first_sample,
                                            int first_channel, int first, int count,
                                            const GateShared<A>& shared) {
  for (int i = threadIdx.x; i < kGateChannels * kUnitChunk; i += kGateChannels) {
    const int c = i / kUnitChunk, u = i % kUnitChunk;
    if (u < count && first_channel + c < p.channels)
      shared.weight[c * (kUnitChunk + 1) + u] = widen(static_cast<const W*>(
          p.fc2_weight)[int64_t{first_channel + c} * p.hidden_units + first + u]);
  }
  for (int i = threadIdx.x; i < kSamplesPerWalk * kUnitChunk; i += kGateChannels) {
    const int s = i / kUnitChunk, u = i % kUnitChunk;
    const int64_t n = first_sample + s;
    A both = A(0);
    if (n < p.samples && u < count) {
      const A* hidden = static_cast<const A*>(p.hidden) + n * 2 * p.hidden_units + first + u;
      both = hidden[0] + hidden[p.hidden_units];
    }
    shared.hidden[u * kSamplesPerWalk + s] = both;
  }
}

// grid    ceil(samples / kSamplesPerWalk) * ceil(channels / kGateChannels) blocks of kGateChannels
//         threads; a thread takes one channel of the group's samples
// shared  (kGateChannels * (kUnitChunk + 1) + kUnitChunk * kSamplesPerWalk) * acc
// bytes   reads W2 once a group of samples; every block of the group reads the hidden vectors
template <class W, class A>
__global__ void __launch_bounds__(kGateChannels) gate_layer_kernel(const ChannelGate p) {
  const int tiles = (p.channels + kGateChannels - 1) / kGateChannels;
  const int first_channel = blockIdx.x % tiles * kGateChannels;
  const int64_t first_sample = static_cast<int64_t>(blockIdx.x / tiles) * kSamplesPerWalk;
  SharedCarver carver(dynamic_shared_memory());
  const GateShared<A> shared(carver);
  A z[kSamplesPerWalk] = {};
  const int own = threadIdx.x, channel = first_channel + own;
  for (int first = 0; first < p.hidden_units; first += kUnitChunk) {
    const int count = min(kUnitChunk, p.hidden_units - first);
    stage_units<W>(p, first_sample, first_channel, first, count, shared);
    __syncthreads();
    if (channel < p.channels)
      for (int u = 0; u < count; ++u) {
        const A weight = shared.weight[own * (kUnitChunk + 1) + u];
#pragma unroll
        for (int s = 0; s < kSamplesPerWalk; ++s)
          z[s] += weight * shared.hidden[u * kSamplesPerWalk + s];
      }
    __syncthreads();
  }
  if (channel >= p.channels) return;
  const A bias = p.fc2_bias ? A(widen(static_cast<const W*>(p.fc2_bias)[channel])) : A(0);
#pragma unroll
  for (int s = 0; s < kSamplesPerWalk; ++s)
    if (first_sample + s < p.samples)
      static_cast<A*>(p.gate)[(first_sample + s) * p.channels + channel] =
          sigmoid(z[s] + A(2) * bias);
}

// Calls body(W, A) for the dtype of the weights and the accumulator's.
template <class Body>
void with_weights(const ChannelGate& p, Body body) {
  with_storage(p.dtype, [&](auto weight) {
    using W = typename decltype(weight)::type;
    body(weight, Type<acc_t<W>>());
  });
}

}  // namespace

void hidden_layer(const ChannelGate& p, const Grid& grid, Stream stream) {
  with_weights(p, [&](auto weight, auto acc) {
    launch("hidden_layer",
           hidden_layer_kernel<typename decltype(weight)::type, typename decltype(acc)::type>, grid,
           stream, p);
  });
}

void gate_layer(const ChannelGate& p, const Grid& grid, Stream stream) {
  with_weights(p, [&](auto weight, auto acc) {
    launch("gate_layer",
           gate_layer_kernel<typename decltype(weight)::type, typename decltype(acc)::type>, grid,
           stream, p);
  });
}

}  // namespace cbam::cuda
