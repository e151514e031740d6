// The channel gate backwards, of samples that stay on the chip.
//
//   dy          = dout * spatial_gate[s] + d_mean[s] + d_max[s] where c is s's maximum
//   dm[c]       = (sum_s x * dy) * channel_gate * (1 - channel_gate)
//   d_hidden[p] = W2^T dm where hidden[p] passed the ReLU      p: mean, max
//   d_pooled[p] = W1^T d_hidden[p], the mean's divided by the pixels
//
// Every block has dm of its own channels and sums the second layer's share over them; the team adds
// these shares in the order of ranks: it reads the weights once.
#pragma once

#include "resident_mlp.cuh"
#include "resident_sums.cuh"

namespace cbam::cuda {

// What the kCount pixels of a vector have for x * dy of a channel.
template <int kCount, class A>
struct PixelFactors {
  A gate[kCount], first[kCount], second[kCount];
  int32_t index[kCount];
  int first_channel;  // of the block

  __device__ __forceinline__ PixelFactors(const StagedTerms<A>& terms, bool aligned,
                                          int first_channel_)
      : first_channel(first_channel_) {
    load_shared(terms.gate(), aligned, gate);
    load_shared(terms.first(), aligned, first);
    load_shared(terms.second(), aligned, second);
    load_shared(terms.index(), aligned, index);
  }
  __device__ __forceinline__ A operator()(int channel, int i, A x, A dout) const {
    const A of_maximum = index[i] == first_channel + channel ? second[i] : A(0);
    return x * (dout * gate[i] + (first[i] + of_maximum));
  }
};

// The gradients of the channel gate, for the block's own channels.
template <bool kWhole, bool kChannelsFirst, class T>
__device__ __forceinline__ void sum_over_pixels(const ResidentBackward& p,
                                                Loads<T, kChannelsFirst>& loads,
                                                const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  constexpr int kCount = kWhole ? kColumnsTogether<T> : 1;
  const ResidentBackwardGeometry& g = p.geometry;
  const int pixels = loads.block.pixels(), first_channel = loads.block.first_channel;
  walk_both(loads, 1, [&](const RowsOfBoth<T, kChannelsFirst>& of) {
    if constexpr (kChannelsFirst)
      sum_rows<kCount>(
          of,
          [&](int sample, int pixel) {
            const auto terms = m.shared.of_pixels.from(int64_t{sample} * pixels + pixel);
            return PixelFactors<kCount, A>(terms, kWhole, first_channel);
          },
          [&](int sample, int c, A sum) { m.shared.d_channel[sample * g.channels + c] = sum; });
    else
      sum_columns(
          of,
          [&](int sample, int pixel, int c, A x, A dout) {
            const int at = sample * pixels + pixel;
            const StagedTerms<A>& terms = m.shared.of_pixels;
            const A more = terms.index()[at] == first_channel + c ? terms.second()[at] : A(0);
            return x * (dout * terms.gate()[at] + (terms.first()[at] + more));
          },
          [&](int sample, int c, A sum) {
            A& total = m.shared.d_channel[sample * g.channels + c];
            total = of.first == 0 ? sum : total + sum;
          });
  });
}

// dm of the block's own channels, zero for samples that are not there.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void stage_dm(const ResidentBackward& p,
                                         const ResidentBlock<T, kChannelsFirst>& block,
                                         const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  const ResidentBackwardGeometry& g = p.geometry;
  const int samples = g.mlp_samples();
  const A* more = static_cast<const A*>(p.d_channel_gate);
  for_own_channels(block, samples, [&](int sample, int c) {
    A dm = A(0);
    if (sample < block.samples) {
      const int64_t n = block.first_sample() + sample,
                    at = n * p.channels + block.first_channel + c;
      const A d = m.shared.d_channel[sample * g.channels + c] + (more ? more[at] : A(0));
      dm = d * sigmoid_derivative<A>(m.shared.gate[sample * g.channels + c]);
      if (p.dm) static_cast<A*>(p.dm)[at] = dm;
    }
    m.shared.dm[c * samples + sample] = dm;
  });
  __syncthreads();
}

// d_hidden of mean and of max, summed over the team.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void merge_d_hidden(const ResidentBackward& p,
                                               const ResidentBlock<T, kChannelsFirst>& block,
                                               const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  const int samples = p.geometry.mlp_samples();
  const Team& team = block.team;
  for (int i = threadIdx.x; i < p.hidden * samples; i += p.geometry.threads) {
    const int unit = i % p.hidden, sample = i / p.hidden;
    A of_mean = A(0), of_max = A(0);
    if (sample < block.samples) {
      A total = A(0);
      for (int from = 0; from < team.size; ++from)
        total += team.read(m.exchange.hidden + sample * p.hidden + unit, from);
      const int64_t at = (block.first_sample() + sample) * 2 * p.hidden + unit;
      const A* hidden = static_cast<const A*>(p.saved.hidden) + at;
      if (relu_passes(hidden[0])) of_mean = total;
      if (relu_passes(hidden[p.hidden])) of_max = total;
      if (p.d_hidden && team.rank == 0) {
        A* out = static_cast<A*>(p.d_hidden) + at;
        out[0] = of_mean;
        out[p.hidden] = of_max;
      }
    }
    A* to = m.shared.d_hidden + (unit * samples + sample) * 2;
    to[0] = of_mean;
    to[1] = of_max;
  }
  __syncthreads();
}

// What belongs to the block's own channels while dx is written.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void stage_channels(const ResidentBackward& p,
                                               const ResidentBlock<T, kChannelsFirst>& block,
                                               const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  const ResidentBackwardGeometry& g = p.geometry;
  const StagedTerms<A>& terms = m.shared.of_channels;
  for_own_channels(block, block.samples, [&](int sample, int c) {
    const int at = sample * g.channels + c;
    const A* d_pooled = m.shared.d_pooled + 2 * sample * block.channels + c;
    terms.gate()[at] = m.shared.gate[at];
    terms.first()[at] = d_pooled[0] / static_cast<A>(block.pixels());
    terms.second()[at] = d_pooled[block.channels];
    terms.index()[at] =
        p.saved
            .pixel_argmax[(block.first_sample() + sample) * p.channels + block.first_channel + c];
  });
  __syncthreads();
}

// From dm to d_pooled, with one barrier of the team between.
template <int kSamples, bool kChannelsFirst, class T>
__device__ __forceinline__ void mlp_backward(const ResidentBackward& p,
                                             const ResidentBlock<T, kChannelsFirst>& block,
                                             const BackwardMemory<T>& m) {
  const Weights& w = p.weights;
  if (block.samples > 0)
    column_products<kSamples>(block.channels, p.hidden, m.shared.dm, m.shared.sum,
                              m.exchange.hidden, [&](int c, int unit) {
                                const int64_t at =
                                    int64_t{block.first_channel + c} * p.hidden + unit;
                                return weight_at<T>(w.fc2_weight, w.dtype, at);
                              });
  block.team.barrier();
  if (block.samples == 0) return;
  merge_d_hidden(p, block, m);
  column_products<2 * kSamples>(p.hidden, block.channels, m.shared.d_hidden, m.shared.sum,
                                m.shared.d_pooled, [&](int unit, int c) {
                                  const int64_t at =
                                      int64_t{unit} * p.channels + block.first_channel + c;
                                  return weight_at<T>(w.fc1_weight, w.dtype, at);
                                });
}

template <bool kChannelsFirst, class T>
__device__ __forceinline__ void channel_gate_backward(const ResidentBackward& p,
                                                      const ResidentBlock<T, kChannelsFirst>& block,
                                                      const BackwardMemory<T>& m) {
  stage_dm(p, block, m);
  if (p.geometry.samples == 1)
    mlp_backward<1>(p, block, m);
  else
    mlp_backward<kMostVisited>(p, block, m);
  stage_channels(p, block, m);
}

}  // namespace cbam::cuda
