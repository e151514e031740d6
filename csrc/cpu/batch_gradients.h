// The gradients of the weights: sums over the batch of what each sample's backward leaves here, in
// the order of the samples, each rounded once to the dtype of the weights. With l the channel
// gate's logits, h the hidden and p the pooled vectors:
//   dW1 = sum_n dl (h of mean + h of max)^T          db1 = 2 sum_n dl
//   dW0 = sum_n, pools dh p^T                        db0 = sum_n, pools dh
#pragma once

#include "../problem.h"
#include "mlp.h"
#include "reduce.h"
#include "schedule.h"

namespace cbam::cpu {
namespace {

template <class T>
class BatchGradients {
 public:
  using A = acc_t<T>;

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
    const int64_t products = shape_.samples * shape_.channels * shape_.hidden;
    const Run run = products < kSmallestSplit ? Run() : Run(pool);
    for_weight_type<T>(p_.weights.dtype, [&](auto type) {
      using W = typename decltype(type)::type;
      second_layer<W>(run);
      first_layer<W>(run);
      convolution<W>();
    });
  }

 private:
  // dW1 and db1. Each sample counts twice: with the hidden vector of its mean, and of its maximum.
  template <class W>
  void second_layer(const Run& run) const {
    const int64_t channels = shape_.channels;
    const auto d = [&](int64_t i) { return d_logits(i / 2); };
    outer_sums(run, 2 * shape_.samples, channels, d, static_cast<const A*>(p_.saved.hidden),
               shape_.hidden, static_cast<W*>(p_.gradients.fc2_weight));
    sum_vectors(shape_.samples, channels, channels, d_logits_, A(2),
                static_cast<W*>(p_.gradients.fc2_bias));
  }

  // dW0 and db0.
  template <class W>
  void first_layer(const Run& run) const {
    const int64_t vectors = 2 * shape_.samples, hidden = shape_.hidden;
    const auto d = [&](int64_t i) { return d_hidden_ + i * hidden; };
    outer_sums(run, vectors, hidden, d, static_cast<const A*>(p_.saved.pooled), shape_.channels,
               static_cast<W*>(p_.gradients.fc1_weight));
    sum_vectors(vectors, hidden, hidden, d_hidden_, A(1), static_cast<W*>(p_.gradients.fc1_bias));
  }

  template <class W>
  void convolution() const {
    const int64_t count = 2 * shape_.taps();
    sum_vectors(shape_.samples, 1, count + 1, d_conv_ + count, A(1),
                static_cast<W*>(p_.gradients.conv_bias));
    W* out = static_cast<W*>(p_.gradients.conv_weight);
    if (!p_.weights.conv_weight.maps_last)
      return sum_vectors(shape_.samples, count, count + 1, d_conv_, A(1), out);
    for (int64_t i = 0; out && i < count; ++i)
      sum_vectors(shape_.samples, 1, count + 1, d_conv_ + i, A(1),
                  out + p_.weights.conv_weight.place(i, shape_.taps()));
  }

  // out[r][j] = sum over i of d(i)[r] * vectors[i][j], in the order of i; nothing where out is
  // null. So below.
  template <class D, class W>
  static void outer_sums(const Run& run, int64_t count, int64_t rows, D d, const A* vectors,
                         int64_t n, W* out) {
    if (!out) return;
    run(rows, [&](int64_t begin, int64_t end) {
      combine(
          begin, end, count, [&](int64_t i, int64_t r) { return d(i)[r]; }, vectors, n,
          [&](int64_t r) { return out + r * n; });
    });
  }

  // out[j] = scale * sum over i of from[i][j], the rows `pitch` elements apart.
  template <class W>
  static void sum_vectors(int64_t count, int64_t n, int64_t pitch, const A* from, A scale, W* out) {
    if (!out) return;
    for_vectors<A>(n, [&](int64_t j, auto lanes) {
      vec_t<A> sum = {};
      for (int64_t i = 0; i < count; ++i) sum += lanes.load(from + i * pitch + j);
      lanes.store(out + j, scale * sum);
    });
  }

  const BackwardProblem& p_;
  const Shape& shape_;
  A* d_logits_ = nullptr;  // [samples, channels]
  A* d_hidden_ = nullptr;  // [samples, 2, hidden]
  A* d_conv_ = nullptr;    // [samples, 2 taps + 1]
};

}  // namespace
}  // namespace cbam::cpu
