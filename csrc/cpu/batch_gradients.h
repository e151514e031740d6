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
    if (g.fc2_weight || g.fc2_bias) second_layer(workers);
    if (g.fc1_weight || g.fc1_bias) first_layer(workers);
    if (g.conv()) convolution();
  }

 private:
  // dW1 and db1. Each sample counts twice: with the hidden vector of its mean, and of its maximum.
  void second_layer(const ThreadPool& workers) const {
    const int64_t channels = shape_.channels, hidden = shape_.hidden;
    A* bias = static_cast<A*>(p_.gradients.fc2_bias);
    const auto d = [&](int64_t i) { return d_logits(i / 2); };
    outer_sums(workers, 2 * shape_.samples, channels, d, static_cast<const A*>(p_.saved.hidden),
               hidden, static_cast<A*>(p_.gradients.fc2_weight));
    if (!bias) return;
    sum_vectors(shape_.samples, channels, d_logits_, bias);
    for (int64_t c = 0; c < channels; ++c) bias[c] *= A(2);
  }

  // dW0 and db0.
  void first_layer(const ThreadPool& workers) const {
    const int64_t vectors = 2 * shape_.samples;
    const auto d = [&](int64_t i) { return d_hidden_ + i * shape_.hidden; };
    outer_sums(workers, vectors, shape_.hidden, d, static_cast<const A*>(p_.saved.pooled),
               shape_.channels, static_cast<A*>(p_.gradients.fc1_weight));
    if (A* bias = static_cast<A*>(p_.gradients.fc1_bias))
      sum_vectors(vectors, shape_.hidden, d_hidden_, bias);
  }

  // to[j] = sum over i of from[i][j]
  static void sum_vectors(int64_t count, int64_t n, const A* from, A* to) {
    for (int64_t j = 0; j < n; ++j) to[j] = A(0);
    for (int64_t i = 0; i < count; ++i) add_scaled(from + i * n, A(1), to, n);
  }

  // out[r][j] = sum over i of d(i)[r] * vectors[i][j], in the order of i; nothing where out is
  // null.
  template <class D>
  static void outer_sums(const ThreadPool& workers, int64_t count, int64_t rows, D d,
                         const A* vectors, int64_t n, A* out) {
    if (!out) return;
    OverThreads{workers}(rows, [&](int64_t begin, int64_t end) {
      combine(
          begin, end, count, [&](int64_t i, int64_t r) { return d(i)[r]; }, vectors, n,
          [&](int64_t r) { return out + r * n; });
    });
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
