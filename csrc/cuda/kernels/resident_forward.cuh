// The whole forward in one launch, on samples that stay on the chip: a team of blocks holds a few
// of them, each block a slice of the channels, or of one sample's pixels. What concerns all
// channels or all pixels goes round the team.
//
//   channel_gate[c] = sigmoid(W2 (relu(W1 avg + b1) + relu(W1 max + b1)) + 2 b2)
//   spatial_gate[s] = sigmoid(conv(mean and max over c of x * channel_gate) + bias)
//   out[c][s]       = x[c][s] * channel_gate[c] * spatial_gate[s], and what follows (ending.cuh)
//
// grid    teams * team blocks of 256 or 512 threads, as clusters of `team` blocks or all at once; a
//         team visits `samples` samples, then those `teams` visits further on, which begin to
//         arrive while it writes out
// shared  the slice; the weights of the channels whose gates the block makes, where there is room;
//         the pixels whose gates it computes, with their halo; both gates; what it puts out for the
//         other blocks of a cluster
// bytes   reads x and the residual once, writes out once; reads the weights of the MLP once a
//         visit, or once a team where they stay. In training also writes what is saved. Blocks that
//         are no cluster exchange through global memory.
#pragma once

#include "../dispatch.cuh"
#include "../launch.cuh"
#include "resident_channel_gate.cuh"
#include "resident_output.cuh"
#include "resident_pool.cuh"
#include "resident_spatial_gate.cuh"
#include "resident_spatial_gate_pixels.cuh"

namespace cbam::cuda {

template <bool kTraining, class T>
__device__ __forceinline__ ForwardMemory<T> memory_of(const ResidentForward& p) {
  using A = acc_t<T>;
  const ResidentForwardGeometry& g = p.geometry;
  LaidOutCarver carver(dynamic_shared_memory(), p.layout);
  const ResidentForwardShared<T, A> shared(carver, g, p.hidden, p.space, kTraining);
  if (kHasClusters && g.cluster) {
    const ForwardExchange<A> exchange(carver, g, p.hidden, p.space, kTraining);
    return {shared, exchange, g.gates_replace_maps() ? exchange.maps : shared.spatial};
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

template <class T, bool kChannelsFirst, bool kTraining, Split kSplit>
__global__ void __launch_bounds__(kForwardThreads, 1)
    resident_forward_kernel(const ResidentForward p) {
  const ResidentForwardGeometry& g = p.geometry;
  const ForwardMemory<T> m = memory_of<kTraining, T>(p);
  ResidentBlock<T, kChannelsFirst, kSplit> block(p, g);
  prepare(p, m);
  const auto load = [&](int round, int sample, int number) {
    if (!copies(g, sample * g.chunks + number)) return;
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
    if (g.fetches_ahead) fetch_ahead(g, block, p.x);
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
template <Split kSplit, class Body>
void with_kernel(DType dtype, bool channels_first, bool training, Body body) {
  with_storage(dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    if constexpr (!std::is_same_v<T, double>)
      with_bool(channels_first, [&](auto first) {
        with_bool(training, [&](auto kept) {
          body(resident_forward_kernel<T, first.value, kept.value, kSplit>);
        });
      });
  });
}

template <Split kSplit>
void resident_forward(DType dtype, bool channels_first, const ResidentForward& p, const Grid& grid,
                      Stream stream) {
  with_kernel<kSplit>(dtype, channels_first, p.saved.spatial_gate != nullptr,
                      [&](auto kernel) { launch("resident_forward", kernel, grid, stream, p); });
}

template <Split kSplit>
const char* why_no_resident_forward(DType dtype, bool channels_first, bool training,
                                    const Grid& grid) {
  const char* reason = kNoResidentKernel;
  with_kernel<kSplit>(dtype, channels_first, training,
                      [&](auto kernel) { reason = why_not_run(kernel, grid); });
  return reason;
}

}  // namespace cbam::cuda
