// The whole backward in one launch, but for the sums over the batch: a team of blocks holds a few
// samples of dout, and of x where both fit, each block a slice of the channels, or of one sample's
// pixels. The formulas stand with the stages: resident_spatial_gate_backward.cuh and
// resident_spatial_gate_backward_pixels.cuh, resident_channel_gate_backward.cuh,
// resident_input_gradient.cuh.
//
// grid    teams * team blocks of 256 or 512 threads, as clusters of `team` blocks or all at once; a
//         team visits `samples` samples, then those `teams` visits further on, which begin to
//         arrive while it writes dx
// shared  the slice of dout, that of x or a few chunks of it; the weights of the channels whose
//         gates the block makes, where there is room; what belongs to all pixels, or to those that
//         it holds; dz of the block's boxes with their halo; what it puts out for the other blocks
//         of a cluster
// bytes   reads dout once and x once, or twice where it does not stay; writes dx once; reads the
//         weights of the MLP once a visit, or once a team where they stay, what the forward saved
//         once. Blocks that are no cluster exchange through global memory. Where nobody asks for dx
//         or for the convolution's gradients, their last step is left out; all else is done, so
//         that no gradient depends on which others are asked for.
#pragma once

#include "../dispatch.cuh"
#include "../launch.cuh"
#include "resident_channel_gate_backward.cuh"
#include "resident_input_gradient.cuh"
#include "resident_spatial_gate_backward.cuh"
#include "resident_spatial_gate_backward_pixels.cuh"

namespace cbam::cuda {

template <class T>
__device__ __forceinline__ BackwardMemory<T> memory_of(const ResidentBackward& p) {
  using A = acc_t<T>;
  const ResidentBackwardGeometry& g = p.geometry;
  LaidOutCarver carver(dynamic_shared_memory(), p.layout);
  const ResidentBackwardShared<T, A> shared(carver, g, p.hidden, p.space);
  if (kHasClusters && g.cluster)
    return {shared, BackwardExchange<A>(carver, g, p.hidden, shared.of_pixels)};
  ExchangeCarver global(p.exchange + g.counts() + blockIdx.x * g.exchange);
  return {shared, BackwardExchange<A>(global, g, p.hidden)};
}

// The weights of the convolution, and where copies end.
template <class T>
__device__ __forceinline__ void prepare(const ResidentBackward& p, const BackwardMemory<T>& m) {
  const ResidentBackwardGeometry& g = p.geometry;
  if (threadIdx.x == 0) {
    init_landed(g, m.shared.dout_landed, g.samples * g.chunks);
    init_landed(g, m.shared.x_landed, g.x_slots);
    publish_inits();
  }
  const ConvWeight& weight = p.weights.conv_weight;
  const int taps = p.space.taps();
  for (int i = threadIdx.x; i < 2 * taps; i += g.threads)
    m.shared.weight[i] = weight_at<T>(weight.data, p.weights.dtype, weight.place(i, taps));
  __syncthreads();
}

// What the forward saved of the channels that the block holds: their gates, and where their maxima
// are.
template <bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void stage_channels(
    const ResidentBackward& p, const ResidentBlock<T, kChannelsFirst, kSplit>& block,
    const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  const int64_t first = block.first_sample() * p.channels + block.first_held_channel();
  const A* gate = static_cast<const A*>(p.saved.channel_gate) + first;
  const int32_t* argmax = p.saved.pixel_argmax + first;
  const StagedTerms<A>& terms = m.shared.of_channels;
  const int held = block.held_channels();
  for (int i = threadIdx.x; i < block.samples * held; i += p.geometry.threads) {
    const int sample = i / held, c = i % held, to = sample * p.geometry.held_channels + c;
    const int64_t from = int64_t{sample} * p.channels + c;
    terms.gate()[to] = gate[from];
    terms.index()[to] = argmax[from];
  }
  __syncthreads();
}

// dx of one sample; drained(chunk) once nobody reads a chunk of dout any more.
template <bool kPacked, bool kChannelsFirst, Split kSplit, class T, class Drained>
__device__ __forceinline__ void write_sample(const ResidentBackward& p,
                                             const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                             const BackwardMemory<T>& m, int sample,
                                             Drained drained) {
  const ResidentBackwardGeometry& g = p.geometry;
  const auto channels = m.shared.of_channels.from(sample * g.held_channels);
  const auto pixels = m.shared.of_pixels.from(int64_t{sample} * block.pixels());
  const T* dout = m.shared.dout + int64_t{sample} * g.rows * g.pitch;
  T* dx = static_cast<T*>(p.dx) + (block.first_sample() + sample) * p.dx_sample_stride +
          block.first_row() * p.dx_row_stride + block.first_col();
  const GradientSlice<acc_t<T>> slice{kChannelsFirst ? channels : pixels,
                                      kChannelsFirst ? pixels : channels,
                                      block.first_row(),
                                      block.first_col(),
                                      block.cols(),
                                      g.pitch,
                                      g.row_group,
                                      g.threads_along};
  SliceGradient<T, kPacked, kChannelsFirst> gradient(slice);
  for (int number = 0; number < g.chunks; ++number) {
    const Chunk chunk(g, block.rows(), number);
    const int end = chunk.first + chunk.count;
    if (p.dx && kPacked && block.cols() < kVector<T>)
      write_short_rows(slice, chunk.first, end, dout, dx, p.dx_row_stride);
    else if (p.dx)
      gradient.write(chunk.first, end, dout, dx, p.dx_row_stride);
    hand_over_rows(g);
    __syncthreads();
    drained(number);
  }
}

template <class T, Access kAccess, bool kChannelsFirst, Split kSplit>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    resident_backward_kernel(const ResidentBackward p) {
  const ResidentBackwardGeometry& g = p.geometry;
  const BackwardMemory<T> m = memory_of<T>(p);
  ResidentBlock<T, kChannelsFirst, kSplit> block(p, g);
  Loads<T, kChannelsFirst, kSplit> loads(p, block, m);
  prepare(p, m);
  const auto load_dout = [&](int round, int sample, int number) {
    if (!copies(g, sample * g.chunks + number)) return;
    load_chunk(g, block, p.dout, round, sample, number,
               m.shared.dout + (int64_t{sample} * g.rows + number * g.chunk) * g.pitch,
               m.shared.dout_landed + sample * g.chunks + number);
  };
  for (int n = 0; n < max(loads.slots, g.samples * g.chunks); ++n) {
    if (n < loads.slots) loads.load(n);
    const int sample = n / g.chunks;
    if (sample < block.samples_in(0)) load_dout(0, sample, n % g.chunks);
  }
  fetch_weights(block, m.shared.held);
  block.team.open();
  for (block.start(0); block.samples > 0; block.start(block.round + 1)) {
    stage_channels(p, block, m);
    put_out_spatial<kAccess == Access::kVector>(p, loads, m);
    if (g.fetches_ahead) {
      if (g.holds_x()) fetch_ahead(g, block, p.x);
      fetch_ahead(g, block, p.dout);
    }
    block.team.barrier();
    stage_pixels(p, block, m);
    sum_over_pixels<kAccess == Access::kVector>(p, loads, m);
    if (g.holds_x())
      for (int n = 0; n < loads.per_walk(); ++n) loads.load(loads.first + loads.slots + n);
    channel_gate_backward(p, block, m);
    const int following = block.samples_in(block.round + 1);
    for (int sample = 0; sample < block.samples; ++sample)
      write_sample<kAccess == Access::kPacked>(p, block, m, sample, [&](int number) {
        if (sample < following) load_dout(block.round + 1, sample, number);
      });
    if (p.d_conv) write_conv_shares(p, block, m);
  }
  if (kHasClusters && g.cluster)
    block.team.barrier();  // others may still read what this block put out
}

// Calls body with the kernel for these. Rows of channels are whole vectors, and packed pixels are
// the only others, of which blocks hold whole rows.
template <Split kSplit, class Body>
void with_kernel(DType dtype, bool channels_first, Access access, Body body) {
  with_storage(dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if (!channels_first)
        body(resident_backward_kernel<T, Access::kVector, false, kSplit>);
      else if (kSplit == Split::kPixels || access == Access::kVector)
        body(resident_backward_kernel<T, Access::kVector, true, kSplit>);
      else if constexpr (kSplit == Split::kChannels)
        body(resident_backward_kernel<T, Access::kPacked, true, kSplit>);
    }
  });
}

template <Split kSplit>
void resident_backward(DType dtype, bool channels_first, const ResidentBackward& p,
                       const Grid& grid, Stream stream) {
  with_kernel<kSplit>(dtype, channels_first, p.geometry.access,
                      [&](auto kernel) { launch("resident_backward", kernel, grid, stream, p); });
}

template <Split kSplit>
const char* why_no_resident_backward(DType dtype, bool channels_first,
                                     const ResidentBackwardGeometry& geometry, const Grid& grid) {
  const char* reason = kNoResidentKernel;
  with_kernel<kSplit>(dtype, channels_first, geometry.access,
                      [&](auto kernel) { reason = why_not_run(kernel, grid); });
  return reason;
}

}  // namespace cbam::cuda
