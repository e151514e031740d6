// The gradients of the weights: sums over the batch of what each sample's backward leaves here, in
// the order of the samples. With l the channel gate's logits, h the hidden and p the pooled
// vectors:
//   dW1 = sum_n dl (h of mean + h of max)^T          db1 = 2 sum_n dl
//   dW0 = sum_n, pools dh p^T                        db0 = sum_n, pools dh
#pragma once

#include "../problem.h"
#include "reduce.h"
#include "schedule.h"

namespace cbam::cpu {
namespace {

template <class A>
class BatchGradients {
 public:
  explicit BatchGradients(const BackwardProblem& problem) : p_(problem), shape_(problem.shape) {}

  void carve(Carver& carver) {
    d_logits_ = carver.array<A>(shape_.samples * shape_.channels);
    d_hidden_ = carver.array<A>(shape_.samples * 2 * shape_.hidden);
    d_conv_ = carver.array<A>(shape_.samples * (2 * shape_.taps() + 1));
  }

  A* d_logits(int64_t n) const { return d_logits_ + n * shape_.channels; }
  // [2, hidden]
  A* d_hidden(int64_t n) const { return d_hidden_ + n * 2 * shape_.hidden; }
  // [2 taps + 1]: of the weight and of the bias
  A* d_conv(int64_t n) const { return d_conv_ + n * (2 * shape_.taps() + 1); }

  // Once all samples are done.
  void finish(const ThreadPool& pool) const {
    const Gradients& g = p_.gradients;
    const int64_t products = shape_.samples * shape_.channels * shape_.hidden;
    const ThreadPool workers{products < kSmallestSplit ? 1 : pool.threads, pool.run};
    if (g.fc2_weight || g.fc2_bias)
      OverThreads{workers}(shape_.channels, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) second_layer(c);
      });
    if (g.fc1_weight || g.fc1_bias)
      OverThreads{workers}(shape_.hidden, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) first_layer(r);
      });
    if (g.conv()) convolution();
  }

 private:
  // Row c of dW1 and of db1.
  void second_layer(int64_t c) const {
    const int64_t hidden = shape_.hidden;
    A* bias = static_cast<A*>(p_.gradients.fc2_bias);
    A* row = static_cast<A*>(p_.gradients.fc2_weight);
    if (row) std::memset(row += c * hidden, 0, hidden * sizeof(A));
    A total = A(0);
    for (int64_t n = 0; n < shape_.samples; ++n) {
      const A d = d_logits(n)[c];
      const A* h = static_cast<const A*>(p_.saved.hidden) + n * 2 * hidden;
      total += d;
      if (!row) continue;
      add_scaled(h, d, row, hidden);
      add_scaled(h + hidden, d, row, hidden);
    }
    if (bias) bias[c] = A(2) * total;
  }

  // Row r of dW0 and of db0.
  void first_layer(int64_t r) const {
    const int64_t channels = shape_.channels;
    A* bias = static_cast<A*>(p_.gradients.fc1_bias);
    A* row = static_cast<A*>(p_.gradients.fc1_weight);
    if (row) std::memset(row += r * channels, 0, channels * sizeof(A));
    A total = A(0);
    for (int64_t i = 0; i < 2 * shape_.samples; ++i) {
      const A d = d_hidden_[i * shape_.hidden + r];
      total += d;
      if (row) add_scaled(static_cast<const A*>(p_.saved.pooled) + i * channels, d, row, channels);
    }
    if (bias) bias[r] = total;
  }

  void convolution() const {
    A* weight = static_cast<A*>(p_.gradients.conv_weight);
    A* bias = static_cast<A*>(p_.gradients.conv_bias);
    const int64_t taps = 2 * shape_.taps();
    if (weight) std::memset(weight, 0, taps * sizeof(A));
    if (bias) *bias = A(0);
    for (int64_t n = 0; n < shape_.samples; ++n) {
      if (weight) add_scaled(d_conv(n), A(1), weight, taps);
      if (bias) *bias += d_conv(n)[taps];
    }
  }

  const BackwardProblem& p_;
  const Shape& shape_;
  A* d_logits_ = nullptr;  // [samples, channels]
  A* d_hidden_ = nullptr;  // [samples, 2, hidden]
  A* d_conv_ = nullptr;    // [samples, 2 taps + 1]
};

}  // namespace
}  // namespace cbam::cpu
