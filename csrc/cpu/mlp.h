// The shared two-layer MLP of the channel gate and its derivatives. Weights are walked row by row,
// each row once for all samples of a group.
#pragma once

#include "../problem.h"
#include "reduce.h"

namespace cbam::cpu {
namespace {

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
    for (int64_t r = 0; r < hidden; ++r)
      for (int64_t i = 0; i < 2 * samples; ++i) {
        const A z = dot(w0 + r * channels, pooled + i * channels, channels) + (b0 ? b0[r] : A(0));
        hidden_out[i * hidden + r] = relu(z);
      }
  }

  // gate [samples, channels] = sigmoid(W1 (hidden of mean + hidden of max) + 2 b1).
  // `sums` holds samples * hidden.
  void second_layer(const A* hidden_in, int64_t samples, A* sums, A* gate) const {
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t r = 0; r < hidden; ++r)
        sums[n * hidden + r] = hidden_in[2 * n * hidden + r] + hidden_in[(2 * n + 1) * hidden + r];
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t n = 0; n < samples; ++n)
        gate[n * channels + c] =
            dot(w1 + c * hidden, sums + n * hidden, hidden) + (b1 ? A(2) * b1[c] : A(0));
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
