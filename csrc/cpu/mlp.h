// The shared two-layer MLP of the channel gate and its derivatives. Weights are read in the dtype
// they are kept in, some rows at a time, for all samples of a group.
#pragma once

#include "../problem.h"
#include "reduce.h"
#include "schedule.h"

namespace cbam::cpu {
namespace {

// put(r, v, sum over n elements of row r of a matrix times vector v) for kRows rows and kVectors
// vectors: enough sums side by side to hide the latency of an addition, few enough for registers.
// Each is made in the same order, whichever others are made with it.
template <int kRows, int kVectors, class W, class A, class Put>
CBAM_INLINE void some_products(const W* matrix, const A* vectors, int64_t n, Put put) {
  A total[kRows * kVectors] = {};
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = n - begin < kSumBlock ? n : begin + kSumBlock;
    vec_t<A> sum[kRows * kVectors] = {};
    for_row_vectors<A>(begin, end, [&](int64_t j, auto lanes) {
      vec_t<A> x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = lanes.load(vectors + v * n + j);
      for (int r = 0; r < kRows; ++r) {
        const vec_t<A> w = lanes.load(matrix + r * n + j);
        for (int v = 0; v < kVectors; ++v) sum[r * kVectors + v] += w * x[v];
      }
    });
    A of_block[kRows * kVectors];
    sums_of_lanes<A>(sum, of_block);
    for (int i = 0; i < kRows * kVectors; ++i) total[i] += of_block[i];
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) put(r, v, total[r * kVectors + v]);
}

// The same for rows [begin, end) of a matrix and all vectors [count, n]; each kRows rows stay in
// the nearest cache until all vectors have met them.
template <int kRows, class W, class A, class Put>
CBAM_INLINE void products_by_rows(const W* matrix, int64_t begin, int64_t end, const A* vectors,
                                  int64_t count, int64_t n, Put put) {
  constexpr int kMost = 4;
  for_rows<kRows>(begin, end, [&](auto together, int64_t first) {
    for (int64_t from = 0; from < count; from += kMost)
      for_count<kMost>(count - from < kMost ? count - from : kMost, [&](auto some) {
        some_products<decltype(together)::value, decltype(some)::value>(
            matrix + first * n, vectors + from * n, n,
            [&](int r, int v, A sum) { put(first + r, from + v, sum); });
      });
  });
}
template <class W, class A, class Put>
void products(const W* matrix, int64_t begin, int64_t end, const A* vectors, int64_t count,
              int64_t n, Put put) {
  if (kRegisters < 32 && count > 2)
    products_by_rows<2>(matrix, begin, end, vectors, count, n, put);
  else
    products_by_rows<kRowsTogether>(matrix, begin, end, vectors, count, n, put);
}

// kRows rows, from `first` on, of what transposed_products adds up in columns [begin, begin + n).
template <int kRows, class W, class Factor, class Out>
CBAM_INLINE void add_some_rows(const W* matrix, int64_t first, int64_t cols, int64_t begin,
                               int64_t n, int64_t count, Factor factor, Out out) {
  using A = acc_t<W>;
  const W* rows = matrix + first * cols + begin;
  for (int64_t k = 0; k < count; ++k) {
    A f[kRows];
    for (int i = 0; i < kRows; ++i) f[i] = factor(first + i, k);
    A* to = out(k) + begin;
    for_row_vectors<A>(0, n, [&](int64_t j, auto lanes) {
      vec_t<A> sum = lanes.load(to + j);
      for (int i = 0; i < kRows; ++i) sum += f[i] * lanes.load(rows + i * cols + j);
      lanes.store(to + j, sum);
    });
  }
}

// out(k)[j] = sum over r, in its order, of factor(r, k) * matrix[r][j] for columns j in [from, end)
// and k < count.
template <class W, class Factor, class Out>
void transposed_products(const W* matrix, int64_t rows, int64_t cols, int64_t from, int64_t end,
                         int64_t count, Factor factor, Out out) {
  using A = acc_t<W>;
  constexpr int kRows = 8;
  for (int64_t k = 0; k < count; ++k) std::memset(out(k) + from, 0, (end - from) * sizeof(A));
  for (int64_t begin = from; begin < end; begin += kColumnTile) {
    const int64_t n = end - begin < kColumnTile ? end - begin : kColumnTile;
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows)
      add_some_rows<kRows>(matrix, r, cols, begin, n, count, factor, out);
    for (; r < rows; ++r) add_some_rows<1>(matrix, r, cols, begin, n, count, factor, out);
  }
}

// Calls body(Type<W>{}) with the dtype of the weights: that of x, or what it is computed in.
template <class T, class Body>
CBAM_INLINE void for_weight_type(DType dtype, Body body) {
  if constexpr (sizeof(T) == 2)
    if (bytes_of(dtype) == sizeof(T)) return body(Type<T>{});
  body(Type<acc_t<T>>{});
}

// The convolution's weights, [2, taps], for the walks over x, where they are read again and again.
template <class T>
void widen_taps(const ForwardProblem& p, acc_t<T>* to) {
  const ConvWeight& weight = p.weights.conv_weight;
  for_weight_type<T>(p.weights.dtype, [&](auto type) {
    const auto* from = static_cast<const typename decltype(type)::type*>(weight.data);
    const int64_t taps = p.shape.taps();
    for (int64_t i = 0; i < 2 * taps; ++i) to[i] = load_one(from + weight.place(i, taps));
  });
}

// The two layers for `samples` samples, and their derivatives; `run` is how parts of a layer are
// run (schedule.h), each of which reads its own weights.
template <class T>
class Mlp {
 public:
  using A = acc_t<T>;

  Mlp(const Shape& shape, const Weights& weights)
      : channels_(shape.channels), hidden_(shape.hidden), weights_(weights) {}

  // pooled [samples, 2, channels] -> hidden [samples, 2, hidden] = relu(W0 pooled + b0)
  template <class Run>
  void first_layer(const A* pooled, int64_t samples, A* hidden, Run run) const {
    for_parts<kRowsTogether>(hidden_, run, [&](int64_t begin, int64_t end, auto type) {
      using W = typename decltype(type)::type;
      const W* bias = static_cast<const W*>(weights_.fc1_bias);
      products(static_cast<const W*>(weights_.fc1_weight), begin, end, pooled, 2 * samples,
               channels_, [&](int64_t r, int64_t i, A sum) {
                 hidden[i * hidden_ + r] = relu(sum + (bias ? load_one(bias + r) : A(0)));
               });
    });
  }

  // gate [samples, channels] = sigmoid(W1 (hidden of mean + hidden of max) + 2 b1).
  // `sums` holds samples * hidden.
  template <class Run>
  void second_layer(const A* hidden, int64_t samples, A* sums, A* gate, Run run) const {
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t r = 0; r < hidden_; ++r)
        sums[n * hidden_ + r] = hidden[2 * n * hidden_ + r] + hidden[(2 * n + 1) * hidden_ + r];
    for_parts<kRowsTogether>(channels_, run, [&](int64_t begin, int64_t end, auto type) {
      using W = typename decltype(type)::type;
      const W* bias = static_cast<const W*>(weights_.fc2_bias);
      products(static_cast<const W*>(weights_.fc2_weight), begin, end, sums, samples, hidden_,
               [&](int64_t c, int64_t n, A sum) {
                 gate[n * channels_ + c] = sum + (bias ? A(2) * load_one(bias + c) : A(0));
               });
      for (int64_t n = 0; n < samples; ++n)
        for_vectors<A>(end - begin, [&](int64_t j, auto lanes) {
          A* some = gate + n * channels_ + begin + j;
          lanes.store(some, sigmoid<A>(lanes.load(some)));
        });
    });
  }

  // d_logits [samples, channels] -> d_hidden [samples, 2, hidden]: W1^T d_logits where the ReLU
  // passes.
  template <class Run>
  void second_layer_backward(const A* d_logits, int64_t samples, const A* hidden, A* d_hidden,
                             Run run) const {
    for_parts<kLanes<A>>(hidden_, run, [&](int64_t begin, int64_t end, auto type) {
      using W = typename decltype(type)::type;
      transposed_products(
          static_cast<const W*>(weights_.fc2_weight), channels_, hidden_, begin, end, samples,
          [&](int64_t c, int64_t n) { return d_logits[n * channels_ + c]; },
          [&](int64_t n) { return d_hidden + 2 * n * hidden_; });
      for (int64_t n = 0; n < samples; ++n)
        for (int64_t r = begin; r < end; ++r) {
          A* of_mean = d_hidden + 2 * n * hidden_ + r;
          const A* passed = hidden + 2 * n * hidden_ + r;
          const A d = *of_mean;
          of_mean[0] = relu_passes(passed[0]) ? d : A(0);
          of_mean[hidden_] = relu_passes(passed[hidden_]) ? d : A(0);
        }
    });
  }

  // d_hidden [samples, 2, hidden] -> d_pooled [samples, 2, channels]: W0^T d_hidden.
  template <class Run>
  void first_layer_backward(const A* d_hidden, int64_t samples, A* d_pooled, Run run) const {
    for_parts<kLanes<A>>(channels_, run, [&](int64_t begin, int64_t end, auto type) {
      using W = typename decltype(type)::type;
      transposed_products(
          static_cast<const W*>(weights_.fc1_weight), hidden_, channels_, begin, end, 2 * samples,
          [&](int64_t r, int64_t i) { return d_hidden[i * hidden_ + r]; },
          [&](int64_t i) { return d_pooled + i * channels_; });
    });
  }

 private:
  // Calls body(begin, end, Type<W>{}) for parts of what a layer makes `count` of, each of them, but
  // for the last, made of as many as are walked together.
  template <int kTogether, class Run, class Body>
  void for_parts(int64_t count, Run run, Body body) const {
    const auto part = [&](int64_t first, int64_t last) {
      const int64_t end = last * kTogether < count ? last * kTogether : count;
      for_weight_type<T>(weights_.dtype, [&](auto type) { body(first * kTogether, end, type); });
    };
    const int64_t parts = (count + kTogether - 1) / kTogether;
    if (channels_ * hidden_ < kSmallestLayer)
      part(0, parts);
    else
      run(parts, part);
  }

  int64_t channels_, hidden_;
  const Weights& weights_;  // [hidden, channels], [hidden], [channels, hidden], [channels]
};

}  // namespace
}  // namespace cbam::cpu
