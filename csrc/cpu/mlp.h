// The shared two-layer MLP of the channel gate and its derivatives. Weights are read in the dtype
// they are kept in, some rows at a time, for all samples of a group.
#pragma once

#include "../problem.h"
#include "reduce.h"
#include "schedule.h"

namespace cbam::cpu {
namespace {

// out[v][r] = sum over j of m[r][j] * vectors[v][j] for kRows rows and kVectors vectors from these
// on: enough sums side by side to hide the latency of an addition, few enough for registers. Each
// is made in the same order, whichever others are made with it.
template <int kRows, int kVectors, class W, class A>
CBAM_INLINE void some_products(Matrix<const W> m, int64_t row, Matrix<const A> vectors,
                               int64_t vector, Matrix<A> out) {
  A total[kRows * kVectors] = {};
  for (int64_t begin = 0; begin < m.cols; begin += kSumBlock) {
    const int64_t end = m.cols - begin < kSumBlock ? m.cols : begin + kSumBlock;
    vec_t<A> sum[kRows * kVectors] = {};
    for_row_vectors<A>(begin, end, [&](int64_t j, auto lanes) {
      vec_t<A> x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = lanes.load(vectors.row(vector + v) + j);
      for (int r = 0; r < kRows; ++r) {
        const vec_t<A> w = lanes.load(m.row(row + r) + j);
        for (int v = 0; v < kVectors; ++v) sum[r * kVectors + v] += w * x[v];
      }
    });
    A of_block[kRows * kVectors];
    sums_of_lanes<A>(sum, of_block);
    for (int i = 0; i < kRows * kVectors; ++i) total[i] += of_block[i];
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) out.row(vector + v)[row + r] = total[r * kVectors + v];
}

// The same for rows [begin, end) and all vectors; each kRows rows stay in the nearest cache until
// all vectors have met them.
template <int kRows, class W, class A>
CBAM_INLINE void products_by_rows(Matrix<const W> m, int64_t begin, int64_t end,
                                  Matrix<const A> vectors, Matrix<A> out) {
  constexpr int kMost = 4;
  for_rows<kRows>(begin, end, [&](auto together, int64_t row) {
    for (int64_t v = 0; v < vectors.rows; v += kMost)
      for_count<kMost>(vectors.rows - v < kMost ? vectors.rows - v : kMost, [&](auto some) {
        some_products<decltype(together)::value, decltype(some)::value>(m, row, vectors, v, out);
      });
  });
}
template <class W, class A>
void products(Matrix<const W> m, int64_t begin, int64_t end, Matrix<const A> vectors,
              Matrix<A> out) {
  if (kRegisters < 32 && vectors.rows > 2)
    products_by_rows<2>(m, begin, end, vectors, out);
  else
    products_by_rows<kRowsTogether>(m, begin, end, vectors, out);
}

// kRows rows, from r on, of what transposed_products adds up in columns [begin, end).
template <int kRows, class W, class A>
CBAM_INLINE void add_some_rows(Matrix<const W> m, int64_t r, int64_t begin, int64_t end,
                               Matrix<const A> vectors, Matrix<A> out) {
  for (int64_t v = 0; v < vectors.rows; ++v) {
    const OfRows<kRows, A> factor(vectors.row(v) + r);
    A* to = out.row(v) + begin;
    for_row_vectors<A>(0, end - begin, [&](int64_t j, auto lanes) {
      vec_t<A> sum = lanes.load(to + j);
      for (int i = 0; i < kRows; ++i) sum += factor[i] * lanes.load(m.row(r + i) + begin + j);
      lanes.store(to + j, sum);
    });
  }
}

// out[v][j] = sum over r, in its order, of vectors[v][r] * m[r][j] for columns j in [from, end).
template <class W, class A>
void transposed_products(Matrix<const W> m, int64_t from, int64_t end, Matrix<const A> vectors,
                         Matrix<A> out) {
  constexpr int kRows = 8;
  for (int64_t v = 0; v < vectors.rows; ++v)
    std::memset(out.row(v) + from, 0, (end - from) * sizeof(A));
  for (int64_t begin = from; begin < end; begin += kColumnTile) {
    const int64_t stop = end - begin < kColumnTile ? end : begin + kColumnTile;
    for_rows<kRows>(0, m.rows, [&](auto together, int64_t r) {
      add_some_rows<decltype(together)::value>(m, r, begin, stop, vectors, out);
    });
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
  void first_layer(const A* pooled, int64_t samples, A* hidden, const Run& run) const {
    for_parts<kRowsTogether>(hidden_, run, [&](int64_t begin, int64_t end, auto type) {
      using W = typename decltype(type)::type;
      products(fc1<W>(), begin, end, rows_of(pooled, 2 * samples, channels_),
               rows_of(hidden, 2 * samples, hidden_));
      const W* bias = static_cast<const W*>(weights_.fc1_bias);
      for (int64_t i = 0; i < 2 * samples; ++i)
        for (int64_t r = begin; r < end; ++r) {
          A& unit = hidden[i * hidden_ + r];
          unit = relu(unit + (bias ? load_one(bias + r) : A(0)));
        }
    });
  }

  // gate [samples, channels] = sigmoid(W1 (hidden of mean + hidden of max) + 2 b1).
  // `sums` holds samples * hidden.
  void second_layer(const A* hidden, int64_t samples, A* sums, A* gate, const Run& run) const {
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t r = 0; r < hidden_; ++r)
        sums[n * hidden_ + r] = hidden[2 * n * hidden_ + r] + hidden[(2 * n + 1) * hidden_ + r];
    for_parts<kRowsTogether>(channels_, run, [&](int64_t begin, int64_t end, auto type) {
      using W = typename decltype(type)::type;
      products(fc2<W>(), begin, end, rows_of<const A>(sums, samples, hidden_),
               rows_of(gate, samples, channels_));
      const W* bias = static_cast<const W*>(weights_.fc2_bias);
      for (int64_t n = 0; n < samples; ++n)
        for_vectors<A>(end - begin, [&](int64_t j, auto lanes) {
          A* some = gate + n * channels_ + begin + j;
          const vec_t<A> b = bias ? lanes.load(bias + begin + j) : vec_t<A>{};
          lanes.store(some, sigmoid<A>(lanes.load(some) + A(2) * b));
        });
    });
  }

  // d_logits [samples, channels] -> d_hidden [samples, 2, hidden]: W1^T d_logits where the ReLU
  // passes.
  void second_layer_backward(const A* d_logits, int64_t samples, const A* hidden, A* d_hidden,
                             const Run& run) const {
    for_parts<kLanes<A>>(hidden_, run, [&](int64_t begin, int64_t end, auto type) {
      using W = typename decltype(type)::type;
      transposed_products(fc2<W>(), begin, end, rows_of(d_logits, samples, channels_),
                          {d_hidden, samples, hidden_, 2 * hidden_});
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
  void first_layer_backward(const A* d_hidden, int64_t samples, A* d_pooled, const Run& run) const {
    for_parts<kLanes<A>>(channels_, run, [&](int64_t begin, int64_t end, auto type) {
      using W = typename decltype(type)::type;
      transposed_products(fc1<W>(), begin, end, rows_of(d_hidden, 2 * samples, hidden_),
                          rows_of(d_pooled, 2 * samples, channels_));
    });
  }

 private:
  // Calls body(begin, end, Type<W>{}) for parts of what a layer makes `count` of, each of them, but
  // for the last, made of as many as are walked together.
  template <int kTogether, class Body>
  void for_parts(int64_t count, const Run& run, Body body) const {
    const auto part = [&](int64_t first, int64_t last) {
      const int64_t end = last * kTogether < count ? last * kTogether : count;
      for_weight_type<T>(weights_.dtype, [&](auto type) { body(first * kTogether, end, type); });
    };
    const int64_t parts = (count + kTogether - 1) / kTogether;
    (channels_ * hidden_ < kSmallestLayer ? Run() : run)(parts, part);
  }

  template <class E>
  static Matrix<E> rows_of(E* data, int64_t rows, int64_t cols) {
    return {data, rows, cols, cols};
  }
  template <class W>
  Matrix<const W> fc1() const {
    return rows_of(static_cast<const W*>(weights_.fc1_weight), hidden_, channels_);
  }
  template <class W>
  Matrix<const W> fc2() const {
    return rows_of(static_cast<const W*>(weights_.fc2_weight), channels_, hidden_);
  }

  int64_t channels_, hidden_;
  const Weights& weights_;
};

}  // namespace
}  // namespace cbam::cpu
