// The channel gate backwards, of samples that stay on the chip.
//
//   dy          = dout * spatial_gate[s] + d_mean[s] + d_max[s] where c is s's maximum
//   dm[c]       = (sum_s x * dy) * channel_gate * (1 - channel_gate)
//   d_hidden[p] = W2^T dm where hidden[p] passed the ReLU      p: mean, max
//   d_pooled[p] = W1^T d_hidden[p], the mean's divided by the pixels
//
// Where blocks hold pixels, the sums over these go to the blocks that make the channels' gates, and
// d_pooled comes back. Every block has dm of its own channels and sums the second layer's share
// over them; the team adds these shares in a fixed order, every block for itself or each some units
// for all. It reads the weights once, for a visit or for all of them.
#pragma once

#include "resident_mlp.cuh"
#include "resident_sums.cuh"

namespace cbam::cuda {

// What the kCount pixels of a vector have for x * dy of a channel.
template <int kCount, class A>
struct PixelFactors {
  A gate[kCount], first[kCount], both[kCount];
  int32_t index[kCount];
  int first_channel;  // that the block holds

  __device__ __forceinline__ PixelFactors(const StagedTerms<A>& terms, int first_channel_)
      : first_channel(first_channel_) {
    A second[kCount];
    load_shared(terms.gate(), true, gate);
    load_shared(terms.first(), true, first);
    load_shared(terms.second(), true, second);
    load_shared(terms.index(), true, index);
#pragma unroll
    for (int i = 0; i < kCount; ++i) both[i] = first[i] + second[i];
  }
  __device__ __forceinline__ A operator()(int channel, int i, A x, A dout) const {
    const A of_maps = index[i] == first_channel + channel ? both[i] : first[i];
    return x * (dout * gate[i] + of_maps);
  }
};

// The gradients of the channel gate, over what the block holds.
template <bool kWhole, bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void sum_over_pixels(const ResidentBackward& p,
                                                Loads<T, kChannelsFirst, kSplit>& loads,
                                                const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  const ResidentBackwardGeometry& g = p.geometry;
  const int pixels = loads.block.pixels(), first_channel = loads.block.first_held_channel();
  const auto of_pixel = [&](int sample, int pixel) {
    return m.shared.of_pixels.from(int64_t{sample} * pixels + pixel);
  };
  walk_both(loads, 1, [&](const RowsOfBoth<T, kChannelsFirst, kSplit>& of) {
    if constexpr (kChannelsFirst)
      with_columns_together<kWhole, T>(pixels, [&](auto count) {
        sum_rows<count.value>(
            of,
            [&](int sample, int pixel) {
              return PixelFactors<count.value, A>(of_pixel(sample, pixel), first_channel);
            },
            [&](int sample, int c, A sum) {
              m.shared.d_channel[sample * g.held_channels + c] = sum;
            });
      });
    else
      sum_columns<kColumnsTogether<T>>(
          of,
          [&](int sample, int pixel) {
            const PixelFactors<1, A> factors(of_pixel(sample, pixel), first_channel);
            return [factors](int c, A x, A dout) { return factors(c, 0, x, dout); };
          },
          [&](int sample, int c, A sum) {
            A& total = m.shared.d_channel[sample * g.held_channels + c];
            total = of.first == 0 ? sum : total + sum;
          });
  });
}

// Where blocks hold pixels: the sums over these go to the blocks that make the channels' gates.
template <bool kChannelsFirst, class T>
__device__ __forceinline__ void put_out_channels(
    const ResidentBlock<T, kChannelsFirst, Split::kPixels>& block, const BackwardMemory<T>& m) {
  for (int c = threadIdx.x; c < block.p.channels; c += block.g.threads)
    m.exchange.d_channel[c] = m.shared.d_channel[c];
  block.team.barrier();
}

// dm of the block's own channels, zero for samples that are not there.
template <bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void stage_dm(const ResidentBackward& p,
                                         const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                         const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  const ResidentBackwardGeometry& g = p.geometry;
  const int samples = g.mlp_samples();
  const A* more = static_cast<const A*>(p.d_channel_gate);
  const int64_t first_sample = block.first_sample();
  for_own_channels(block, samples, [&](int sample, int c) {
    A dm = A(0);
    if (sample < block.samples) {
      const int64_t n = first_sample + sample, at = n * p.channels + block.first_channel + c;
      const int place = block.own_place(sample, c);
      A d = block.kHoldsPixels ? sum_over_team(block.team, m.exchange.d_channel + place)
                               : m.shared.d_channel[place];
      if (more) d += more[at];
      dm = d * sigmoid_derivative<A>(m.shared.of_channels.gate()[place]);
      if (p.dm) static_cast<A*>(p.dm)[at] = dm;
    }
    m.shared.dm[c * samples + sample] = dm;
  });
  __syncthreads();
}

// d_hidden of mean and of max of a unit and a sample, to `to`: total(), the team's sum, where the
// units passed the ReLU. Kept for the gradients of the weights where `saves`.
template <bool kChannelsFirst, Split kSplit, class T, class Total>
__device__ __forceinline__ void put_d_hidden(const ResidentBackward& p,
                                             const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                             int64_t first_sample, int unit, int sample, bool saves,
                                             acc_t<T>* to, Total total) {
  using A = acc_t<T>;
  A of_mean = A(0), of_max = A(0);
  if (sample < block.samples) {
    const int64_t at = (first_sample + sample) * 2 * p.hidden + unit;
    const A* hidden = static_cast<const A*>(p.saved.hidden) + at;
    const bool mean_passes = relu_passes(hidden[0]), max_passes = relu_passes(hidden[p.hidden]);
    const A sum = total();
    if (mean_passes) of_mean = sum;
    if (max_passes) of_max = sum;
    if (p.d_hidden && saves) {
      A* out = static_cast<A*>(p.d_hidden) + at;
      out[0] = of_mean;
      out[p.hidden] = of_max;
    }
  }
  to[0] = of_mean;
  to[1] = of_max;
}

// d_hidden of mean and of max, summed over the team: of some units, which then go round. Visits are
// of several samples.
template <bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void share_d_hidden(
    const ResidentBackward& p, const ResidentBlock<T, kChannelsFirst, kSplit>& block,
    const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  const Team& team = block.team;
  const Shares shares = block.unit_shares();
  const int first_unit = shares.first(team.rank);
  const int values = shares.count(team.rank) * kMostVisited;
  const int64_t first_sample = block.first_sample();
  const int lane = threadIdx.x % kUnitLanes, at_once = p.geometry.threads / kUnitLanes;
  for (int done = 0; done < values; done += at_once) {
    const int i = done + static_cast<int>(threadIdx.x) / kUnitLanes;
    const int unit = first_unit + i / kMostVisited, sample = i % kMostVisited;
    A sum[1] = {};
    if (i < values && sample < block.samples)
      read_from(team, [&](auto read) {
        for_batches<4>(
            lane, team.size, kUnitLanes,
            [&](int from) { return read(m.exchange.hidden + sample * p.hidden + unit, from); },
            [&](int, A share) { sum[0] += share; });
      });
    sum_lanes(sum, kUnitLanes);
    if (lane == 0 && i < values)
      put_d_hidden(p, block, first_sample, unit, sample, true, m.exchange.d_hidden + 2 * i,
                   [&] { return sum[0]; });
  }
  collect_units(block, m.exchange.d_hidden, 2 * kMostVisited, m.shared.d_hidden);
}

// d_hidden of mean and of max, summed over the team: of all units.
template <bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void merge_d_hidden(
    const ResidentBackward& p, const ResidentBlock<T, kChannelsFirst, kSplit>& block,
    const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  const int samples = p.geometry.mlp_samples();
  const Team& team = block.team;
  const int64_t first_sample = block.first_sample();
  for (int i = threadIdx.x; i < p.hidden * samples; i += p.geometry.threads) {
    const int unit = i % p.hidden, sample = i / p.hidden;
    put_d_hidden(p, block, first_sample, unit, sample, team.rank == 0,
                 m.shared.d_hidden + (unit * samples + sample) * 2,
                 [&] { return sum_over_team(team, m.exchange.hidden + sample * p.hidden + unit); });
  }
  __syncthreads();
}

// Where blocks hold pixels: d_pooled of all channels, from the blocks that made it.
template <bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void collect_d_pooled(
    const ResidentBlock<T, kChannelsFirst, kSplit>& block, const BackwardMemory<T>& m) {
  block.team.barrier();
  const StagedTerms<acc_t<T>>& terms = m.shared.of_channels;
  const Shares shares = block.channel_shares();
  read_from(block.team, [&](auto read) {
    for (int c = threadIdx.x; c < block.p.channels; c += block.g.threads) {
      const int owner = shares.owner(c);
      const auto* theirs = m.exchange.d_pooled + c - shares.first(owner);
      const auto of_mean = read(theirs, owner), of_max = read(theirs + block.g.channels, owner);
      terms.first()[c] = of_mean;
      terms.second()[c] = of_max;
    }
  });
  __syncthreads();
}

// From dm to d_pooled, which is what reaches dx through the pools.
template <int kSamples, bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void mlp_backward(const ResidentBackward& p,
                                             const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                             const BackwardMemory<T>& m) {
  using A = acc_t<T>;
  with_second_layer(block, m.shared.held, [&](const auto* weights) {
    column_products<kSamples>(
        weights, p.hidden, block.channels, p.hidden, m.shared.dm, m.shared.sum,
        [&](int sample, int unit, A sum) { m.exchange.hidden[sample * p.hidden + unit] = sum; });
  });
  block.team.barrier();
  if (kSamples > 1 && p.geometry.shares_units)
    share_d_hidden(p, block, m);
  else
    merge_d_hidden(p, block, m);
  // Of mean, and of max: to where the block looks them up, or where others do.
  const StagedTerms<A>& terms = m.shared.of_channels;
  A* of_mean = block.kHoldsPixels ? m.exchange.d_pooled : terms.first();
  A* of_max = block.kHoldsPixels ? of_mean + p.geometry.channels : terms.second();
  with_first_layer(block, m.shared.held, [&](const auto* weights, int64_t stride) {
    column_products<2 * kSamples>(weights, stride, p.hidden, block.channels, m.shared.d_hidden,
                                  m.shared.sum, [&](int vector, int c, A sum) {
                                    const int sample = vector / 2,
                                              at = sample * p.geometry.channels + c;
                                    if (sample >= block.samples) return;
                                    if (vector % 2 == 0)
                                      of_mean[at] = sum / static_cast<A>(p.space.pixels());
                                    else
                                      of_max[at] = sum;
                                  });
  });
  if constexpr (kSplit == Split::kPixels) collect_d_pooled(block, m);
}

template <bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void channel_gate_backward(
    const ResidentBackward& p, const ResidentBlock<T, kChannelsFirst, kSplit>& block,
    const BackwardMemory<T>& m) {
  if constexpr (kSplit == Split::kPixels) put_out_channels(block, m);
  stage_dm(p, block, m);
  if (block.kHoldsPixels || p.geometry.samples == 1)
    mlp_backward<1>(p, block, m);
  else
    mlp_backward<kMostVisited>(p, block, m);
}

}  // namespace cbam::cuda
