// The channel gate backwards, a launch for each layer of the MLP:
//
//   dm          = d_channel * channel_gate * (1 - channel_gate)
//   d_hidden[p] = W2^T dm where hidden[p] passed the ReLU      p: mean, max
//   d_pooled[p] = W1^T d_hidden[p], the mean's divided by the pixels
//
// Both take kSamplesPerWalk samples at a time. The gradients of the weights are products of what
// these leave with what the forward saved: weight_gradients.cu.
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "tile_sums.cuh"

namespace cbam::cuda {
namespace {

// dm of channels [first, first + count) of the block's samples, absent ones zero; the first block
// of a group of samples also writes it.
template <class A>
__device__ __forceinline__ void stage_dm(const ChannelGateBackward& p, int64_t first_sample,
                                         int first, int count, bool writes, A* staged) {
  const A* gate = static_cast<const A*>(p.channel_gate);
  const A* more = static_cast<const A*>(p.d_channel_gate);
  for (int i = threadIdx.x; i < kSamplesPerWalk * kChannelChunk; i += kThreads) {
    const int s = i / kChannelChunk, k = i % kChannelChunk;
    const int64_t n = first_sample + s, at = n * p.channels + first + k;
    A dm = A(0);
    if (n < p.samples && k < count) {
      const A d = total_of<A>(p.cross, n, p.channels, first + k) +
                  total_of<A>(p.terms, n, p.channels, first + k) + (more ? more[at] : A(0));
      dm = d * sigmoid_derivative<A>(gate[at]);
      if (writes) static_cast<A*>(p.dm)[at] = dm;
    }
    staged[i] = dm;
  }
}

// grid    ceil(samples / kSamplesPerWalk) * ceil(hidden units / kBackwardUnits) blocks of 256
//         threads; a lane takes two hidden units, a warp every eighth channel
// shared  dm of a chunk of channels, the warps' sums
// bytes   reads W2 once a group of samples; every block of the group reads the parts of d_channel
template <class W, class A>
__global__ void __launch_bounds__(kThreads, 2)
    gate_layer_backward_kernel(const ChannelGateBackward p) {
  constexpr int kWarps = kThreads / 32, kUnits = kBackwardUnits / 32;
  static_assert(kWarps == kSamplesPerWalk, "a warp for each sample at the end");
  const int tiles = (p.hidden_units + kBackwardUnits - 1) / kBackwardUnits;
  const int tile = blockIdx.x % tiles;
  const int64_t first_sample = static_cast<int64_t>(blockIdx.x / tiles) * kSamplesPerWalk;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_unit = tile * kBackwardUnits + lane;  // and every 32nd
  SharedCarver carver(dynamic_shared_memory());
  const GateBackwardShared<A> shared(carver);
  A sum[kUnits][kSamplesPerWalk] = {};
  for (int first = 0; first < p.channels; first += kChannelChunk) {
    const int count = min(kChannelChunk, p.channels - first);
    stage_dm(p, first_sample, first, count, tile == 0, shared.dm);
    __syncthreads();
#pragma unroll 4
    for (int k = warp; k < count; k += kWarps)
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int unit = first_unit + 32 * u;
        if (unit >= p.hidden_units) break;
        const A weight =
            widen(static_cast<const W*>(p.fc2_weight)[int64_t{first + k} * p.hidden_units + unit]);
#pragma unroll
        for (int s = 0; s < kSamplesPerWalk; ++s)
          sum[u][s] += weight * shared.dm[s * kChannelChunk + k];
      }
    __syncthreads();
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u)
#pragma unroll
    for (int s = 0; s < kSamplesPerWalk; ++s)
      shared.partial[(warp * kSamplesPerWalk + s) * kBackwardUnits + lane + 32 * u] = sum[u][s];
  __syncthreads();
  const int64_t n = first_sample + warp;
  if (n >= p.samples) return;
  for (int u = 0; u < kUnits; ++u) {
    const int unit = first_unit + 32 * u;
    if (unit >= p.hidden_units) return;
    A total = A(0);
    for (int w = 0; w < kWarps; ++w)
      total += shared.partial[(w * kSamplesPerWalk + warp) * kBackwardUnits + lane + 32 * u];
    const int64_t at = n * 2 * p.hidden_units + unit;
    const A* hidden = static_cast<const A*>(p.hidden);
    A* d_hidden = static_cast<A*>(p.d_hidden);
    d_hidden[at] = relu_passes(hidden[at]) ? total : A(0);
    d_hidden[at + p.hidden_units] = relu_passes(hidden[at + p.hidden_units]) ? total : A(0);
  }
}

// grid    ceil(samples / kSamplesPerWalk) * ceil(channels / kBackwardChannels) blocks of
//         kBackwardChannels threads; a thread takes one channel
// shared  d_hidden of a chunk of hidden units
// bytes   reads W1 once a group of samples; every block of the group reads d_hidden
template <class W, class A>
__global__ void __launch_bounds__(kBackwardChannels)
    hidden_layer_backward_kernel(const ChannelGateBackward p) {
  const int tiles = (p.channels + kBackwardChannels - 1) / kBackwardChannels;
  const int channel = blockIdx.x % tiles * kBackwardChannels + threadIdx.x;
  const int64_t first_sample = static_cast<int64_t>(blockIdx.x / tiles) * kSamplesPerWalk;
  SharedCarver carver(dynamic_shared_memory());
  const HiddenBackwardShared<A> shared(carver);
  A sum[2 * kSamplesPerWalk] = {};
  for (int first = 0; first < p.hidden_units; first += kUnitChunk) {
    const int count = min(kUnitChunk, p.hidden_units - first);
    for (int i = threadIdx.x; i < 2 * kSamplesPerWalk * kUnitChunk; i += kBackwardChannels) {
      const int v = i / kUnitChunk, u = i % kUnitChunk;
      const int64_t vector = first_sample * 2 + v;
      shared.d_hidden[i] =
          vector < 2 * int64_t{p.samples} && u < count
              ? static_cast<const A*>(p.d_hidden)[vector * p.hidden_units + first + u]
              : A(0);
    }
    __syncthreads();
    if (channel < p.channels)
#pragma unroll 4
      for (int u = 0; u < count; ++u) {
        const A weight =
            widen(static_cast<const W*>(p.fc1_weight)[int64_t{first + u} * p.channels + channel]);
#pragma unroll
        for (int v = 0; v < 2 * kSamplesPerWalk; ++v)
          sum[v] += weight * shared.d_hidden[v * kUnitChunk + u];
      }
    __syncthreads();
  }
  if (channel >= p.channels) return;
#pragma unroll
  for (int v = 0; v < 2 * kSamplesPerWalk; ++v) {
    const int64_t vector = first_sample * 2 + v;
    if (vector < 2 * int64_t{p.samples})
      static_cast<A*>(p.d_pooled)[vector * p.channels + channel] =
          v % 2 ? sum[v] : sum[v] / static_cast<A>(p.pixels);
  }
}

}  // namespace

void gate_layer_backward(const ChannelGateBackward& p, const Grid& grid, Stream stream) {
  with_storage(p.dtype, [&](auto weight) {
    using W = typename decltype(weight)::type;
    launch("gate_layer_backward", gate_layer_backward_kernel<W, acc_t<W>>, grid, stream, p);
  });
}

void hidden_layer_backward(const ChannelGateBackward& p, const Grid& grid, Stream stream) {
  with_storage(p.dtype, [&](auto weight) {
    using W = typename decltype(weight)::type;
    launch("hidden_layer_backward", hidden_layer_backward_kernel<W, acc_t<W>>, grid, stream, p);
  });
}

}  // namespace cbam::cuda
