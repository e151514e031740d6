// The shared two-layer MLP of the channel gate and its derivatives. Weights are walked some rows at
// a time, each once for all samples of a group.
#pragma once

#include "../problem.h"
#include "reduce.h"

namespace cbam::cpu {
namespace {

// put(r, v, sum over n elements of row r of a matrix times vector v) for kRows rows and kVectors
// vectors: enough sums side by side to hide the latency of an addition, few enough for registers.
// Each is made in the same order, whichever others are made with it.
template <int kRows, int kVectors, class A, class Put>
CBAM_INLINE void some_products(const A* matrix, const A* vectors, int64_t n, Put put) {
  A total[kRows][kVectors] = {};
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = n - begin < kSumBlock ? n : begin + kSumBlock;
    vec_t<A> sum[kRows][kVectors] = {};
    for_loads<A>(begin, end, [&](int64_t j, auto lanes) {
      vec_t<A> x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = lanes.load(vectors + v * n + j);
      for (int r = 0; r < kRows; ++r) {
        const vec_t<A> w = lanes.load(matrix + r * n + j);
        for (int v = 0; v < kVectors; ++v) sum[r][v] += w * x[v];
      }
    });
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) total[r][v] += sum_of_lanes<A>(sum[r][v]);
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) put(r, v, total[r][v]);
}

// The same for all rows of a matrix [rows, n] and all vectors [count, n].
template <class A, class Put>
void products(const A* matrix, int64_t rows, const A* vectors, int64_t count, int64_t n, Put put) {
  constexpr int kMost = 4;
  for (int64_t from = 0; from < count; from += kMost)
    for_count<kMost>(count - from < kMost ? count - from : kMost, [&](auto some) {
      constexpr int kVectors = decltype(some)::value, kRows = kVectors > 2 ? 2 : 4;
      const auto of_rows = [&](auto together, int64_t first) {
        some_products<decltype(together)::value, kVectors>(
            matrix + first * n, vectors + from * n, n,
            [&](int r, int v, A sum) { put(first + r, from + v, sum); });
      };
      int64_t first = 0;
      for (; first + kRows <= rows; first += kRows) of_rows(Count<kRows>{}, first);
      for (; first < rows; ++first) of_rows(Count<1>{}, first);
    });
}

template <class A>
struct Mlp {
  int64_t channels, hidden;
  const A *w0, *b0, *w1, *b1;  // [hidden, channels], [hidden], [channels, hidden], [channels]

  Mlp(const Shape& s, const Weights& w)
      : channels(s.channels),
        hidden(s.hidden),
        w0(static_cast<const A*>(w.fc1_weight)),
        b0(static_cast<const A*>(w.fc1_bias)),
        w1(static_cast<const A*>(w.fc2_weight)),
        b1(static_cast<const A*>(w.fc2_bias)) {}

  // pooled [samples, 2, channels] -> hidden [samples, 2, hidden] = relu(W0 pooled + b0)
  void first_layer(const A* pooled, int64_t samples, A* hidden_out) const {
    products(w0, hidden, pooled, 2 * samples, channels, [&](int64_t r, int64_t i, A sum) {
      hidden_out[i * hidden + r] = relu(sum + (b0 ? b0[r] : A(0)));
    });
  }

  // gate [samples, channels] = sigmoid(W1 (hidden of mean + hidden of max) + 2 b1).
  // `sums` holds samples * hidden.
  void second_layer(const A* hidden_in, int64_t samples, A* sums, A* gate) const {
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t r = 0; r < hidden; ++r)
        sums[n * hidden + r] = hidden_in[2 * n * hidden + r] + hidden_in[(2 * n + 1) * hidden + r];
    products(w1, channels, sums, samples, hidden, [&](int64_t c, int64_t n, A sum) {
      gate[n * channels + c] = sum + (b1 ? A(2) * b1[c] : A(0));
    });
    for_vectors<A>(samples * channels, [&](int64_t j, auto lanes) {
      lanes.store(gate + j, sigmoid<A>(lanes.load(gate + j)));
    });
  }

  // d_logits [channels] -> d_hidden [2, hidden] of one sample: W1^T d_logits where the ReLU passes.
  void second_layer_backward(const A* d_logits, const A* hidden_in, A* d_hidden) const {
    for (int64_t r = 0; r < hidden; ++r) d_hidden[r] = A(0);
    for (int64_t c = 0; c < channels; ++c)
      add_scaled(w1 + c * hidden, d_logits[c], d_hidden, hidden);
    for (int64_t r = 0; r < hidden; ++r) {
      const A d = d_hidden[r];
      d_hidden[r] = relu_passes(hidden_in[r]) ? d : A(0);
      d_hidden[hidden + r] = relu_passes(hidden_in[hidden + r]) ? d : A(0);
    }
  }

  // d_hidden [2, hidden] -> d_pooled [2, channels] of one sample: W0^T d_hidden.
  void first_layer_backward(const A* d_hidden, A* d_pooled) const {
    for (int64_t j = 0; j < 2 * channels; ++j) d_pooled[j] = A(0);
    for (int64_t r = 0; r < hidden; ++r)
      for (int64_t i = 0; i < 2; ++i)
        add_scaled(w0 + r * channels, d_hidden[i * hidden + r], d_pooled + i * channels, channels);
  }
};

}  // namespace
}  // namespace cbam::cpu
