// The last pass of the backward, from dout to dx. With g the channel gate, a the spatial gate, C
// channels and S pixels:
//   dx = (dout a + dmean / C + dmax [c is s's argmax]) g + davg / S + dtop [s is c's argmax]
#pragma once

#include "backward_tensors.h"
#include "schedule.h"

namespace cbam::cpu {
namespace {

// Gradients of one sample's maps, kept until dx is written.
template <class A>
struct MapGradients {
  A* d_mean;  // [pixels]: over C
  A* d_max;   // [pixels]
};

// What reaches x of one sample through the gates.
template <class A>
struct Reach {
  const MapGradients<A>& maps;
  const A* d_pooled;  // [2, channels]: of the mean (over S) and of the maximum over space
};

template <class T>
class InputGradient {
 public:
  using A = acc_t<T>;

  explicit InputGradient(const BackwardProblem& problem) : t_{problem}, large_(is_large(problem)) {}

  // Rows [begin, end) of dx. Where that is large, so that samples come from memory, those of the
  // sample `next` are asked for meanwhile; n itself for none.
  void write(int64_t n, const Reach<A>& reach, int64_t begin, int64_t end, int64_t next) const {
    const auto channels = [&](auto together, int64_t c, T* to, int64_t stride, auto for_columns) {
      write_channels<decltype(together)::value>(n, reach, c, to, stride, for_columns);
    };
    const auto pixel = [&](auto, int64_t s, T* to, int64_t, auto for_columns) {
      write_pixel(n, reach, s, to, for_columns);
    };
    if (t_.channels_first)
      write_by<Channels>(n, begin, end, channels, next);
    else
      write_by<Pixels>(n, begin, end, pixel, next);
  }

 private:
  template <class Together, class Write>
  void write_by(int64_t n, int64_t begin, int64_t end, Write rows, int64_t next) const {
    constexpr int kRows = Together::value;
    if (!large_) return write_rows<kRows>(t_.dx(n), begin, end, rows);
    if (next == n) return stream_rows<kRows>(t_.dx(n), begin, end, rows);
    const Matrix<const T> soon[] = {t_.x(next), t_.dout(next)};
    stream_rows<kRows>(t_.dx(n), begin, end,
                       [&](auto some, int64_t r, T* to, int64_t stride, auto for_columns) {
                         constexpr int kSome = decltype(some)::value;
                         rows(some, r, to, stride, fetching<kSome>(soon, r, for_columns));
                       });
  }

  // Channels [c, c + kRows), `stride` apart.
  template <int kRows, class ForColumns>
  CBAM_INLINE_MEMBER void write_channels(int64_t n, const Reach<A>& reach, int64_t c, T* to,
                                         int64_t stride, ForColumns for_columns) const {
    const Matrix<const T> in = t_.dout(n);
    const A* spatial = t_.spatial_gate(n);
    const OfRows<kRows, A> gate(t_.channel_gate(n) + c), d_avg(reach.d_pooled + c),
        d_top(reach.d_pooled + t_.channels + c);
    const int32_t* maximum_of = t_.channel_argmax(n);
    const OfRows<kRows, int32_t> top(t_.pixel_argmax(n) + c);
    for_columns(t_.cols, [&](int64_t s, auto lanes) {
      const vec_t<A> a = lanes.load(spatial + s), mean = lanes.load(reach.maps.d_mean + s),
                     max = lanes.load(reach.maps.d_max + s);
      const ivec_t<A> winner = lanes.indices(maximum_of + s), pixel = iota<A>() + index_t<A>(s);
      for (int i = 0; i < kRows; ++i) {
        const vec_t<A> maps = mean + where<A>(winner == index_t<A>(c + i), max);
        const vec_t<A> pools = d_avg[i] + where<A>(pixel == index_t<A>(top[i]), splat(d_top[i]));
        lanes.store(to + i * stride + s, input_gradient_of(lanes.load(in.row(c + i) + s), a, maps,
                                                           splat(gate[i]), pools));
      }
    });
  }

  template <class ForColumns>
  CBAM_INLINE_MEMBER void write_pixel(int64_t n, const Reach<A>& reach, int64_t s, T* to,
                                      ForColumns for_columns) const {
    const T* in = t_.dout(n).row(s);
    const A *gate = t_.channel_gate(n), *d_avg = reach.d_pooled, *d_top = d_avg + t_.channels;
    const A spatial = t_.spatial_gate(n)[s], d_mean = reach.maps.d_mean[s],
            d_max = reach.maps.d_max[s];
    const int32_t* maximum_of = t_.pixel_argmax(n);
    const index_t<A> top = t_.channel_argmax(n)[s];
    for_columns(t_.cols, [&](int64_t c, auto lanes) {
      const vec_t<A> maps = d_mean + where<A>(iota<A>() + index_t<A>(c) == top, splat(d_max));
      const ivec_t<A> winner = lanes.indices(maximum_of + c);
      const vec_t<A> pools =
          lanes.load(d_avg + c) + where<A>(winner == index_t<A>(s), lanes.load(d_top + c));
      lanes.store(to + c, input_gradient_of(lanes.load(in + c), splat(spatial), maps,
                                            lanes.load(gate + c), pools));
    });
  }

  BackwardTensors<T> t_;
  bool large_;  // dx
};

}  // namespace
}  // namespace cbam::cpu
