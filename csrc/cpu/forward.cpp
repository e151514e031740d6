// CBAM's forward on the CPU, a sample at a time: pool over space, channel gate, pool over channels,
// spatial gate, scale. x comes from memory once and from cache the other two times. Of its parts
// (problem.h) one ends with the logits of the spatial gate, the other is the last pass.
// Compiled once per target, with CBAM_CPU_TARGET naming it.
#include "column_parts.h"
#include "kernels.h"
#include "mlp.h"
#include "output.h"
#include "schedule.h"
#include "stencil.h"

namespace cbam::cpu {
namespace {

template <class T>
class Forward {
 public:
  using A = acc_t<T>;
  using Index = index_t<A>;

  // `sums` holds [samples, hidden].
  Forward(const ForwardProblem& problem, A* sums)
      : p_(problem),
        shape_(problem.shape),
        mlp_(problem.shape, problem.weights),
        planes_(problem.shape),
        pixels_(problem.shape.pixels()),
        channels_first_(problem.strides.channels_first()),
        columns_(columns_of(problem)),
        output_(problem),
        sums_(sums) {}

  struct Workspace {
    typename ColumnParts<T>::Results columns;  // of parts of the rows
    A* planes;                                 // [2, image rows, pitch]: the maps
    A* spatial;                                // [pixels]: the spatial gate
    A* taps;                                   // [2, taps]: the convolution's weights
    A bias = A(0);

    Workspace(const ForwardProblem& p, int64_t, Carver& carver) {
      const Planes<A> planes_of(p.shape);
      columns = columns_of(p).carve(carver);
      planes = carver.array<A>(2 * planes_of.size());
      spatial = carver.array<A>(p.shape.pixels());
      taps = carver.array<A>(2 * p.shape.taps());
      if (!planes) return;
      widen_taps<T>(p, taps);
      if (const void* given = p.weights.conv_bias)
        for_weight_type<T>(p.weights.dtype, [&](auto type) {
          bias = load_one(static_cast<const typename decltype(type)::type*>(given));
        });
      std::memset(planes, 0, 2 * planes_of.size() * sizeof(A));
    }
  };

  void before_gate(int64_t first, int64_t last, Workspace& ws, const Run& run) const {
    for (int64_t n = first; n < last; ++n) pool(n, ws, run);
  }

  void gate(int64_t first, int64_t last, const Run& run) const {
    mlp_.first_layer(pooled(first), last - first, hidden(first), run);
    mlp_.second_layer(hidden(first), last - first, sums_ + first * shape_.hidden,
                      channel_gate(first), run);
  }

  void after_gate(int64_t first, int64_t last, int64_t end, Workspace& ws, const Run& run) const {
    for (int64_t n = first; n < last; ++n) {
      maps(n, ws, run);
      A* spatial =
          p_.training() ? static_cast<A*>(p_.saved.spatial_gate) + n * pixels_ : ws.spatial;
      run(planes_.image_rows(),
          [&](int64_t from, int64_t to) { spatial_gate(ws, spatial, from, to); });
      if (p_.part == Part::kLogits) continue;
      const int64_t next = sample_to_fetch(n, last - first, end);
      run(x(n).rows, [&](int64_t from, int64_t to) {
        output_.write(n, channel_gate(n), spatial, from, to, next);
      });
    }
  }

 private:
  // The stage that goes down x's columns: the pool where channels come last, else the maps. Of
  // these an image that is several tiles of columns has enough to share.
  static ColumnParts<T> columns_of(const ForwardProblem& p) {
    const int64_t channels = p.shape.channels, pixels = p.shape.pixels();
    if (!p.strides.channels_first()) return {pixels, channels, kPoolRows};
    if (pixels > kColumnTile) return {channels, pixels, channels};
    const int64_t eighth = (channels + 63) / 64 * 8;
    return {channels, pixels, eighth < kMapRows ? kMapRows : eighth};
  }

  Matrix<const T> x(int64_t n) const { return output_.x(n); }

  A* pooled(int64_t n) const { return static_cast<A*>(p_.saved.pooled) + n * 2 * shape_.channels; }
  A* hidden(int64_t n) const { return static_cast<A*>(p_.saved.hidden) + n * 2 * shape_.hidden; }
  A* channel_gate(int64_t n) const {
    return static_cast<A*>(p_.saved.channel_gate) + n * shape_.channels;
  }

  void write_pooled(int64_t n, int64_t c, A sum, A max, int64_t argmax) const {
    pooled(n)[c] = sum / static_cast<A>(pixels_);
    pooled(n)[shape_.channels + c] = max;
    if (p_.training())
      p_.saved.pixel_argmax[n * shape_.channels + c] = static_cast<int32_t>(argmax);
  }

  void pool(int64_t n, Workspace& ws, const Run& run) const {
    if (channels_first_) {
      run(shape_.channels, [&](int64_t begin, int64_t end) {
        for_rows<kPooledTogether>(begin, end, [&](auto together, int64_t c) {
          constexpr int kRows = decltype(together)::value;
          Extremes<A> of[kRows];
          if (p_.training())
            reduce_rows<kRows, false, true>(x(n), c, nullptr, of);
          else
            reduce_rows<kRows, false, false>(x(n), c, nullptr, of);
          for (int i = 0; i < kRows; ++i)
            write_pooled(n, c + i, of[i].sum, of[i].max, of[i].argmax);
        });
      });
    } else if (p_.training()) {
      pool_columns<true>(n, ws, run);
    } else {
      pool_columns<false>(n, ws, run);
    }
  }

  // Channels last.
  template <bool kArgmax>
  void pool_columns(int64_t n, Workspace& ws, const Run& run) const {
    const int64_t channels = shape_.channels;
    columns_.template reduce<false, kArgmax>(x(n), nullptr, ws.columns, run);
    A sum[kColumnTile], max[kColumnTile];
    Index argmax[kColumnTile] = {};
    for (int64_t c = 0; c < channels; c += kColumnTile) {
      const int64_t count = channels - c < kColumnTile ? channels - c : kColumnTile;
      columns_.template merge<false, kArgmax>(x(n), nullptr, ws.columns, c, count, sum, max,
                                              argmax);
      for (int64_t j = 0; j < count; ++j) write_pooled(n, c + j, sum[j], max[j], argmax[j]);
    }
  }

  // Mean and maximum over channels of x * channel_gate, into the planes.
  void maps(int64_t n, Workspace& ws, const Run& run) const {
    if (p_.training())
      make_maps<true>(n, ws, run);
    else
      make_maps<false>(n, ws, run);
  }

  template <bool kArgmax>
  void make_maps(int64_t n, Workspace& ws, const Run& run) const {
    if (channels_first_)
      columns_.template reduce<true, kArgmax>(x(n), channel_gate(n), ws.columns, run);
    run((pixels_ + kColumnTile - 1) / kColumnTile, [&](int64_t first, int64_t last) {
      A mean[kColumnTile], max[kColumnTile];
      Index argmax[kColumnTile];
      for (int64_t begin = first * kColumnTile; begin < last * kColumnTile; begin += kColumnTile) {
        const int64_t end = begin + kColumnTile < pixels_ ? begin + kColumnTile : pixels_;
        if (begin >= end) break;
        map_tile<kArgmax>(n, begin, end, mean, max, argmax, ws);
        planes_.insert(mean, begin, end, ws.planes);
        planes_.insert(max, begin, end, ws.planes + planes_.size());
        if (kArgmax) save_maps(n, begin, end, mean, max, argmax);
      }
    });
  }

  template <bool kArgmax>
  void map_tile(int64_t n, int64_t begin, int64_t end, A* mean, A* max, Index* argmax,
                const Workspace& ws) const {
    const A* gate = channel_gate(n);
    if (channels_first_) {
      columns_.template merge<true, kArgmax>(x(n), gate, ws.columns, begin, end - begin, mean, max,
                                             argmax);
    } else {
      for_rows<kRowsTogether>(begin, end, [&](auto together, int64_t s) {
        constexpr int kRows = decltype(together)::value;
        Extremes<A> of[kRows];
        reduce_rows<kRows, true, kArgmax>(x(n), s, gate, of);
        for (int i = 0; i < kRows; ++i) {
          mean[s + i - begin] = of[i].sum;
          max[s + i - begin] = of[i].max;
          argmax[s + i - begin] = static_cast<Index>(of[i].argmax);
        }
      });
    }
    for (int64_t j = 0; j < end - begin; ++j) mean[j] /= static_cast<A>(shape_.channels);
  }

  void save_maps(int64_t n, int64_t begin, int64_t end, const A* mean, const A* max,
                 const Index* argmax) const {
    T* saved = static_cast<T*>(p_.saved.maps) + n * 2 * pixels_ + begin;
    int32_t* channel = p_.saved.channel_argmax + n * pixels_ + begin;
    for_vectors_again<A>(end - begin, [&](int64_t j, auto lanes) {
      lanes.store(saved + j, lanes.load(mean + j));
      lanes.store(saved + pixels_ + j, lanes.load(max + j));
    });
    for (int64_t j = 0; j < end - begin; ++j) channel[j] = static_cast<int32_t>(argmax[j]);
  }

  // Image rows [begin, end) of conv(maps) + bias, and of the sigmoid where that is what follows.
  void spatial_gate(const Workspace& ws, A* gate, int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row)
      correlate_row(planes_, ws.planes, 2, ws.taps, ws.bias, row, gate + row * shape_.width);
    if (p_.part == Part::kLogits) return;
    A* rows = gate + begin * shape_.width;
    for_vectors<A>((end - begin) * shape_.width, [&](int64_t j, auto lanes) {
      lanes.store(rows + j, sigmoid<A>(lanes.load(rows + j)));
    });
  }

  static constexpr int64_t kPoolRows = 1024, kMapRows = 32;
  // As many rows as a vector has lanes, so that none is idle when they are folded, where there are
  // registers for them.
  static constexpr int kPooledTogether = kRegisters < 32 ? kRowsTogether : kLanes<A>;

  const ForwardProblem& p_;
  const Shape& shape_;
  Mlp<T> mlp_;
  Planes<A> planes_;
  int64_t pixels_;
  bool channels_first_;
  ColumnParts<T> columns_;
  LastPass<T> output_;
  A* sums_;  // [samples, hidden]: of the hidden vectors
};

template <class T>
void run(const ForwardProblem& problem, const ThreadPool& pool) {
  using A = acc_t<T>;
  if (problem.part == Part::kScale) return scale<T>(problem, pool);
  A* sums = nullptr;
  Scratch scratch;
  scratch.carve([&](Carver& carver) {
    sums = carver.array<A>(problem.shape.samples * problem.shape.hidden);
  });
  run_samples(Forward<T>(problem, sums), problem, pool, sizeof(T));
}

}  // namespace

namespace CBAM_CPU_TARGET {

void forward(const ForwardProblem& problem, const ThreadPool& pool) {
  switch (problem.dtype) {
    case DType::kFloat32: return run<float>(problem, pool);
    case DType::kFloat64: return run<double>(problem, pool);
    case DType::kFloat16: return run<Half>(problem, pool);
    case DType::kBFloat16: return run<BFloat16>(problem, pool);
  }
}

}  // namespace CBAM_CPU_TARGET
}  // namespace cbam::cpu
