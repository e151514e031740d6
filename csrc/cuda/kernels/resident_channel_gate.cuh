// The channel gate of samples that stay on the chip, between the pool and the walks that use it.
//
//   channel_gate[c] = sigmoid(W2 (relu(W1 avg + b1) + relu(W1 max + b1)) + 2 b2)
//
// Every block sums the first layer over its own channels, the team adds these shares in a fixed
// order, every block for itself or each some units for all, and every block makes the gates of its
// own channels: the team reads the weights once, for a visit or for all of them. Where blocks hold
// pixels, these gates go round the team.
#pragma once

#include "resident_extremes.cuh"
#include "resident_mlp.cuh"

namespace cbam::cuda {

// This block's share of the first layer: the sums over its own channels.
template <int kVectors, bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void hidden_shares(const ResidentForward& p,
                                              const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                              const ForwardMemory<T>& m) {
  constexpr int kRows = kVectors == 2 ? 8 : 2;
  const int row = threadIdx.x % 32 / kVectors, vector = threadIdx.x % kVectors;
  with_first_layer(block, m.shared.held, [&](const auto* weights, int64_t stride) {
    for (int unit = threadIdx.x / 32 * kRows; unit < p.hidden;
         unit += p.geometry.threads / 32 * kRows) {
      const auto sum = warp_products<kRows, kVectors>(weights + unit * stride, stride,
                                                      p.hidden - unit, block.channels,
                                                      m.shared.pooled, p.geometry.pooled_pitch());
      if (row < kRows && unit + row < p.hidden)
        m.exchange.hidden[(unit + row) * kVectors + vector] = sum;
    }
  });
  const int sums = p.hidden * kVectors;
  for (int i = sums + threadIdx.x; i < p.geometry.in_whole_vectors(sums); i += p.geometry.threads)
    m.exchange.hidden[i] = acc_t<T>(0);  // read with others in a vector
}

// The sum of both hidden vectors of a unit and a sample, from those of mean and of max before the
// bias; in training both are kept where `saves`.
template <bool kTraining, bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ acc_t<T> both_of(const ResidentForward& p,
                                            const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                            int64_t first_sample, int unit, int sample, bool saves,
                                            acc_t<T> of_mean, acc_t<T> of_max) {
  using A = acc_t<T>;
  const void* bias = p.weights.fc1_bias;
  const A b = bias ? weight_at<T>(bias, p.weights.dtype, unit) : A(0);
  const A mean = relu(of_mean + b), max = relu(of_max + b);
  if (kTraining && saves && sample < block.samples) {
    A* saved = static_cast<A*>(p.saved.hidden) + (first_sample + sample) * 2 * p.hidden + unit;
    saved[0] = mean;
    saved[p.hidden] = max;
  }
  return mean + max;
}

// The hidden vectors of mean and max, summed over the team and then over both: of some units, which
// then go round. Visits are of several samples.
template <bool kTraining, bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void share_hidden(const ResidentForward& p,
                                             const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                             const ForwardMemory<T>& m) {
  using A = acc_t<T>;
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(A)), kPairs = kCount / 2;
  const Team& team = block.team;
  const Shares shares = block.unit_shares();
  const int first_unit = shares.first(team.rank);
  const int vectors = shares.count(team.rank) * kMostVisited / kPairs;
  const A* own = m.exchange.hidden + first_unit * 2 * kMostVisited;
  const int64_t first_sample = block.first_sample();
  const int lane = threadIdx.x % kUnitLanes, at_once = p.geometry.threads / kUnitLanes;
  for (int done = 0; done < vectors; done += at_once) {
    const int i = done + static_cast<int>(threadIdx.x) / kUnitLanes;
    A sum[kCount] = {};  // mean and max of one sample, then of the next
    if (i < vectors) add_shares<2>(team, own + i * kCount, lane, kUnitLanes, sum);
    sum_lanes(sum, kUnitLanes);
    if (lane >= kPairs || i >= vectors) continue;
    const int pair = i * kPairs + lane, unit = first_unit + pair / kMostVisited;
    m.exchange.both[pair] =
        both_of<kTraining>(p, block, first_sample, unit, pair % kMostVisited, true,
                           lane ? sum[2] : sum[0], lane ? sum[3] : sum[1]);
  }
  collect_units(block, m.exchange.both, kMostVisited, m.shared.both);
}

// The hidden vectors of mean and max, summed over the team and then over both: of all units.
template <bool kTraining, bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void merge_hidden(const ResidentForward& p,
                                             const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                             const ForwardMemory<T>& m) {
  using A = acc_t<T>;
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(A)), kPairs = kCount / 2;
  const int samples = p.geometry.mlp_samples(), pairs = p.hidden * samples;
  const Team& team = block.team;
  const int64_t first_sample = block.first_sample();
  for (int first = kPairs * threadIdx.x; first < pairs; first += kPairs * p.geometry.threads) {
    A sum[kCount] = {};  // mean and max of one unit and sample, then of the next
    add_shares<4>(team, m.exchange.hidden + 2 * first, 0, 1, sum);
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      if (first + k >= pairs) break;
      m.shared.both[first + k] =
          both_of<kTraining>(p, block, first_sample, (first + k) / samples, (first + k) % samples,
                             team.rank == 0, sum[2 * k], sum[2 * k + 1]);
    }
  }
  __syncthreads();
}

// The gates of the block's own channels: to where it looks them up, or where others do.
template <int kSamples, bool kTraining, bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void gate_channels(const ResidentForward& p,
                                              const ResidentBlock<T, kChannelsFirst, kSplit>& block,
                                              const ForwardMemory<T>& m) {
  using A = acc_t<T>;
  constexpr int kRows = kSamples == 1 ? 8 : 4;
  const int row = threadIdx.x % 32 / kSamples, sample = threadIdx.x % kSamples;
  const int64_t n = block.first_sample() + sample;
  with_second_layer(block, m.shared.held, [&](const auto* weights) {
    for (int first = threadIdx.x / 32 * kRows; first < block.channels;
         first += p.geometry.threads / 32 * kRows) {
      const int c = first + row, channel = block.first_channel + c;
      const bool own = row < kRows && c < block.channels && sample < block.samples;
      const void* bias = own ? p.weights.fc2_bias : nullptr;
      const A b = bias ? weight_at<T>(bias, p.weights.dtype, channel) : A(0);
      const A sum =
          warp_products<kRows, kSamples>(weights + int64_t{first} * p.hidden, p.hidden,
                                         block.channels - first, p.hidden, m.shared.both, kSamples);
      if (!own) continue;
      const A gate = sigmoid(sum + A(2) * b);
      (block.kHoldsPixels ? m.exchange.gates : m.shared.gate)[sample * p.geometry.channels + c] =
          gate;
      if constexpr (kTraining)
        static_cast<A*>(p.saved.channel_gate)[n * p.channels + channel] = gate;
    }
  });
  __syncthreads();
}

// The gates of all channels, from the blocks that made them.
template <bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void collect_channel_gates(
    const ResidentForward& p, const ResidentBlock<T, kChannelsFirst, kSplit>& block,
    const ForwardMemory<T>& m) {
  block.team.barrier();
  const Shares shares = block.channel_shares();
  read_from(block.team, [&](auto read) {
    for (int c = threadIdx.x; c < p.channels; c += p.geometry.threads) {
      const int owner = shares.owner(c);
      m.shared.gate[c] = read(m.exchange.gates + c - shares.first(owner), owner);
    }
  });
  __syncthreads();
}

template <bool kTraining, bool kChannelsFirst, Split kSplit, class T>
__device__ __forceinline__ void gate_all_channels(
    const ResidentForward& p, const ResidentBlock<T, kChannelsFirst, kSplit>& block,
    const ForwardMemory<T>& m) {
  const bool one = block.kHoldsPixels || p.geometry.samples == 1;
  if (one)
    hidden_shares<2>(p, block, m);
  else
    hidden_shares<2 * kMostVisited>(p, block, m);
  block.team.barrier();
  if (!one && p.geometry.shares_units)
    share_hidden<kTraining>(p, block, m);
  else
    merge_hidden<kTraining>(p, block, m);
  if (one)
    gate_channels<1, kTraining>(p, block, m);
  else
    gate_channels<kMostVisited, kTraining>(p, block, m);
  if constexpr (kSplit == Split::kPixels) collect_channel_gates(p, block, m);
}

}  // namespace cbam::cuda
