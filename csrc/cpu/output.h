// The last pass of the forward: out = x * channel_gate * spatial_gate, and what follows.
#pragma once

#include "../problem.h"
#include "reduce.h"
#include "schedule.h"

namespace cbam::cpu {
namespace {

template <class T>
class LastPass {
 public:
  using A = acc_t<T>;

  explicit LastPass(const ForwardProblem& problem)
      : p_(problem), first_(problem.strides.channels_first()), large_(is_large(problem)) {}

  Matrix<const T> x(int64_t n) const {
    return sample_of(static_cast<const T*>(p_.x), p_.shape, p_.strides, n);
  }

  // Rows [begin, end) of a sample. Those of the sample `next` are asked for meanwhile; n itself for
  // none.
  void write(int64_t n, const A* channel_gate, const A* spatial_gate, int64_t begin, int64_t end,
             int64_t next) const {
    const auto out = sample_of(static_cast<T*>(p_.out), p_.shape, p_.out_strides, n);
    const auto scale = [&](auto ending) {
      scale_rows(x(n), out, begin, end, first_ ? channel_gate : spatial_gate,
                 first_ ? spatial_gate : channel_gate, large_, x(next), ending);
    };
    const bool clips = p_.ending.relu;
    if (const auto* data = static_cast<const T*>(p_.ending.residual)) {
      // Added without a condition, which may keep compilers from one rounding for both operations.
      const auto residual = sample_of(data, p_.shape, p_.ending.strides, n);
      scale([residual, clips](vec_t<A> v, int64_t r, int64_t j, auto lanes) {
        v += lanes.load(residual.row(r) + j);
        return clips ? relu(v) : v;
      });
    } else if (clips) {
      scale([](vec_t<A> v, int64_t, int64_t, auto) { return relu(v); });
    } else {
      scale([](vec_t<A> v, int64_t, int64_t, auto) { return v; });
    }
  }

 private:
  const ForwardProblem& p_;
  bool first_;  // the channels
  bool large_;  // the output
};

// By itself, from the channel gate and the logits of the spatial gate.
template <class T>
void scale(const ForwardProblem& p, const ThreadPool& pool) {
  using A = acc_t<T>;
  const Shape& s = p.shape;
  const LastPass<T> output(p);
  const int64_t rows = p.strides.channels_first() ? s.channels : s.pixels();
  const Run run = s.samples * s.channels * s.pixels() < kSmallestSplit ? Run() : Run(pool);
  const A* logits = static_cast<const A*>(p.logits);
  A* gate = static_cast<A*>(p.saved.spatial_gate);
  run(s.samples * s.pixels(), [&](int64_t first, int64_t last) {
    for_vectors<A>(last - first, [&](int64_t j, auto lanes) {
      lanes.store(gate + first + j, sigmoid<A>(lanes.load(logits + first + j)));
    });
  });
  run(s.samples * rows, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t n = first / rows, begin = first % rows;
      const int64_t end = rows - begin < last - first ? rows : begin + last - first;
      output.write(n, static_cast<const A*>(p.saved.channel_gate) + n * s.channels,
                   gate + n * s.pixels(), begin, end, n);
      first += end - begin;
    }
  });
}

}  // namespace
}  // namespace cbam::cpu
