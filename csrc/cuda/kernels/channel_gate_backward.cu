// The channel gate backwards, a launch for each layer of the MLP, or one for both where a block has
// threads for all hidden units:
//
//   dm          = d_channel * channel_gate * (1 - channel_gate)
//   d_hidden[p] = W2^T dm where hidden[p] passed the ReLU      p: mean, max
//   d_pooled[p] = W1^T d_hidden[p], the mean's divided by the pixels
//
// Both take several samples at a time, so that the weights are read once for all of them. The
// gradients of the weights are products of what these leave with what the forward saved:
// weight_gradients.cu.
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/dependent_launch.cuh"
#include "tile_sums.cuh"

namespace cbam::cuda {
namespace {

// What reaches one channel's gate of a sample, and the gate.
template <class A>
struct Reached {
  A cross, terms, more, gate;
};

// dm of channels [first, first + count) of the block's samples, absent ones zero; the first block
// of a group of samples also writes it.
template <int kSamples, class A>
__device__ __forceinline__ void stage_dm(const ChannelGateBackward& p, int64_t first_sample,
                                         int first, int count, bool writes, A* staged) {
  const A* gate = static_cast<const A*>(p.channel_gate);
  const A* more = static_cast<const A*>(p.d_channel_gate);
  const bool single = p.cross.parts == 1 && p.terms.parts == 1;
  const auto sample_of = [&](int i) { return first_sample + i / count; };
  // By loads that say where: compilers for some architectures lose that these are in global memory.
  const auto read = [&](int i, auto total) {
    const int64_t n = sample_of(i);
    const int c = first + i % count;
    if (n >= p.samples) return Reached<A>{};
    const int64_t at = n * p.channels + c;
    const A open = __ldcg(gate + at), other = more ? __ldcg(more + at) : A(0);
    return Reached<A>{total(p.cross, n, c), total(p.terms, n, c), other, open};
  };
  const auto put = [&](int i, const Reached<A>& r) {
    const int64_t n = sample_of(i);
    const int k = i % count;
    const A dm = (r.cross + r.terms + r.more) * sigmoid_derivative<A>(r.gate);
    if (writes && n < p.samples) static_cast<A*>(p.dm)[n * p.channels + first + k] = dm;
    staged[k * kSamples + i / count] = dm;
  };
  const int end = kSamples * count, step = kGateBackwardThreads<A>;
  const auto only = [&](const Sums& sums, int64_t n, int c) {
    return __ldcg(static_cast<const A*>(sums.values) + n * p.channels + c);
  };
  const auto all = [&](const Sums& sums, int64_t n, int c) {
    return total_of<A>(sums, n, p.channels, c);
  };
  if (single)
    for_batches(threadIdx.x, end, step, [&](int i) { return read(i, only); }, put);
  else
    for_batches<1>(threadIdx.x, end, step, [&](int i) { return read(i, all); }, put);
}

// Weights of a thread's hidden units for one channel; zeros for units that do not exist.
template <class W>
struct BackwardWeights {
  W value[kBackwardUnits];
};

// What channels [first, first + count) add to the sums of a thread, which takes every `step`-th.
template <int kSamples, class W, class A>
__device__ __forceinline__ void add_channels(const ChannelGateBackward& p, int first_unit,
                                             int first, int own, int count, int step, const A* dm,
                                             A (&sum)[kBackwardUnits * kSamples]) {
  const W* weights =
      static_cast<const W*>(p.fc2_weight) + int64_t{first} * p.hidden_units + first_unit;
  const int along = p.geometry.units_along;
  const auto read = [&](int k) {
    BackwardWeights<W> weight;
#pragma unroll
    for (int u = 0; u < kBackwardUnits; ++u)
      weight.value[u] = first_unit + u * along < p.hidden_units
                            ? weights[int64_t{k} * p.hidden_units + u * along]
                            : W();
    return weight;
  };
  for_batches<8>(own, count, step, read, [&](int k, const BackwardWeights<W>& weight) {
    A value[kSamples];
    load_shared(dm + k * kSamples, true, value);
#pragma unroll
    for (int u = 0; u < kBackwardUnits; ++u) {
      const A w = widen(weight.value[u]);
#pragma unroll
      for (int s = 0; s < kSamples; ++s) sum[u * kSamples + s] += w * value[s];
    }
  });
}

// d_hidden of the hidden units of a tile for the block's samples. put(i, s, of_mean, of_max): unit
// i of the tile, sample s of the block; 0 for absent ones.
template <class W, int kSamples, class A, class Put>
__device__ __forceinline__ void make_d_hidden(const ChannelGateBackward& p, int tile,
                                              int64_t first_sample,
                                              const GateBackwardShared<A, kSamples>& shared,
                                              Put put) {
  using Shared = GateBackwardShared<A, kSamples>;
  constexpr int kBlock = kGateBackwardThreads<A>;
  const int along = p.geometry.units_along, units = along * kBackwardUnits;
  const int side = threadIdx.x % along, warp = threadIdx.x / 32;
  A sum[kBackwardUnits * kSamples] = {};
  for (int first = 0; first < p.channels; first += Shared::kChunk) {
    const int count = min(Shared::kChunk, p.channels - first);
    stage_dm<kSamples>(p, first_sample, first, count, tile == 0, shared.dm);
    __syncthreads();
    add_channels<kSamples, W>(p, tile * units + side, first, threadIdx.x / along, count,
                              kBlock / along, shared.dm, sum);
    __syncthreads();
  }
  sum_strided(sum, along);
  A* partial = shared.dm;
  if (threadIdx.x % 32 < along)
#pragma unroll
    for (int u = 0; u < kBackwardUnits; ++u)
#pragma unroll
      for (int s = 0; s < kSamples; ++s)
        partial[(warp * kSamples + s) * units + side + u * along] = sum[u * kSamples + s];
  __syncthreads();
  for (int i = threadIdx.x; i < kSamples * units; i += kBlock) {
    const int64_t n = first_sample + i / units;
    const int unit = tile * units + i % units;
    if (unit >= p.hidden_units) continue;
    A of_mean = A(0), of_max = A(0);
    if (n < p.samples) {
      const int64_t at = n * 2 * p.hidden_units + unit;
      const A* hidden = static_cast<const A*>(p.hidden);
      const A mean = hidden[at], max = hidden[at + p.hidden_units];
      A total = A(0);
#pragma unroll
      for (int w = 0; w < kBlock / 32; ++w) total += partial[w * kSamples * units + i];
      if (relu_passes(mean)) of_mean = total;
      if (relu_passes(max)) of_max = total;
      A* d_hidden = static_cast<A*>(p.d_hidden) + at;
      d_hidden[0] = of_mean;
      d_hidden[p.hidden_units] = of_max;
    }
    put(i % units, i / units, of_mean, of_max);
  }
}

// grid    ceil(samples / kSamples) * tiles blocks of 512 threads, 256 for doubles; a thread takes
//         kBackwardUnits hidden units, those beside it the others of the tile, and those below it
//         share the channels
// shared  dm of a chunk of channels, then the warps' sums
// bytes   reads W2 once a group of samples; every block of the group reads the parts of d_channel
template <class W, class A, int kSamples>
__global__ void __launch_bounds__(kGateBackwardThreads<A>)
    gate_layer_backward_kernel(const ChannelGateBackward p) {
  const int units = p.geometry.units_along * kBackwardUnits;
  const int tiles = (p.hidden_units + units - 1) / units;
  SharedCarver carver(dynamic_shared_memory());
  const GateBackwardShared<A, kSamples> shared(carver);
  wait_for_previous_launch();
  make_d_hidden<W>(p, blockIdx.x % tiles, static_cast<int64_t>(blockIdx.x / tiles) * kSamples,
                   shared, [](int, int, A, A) {});
}

// d_hidden of hidden units [first, first + count) of the block's samples into shared memory, a unit
// a thread; absent samples are zeros.
template <int kSamples, class A>
__device__ __forceinline__ void stage_d_hidden(const ChannelGateBackward& p, int64_t first_sample,
                                               int first, int count, A* d_hidden) {
  static_assert(kUnitChunk == kHiddenBackwardThreads, "a thread for each unit");
  const int u = threadIdx.x;
  if (u >= count) return;
  A value[2 * kSamples];
#pragma unroll
  for (int v = 0; v < 2 * kSamples; ++v) {
    const int64_t vector = first_sample * 2 + v;
    value[v] = vector < 2 * int64_t{p.samples}
                   ? static_cast<const A*>(p.d_hidden)[vector * p.hidden_units + first + u]
                   : A(0);
  }
  store_shared(d_hidden + u * 2 * kSamples, value);
}

// kEach channels of a thread, kStep apart, and their sums over hidden units.
template <int kSamples, int kEach, int kStep, class A>
struct PooledSums {
  const ChannelGateBackward& p;
  int channel;
  A sum[kEach][2 * kSamples] = {};

  __device__ __forceinline__ PooledSums(const ChannelGateBackward& p_, int channel_)
      : p(p_), channel(channel_) {}

  // Adds hidden units [first, first + count), whose d_hidden is staged.
  template <class W>
  __device__ __forceinline__ void add(int first, int count, const A* d_hidden) {
    struct Weights {
      W value[kEach];
    };
    const W* weights = static_cast<const W*>(p.fc1_weight) + int64_t{first} * p.channels + channel;
    const auto read = [&](int u) {
      Weights weight;
#pragma unroll
      for (int e = 0; e < kEach; ++e)
        weight.value[e] = inside(e) ? weights[int64_t{u} * p.channels + e * kStep] : W();
      return weight;
    };
    for_batches<kSamples == kFewSamples ? 16 : 4>(0, count, 1, read, [&](int u, const Weights& w) {
      A value[2 * kSamples];
      load_shared(d_hidden + u * 2 * kSamples, true, value);
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const A weight = widen(w.value[e]);
#pragma unroll
        for (int v = 0; v < 2 * kSamples; ++v) sum[e][v] += weight * value[v];
      }
    });
  }

  __device__ __forceinline__ void put(int64_t first_sample) const {
#pragma unroll
    for (int e = 0; e < kEach; ++e)
#pragma unroll
      for (int v = 0; v < 2 * kSamples; ++v) {
        const int64_t vector = first_sample * 2 + v;
        if (inside(e) && vector < 2 * int64_t{p.samples})
          static_cast<A*>(p.d_pooled)[vector * p.channels + channel + e * kStep] =
              v % 2 ? sum[e][v] : sum[e][v] / static_cast<A>(p.pixels);
      }
  }

 private:
  __device__ __forceinline__ bool inside(int e) const { return channel + e * kStep < p.channels; }
};

// grid    ceil(samples / kSamples) * tiles blocks of kHiddenBackwardThreads threads; a thread takes
//         backward_channels(kSamples) channels
// shared  d_hidden of a chunk of hidden units
// bytes   reads W1 once a group of samples; every block of the group reads d_hidden
template <class W, class A, int kSamples>
__global__ void __launch_bounds__(kHiddenBackwardThreads)
    hidden_layer_backward_kernel(const ChannelGateBackward p) {
  constexpr int kEach = backward_channels(kSamples);
  const int tiles =
      (p.channels + kHiddenBackwardThreads * kEach - 1) / (kHiddenBackwardThreads * kEach);
  const int channel = blockIdx.x % tiles * kHiddenBackwardThreads * kEach + threadIdx.x;
  const int64_t first_sample = static_cast<int64_t>(blockIdx.x / tiles) * kSamples;
  SharedCarver carver(dynamic_shared_memory());
  const HiddenBackwardShared<A, kSamples> shared(carver);
  wait_for_previous_launch();
  PooledSums<kSamples, kEach, kHiddenBackwardThreads, A> sums(p, channel);
  for (int first = 0; first < p.hidden_units; first += kUnitChunk) {
    const int count = min(kUnitChunk, p.hidden_units - first);
    stage_d_hidden<kSamples>(p, first_sample, first, count, shared.d_hidden);
    __syncthreads();
    sums.template add<W>(first, count, shared.d_hidden);
    __syncthreads();
  }
  sums.put(first_sample);
}

// grid    ceil(samples / kSamples) blocks of 512 threads, 256 for doubles: as in the second layer,
//         then a thread takes every 512th channel, or every 256th
// shared  what the second layer takes, and d_hidden
// bytes   reads W2, W1 and the parts of d_channel once a group of samples
template <class W, class A, int kSamples>
__global__ void __launch_bounds__(kGateBackwardThreads<A>, 1)
    both_layers_backward_kernel(const ChannelGateBackward p) {
  constexpr int kBlock = kGateBackwardThreads<A>;
  const int64_t first_sample = int64_t{blockIdx.x} * kSamples;
  SharedCarver carver(dynamic_shared_memory());
  const BothBackwardShared<A, kSamples> shared(carver);
  wait_for_previous_launch();
  A* d_hidden = shared.d_hidden;
  make_d_hidden<W>(p, 0, first_sample, shared.second, [&](int unit, int s, A of_mean, A of_max) {
    d_hidden[(unit * kSamples + s) * 2] = of_mean;
    d_hidden[(unit * kSamples + s) * 2 + 1] = of_max;
  });
  __syncthreads();
  for (int channel = threadIdx.x; channel < p.channels; channel += kBlock) {
    PooledSums<kSamples, 1, kBlock, A> sums(p, channel);
    sums.template add<W>(0, p.hidden_units, d_hidden);
    sums.put(first_sample);
  }
}

}  // namespace

void gate_layer_backward(const ChannelGateBackward& p, const Grid& grid, Stream stream) {
  with_walk(p.dtype, p.geometry.gate_samples, [&](auto weight, auto samples) {
    using W = typename decltype(weight)::type;
    launch("gate_layer_backward", gate_layer_backward_kernel<W, acc_t<W>, samples()>, grid, stream,
           p);
  });
}

void hidden_layer_backward(const ChannelGateBackward& p, const Grid& grid, Stream stream) {
  with_walk(p.dtype, p.geometry.hidden_samples, [&](auto weight, auto samples) {
    using W = typename decltype(weight)::type;
    launch("hidden_layer_backward", hidden_layer_backward_kernel<W, acc_t<W>, samples()>, grid,
           stream, p);
  });
}

void both_layers_backward(const ChannelGateBackward& p, const Grid& grid, Stream stream) {
  with_walk(p.dtype, p.geometry.gate_samples, [&](auto weight, auto samples) {
    using W = typename decltype(weight)::type;
    launch("both_layers_backward", both_layers_backward_kernel<W, acc_t<W>, samples()>, grid,
           stream, p);
  });
}

}  // namespace cbam::cuda
