// CBAM's backward on the CPU, a sample at a time. With p = dout * x, g the channel gate, a the
// spatial gate, C channels and S pixels:
//   da[s] = sum_c p g                   dz = da a (1 - a)        (dmean, dmax)[s] = conv^T(dz)
//   dy = dout a + dmean / C + dmax [c is s's argmax]             dg[c] = sum_s dy x
//   dl = dg g (1 - g)                   (davg, dtop)[c] = MLP^T(dl)
//   dx = dy g + davg / S + dtop [s is c's argmax]
// Three walks over a sample: x and dout (both sums of p), x (the maps' part of dg), dout (dx). Of
// its parts (problem.h) one is the first walk, the other all that follows dz.
// Compiled once per target, with CBAM_CPU_TARGET naming it.
#include "backward_tensors.h"
#include "batch_gradients.h"
#include "input_gradient.h"
#include "kernels.h"
#include "mlp.h"
#include "schedule.h"
#include "stencil.h"

namespace cbam::cpu {
namespace {

template <class T>
class Backward {
 public:
  using A = acc_t<T>;

  // `batch` takes what is summed over the batch; `d_pooled` holds [samples, 2, channels] and
  // `flipped` [2, taps].
  Backward(const BackwardProblem& problem, const BatchGradients<T>& batch, A* d_pooled, A* flipped)
      : p_(problem),
        shape_(problem.shape),
        mlp_(problem.shape, problem.weights),
        planes_(problem.shape),
        t_{problem},
        input_gradient_(problem),
        reaches_gate_(problem.gradients.x || problem.gradients.mlp()),
        batch_(batch),
        d_pooled_(d_pooled),
        flipped_(flipped) {
    if (p_.part != Part::kScale) flip_weights();
  }

  struct Workspace {
    A* partial;  // [row blocks, cols]
    A* row_sum;  // [rows]
    A* col_sum;  // [cols]
    A* planes;   // [3, image rows, pitch]: dz and, for the convolution's gradient, the maps
    MapGradients<A> maps[kMostTogether];

    Workspace(const ForwardProblem& p, int64_t group, Carver& carver) {
      const Planes<A> planes_of(p.shape);
      const int64_t channels = p.shape.channels, pixels = p.shape.pixels();
      const bool first = p.strides.channels_first();
      const int64_t rows = first ? channels : pixels, cols = first ? pixels : channels;
      partial = carver.array<A>(row_blocks(rows) * cols);
      row_sum = carver.array<A>(rows);
      col_sum = carver.array<A>(cols);
      planes = carver.array<A>(3 * planes_of.size());
      for (int64_t i = 0; i < group; ++i)
        maps[i] = {carver.array<A>(pixels), carver.array<A>(pixels)};
      if (planes) std::memset(planes, 0, 3 * planes_of.size() * sizeof(A));
    }
    A* channel_sum(bool channels_first) const { return channels_first ? row_sum : col_sum; }
    A* pixel_sum(bool channels_first) const { return channels_first ? col_sum : row_sum; }
  };

  void before_gate(int64_t first, int64_t last, Workspace& ws, const Run& run) const {
    for (int64_t n = first; n < last; ++n) {
      if (p_.part == Part::kLogits)
        begin_sums(ws);
      else
        sum_products(n, ws, run);
      if (p_.part == Part::kScale) {
        put_sums(n, ws);
        continue;
      }
      gradient_of_logits(n, ws);
      if (p_.gradients.conv()) gradient_of_conv(n, ws, run);
      if (!reaches_gate_) continue;
      const MapGradients<A>& maps = ws.maps[n - first];
      gradient_of_maps(ws, maps, run);
      add_map_terms(n, ws, maps, run);
      gradient_of_gate(n, ws);
    }
  }

  // davg / S and dtop.
  void gate(int64_t first, int64_t last, const Run& run) const {
    if (!p_.gradients.x && !p_.gradients.fc1_weight && !p_.gradients.fc1_bias) return;
    const int64_t samples = last - first;
    mlp_.second_layer_backward(batch_.d_logits(first), samples, t_.hidden(first),
                               batch_.d_hidden(first), run);
    if (!p_.gradients.x) return;
    mlp_.first_layer_backward(batch_.d_hidden(first), samples, d_pooled(first), run);
    for (int64_t n = first; n < last; ++n)
      for (int64_t c = 0; c < shape_.channels; ++c) d_pooled(n)[c] /= static_cast<A>(t_.pixels);
  }

  void after_gate(int64_t first, int64_t last, int64_t end, Workspace& ws, const Run& run) const {
    if (!p_.gradients.x) return;
    for (int64_t n = first; n < last; ++n) {
      const Reach<A> reach{ws.maps[n - first], d_pooled(n)};
      const int64_t next = sample_to_fetch(n, last - first, end);
      run(t_.rows,
          [&](int64_t from, int64_t to) { input_gradient_.write(n, reach, from, to, next); });
    }
  }

 private:
  static int64_t row_blocks(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

  // A transposed convolution is a correlation with the taps in reverse order.
  void flip_weights() {
    const int64_t taps = shape_.taps();
    widen_taps<T>(p_, flipped_);
    for (int64_t m = 0; m < 2; ++m)
      for (A *a = flipped_ + m * taps, *b = a + taps - 1; a < b; ++a, --b) {
        const A first = *a;
        *a = *b;
        *b = first;
      }
  }

  // to[j] = sum over row blocks of partial[block][j]
  void merge_partials(const A* partial, A* to, const Run& run) const {
    run((t_.cols + kColumnTile - 1) / kColumnTile, [&](int64_t first, int64_t last) {
      const int64_t begin = first * kColumnTile;
      const int64_t end = last * kColumnTile < t_.cols ? last * kColumnTile : t_.cols;
      if (to != partial) std::memcpy(to + begin, partial + begin, (end - begin) * sizeof(A));
      for (int64_t b = 1; b < row_blocks(t_.rows); ++b)
        add_scaled(partial + b * t_.cols + begin, A(1), to + begin, end - begin);
    });
  }

  // sum_s p a into the channels' sums and sum_c p g into the pixels'.
  void sum_products(int64_t n, Workspace& ws, const Run& run) const {
    const A* row_factor = t_.channels_first ? t_.channel_gate(n) : t_.spatial_gate(n);
    const A* col_factor = t_.channels_first ? t_.spatial_gate(n) : t_.channel_gate(n);
    run(row_blocks(t_.rows), [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        const int64_t end = (b + 1) * kRowBlock < t_.rows ? (b + 1) * kRowBlock : t_.rows;
        const auto sum = [&](auto together) {
          cross_sums<decltype(together)::value>(t_.x(n), t_.dout(n), b * kRowBlock, end, row_factor,
                                                col_factor, ws.row_sum, ws.partial + b * t_.cols);
        };
        if (t_.channels_first)
          sum(Channels{});
        else
          sum(Pixels{});
      }
    });
    merge_partials(ws.partial, ws.col_sum, run);
  }

  // The same where they are part of what comes in.
  void begin_sums(Workspace& ws) const {
    std::memset(ws.row_sum, 0, t_.rows * sizeof(A));
    std::memset(ws.col_sum, 0, t_.cols * sizeof(A));
  }
  // Where they are what is asked for.
  void put_sums(int64_t n, const Workspace& ws) const {
    std::memcpy(static_cast<A*>(p_.gradients.channel_gate) + n * t_.channels,
                ws.channel_sum(t_.channels_first), t_.channels * sizeof(A));
    std::memcpy(static_cast<A*>(p_.gradients.spatial_gate) + n * t_.pixels,
                ws.pixel_sum(t_.channels_first), t_.pixels * sizeof(A));
  }

  // dz, into the first plane.
  void gradient_of_logits(int64_t n, Workspace& ws) const {
    A* dz = ws.pixel_sum(t_.channels_first);
    const A* gate = t_.spatial_gate(n);
    if (p_.d_spatial_gate)
      add_scaled(static_cast<const A*>(p_.d_spatial_gate) + n * t_.pixels, A(1), dz, t_.pixels);
    if (p_.part != Part::kLogits)
      for_vectors<A>(t_.pixels, [&](int64_t j, auto lanes) {
        lanes.store(dz + j, lanes.load(dz + j) * sigmoid_derivative<A>(lanes.load(gate + j)));
      });
    planes_.insert(dz, 0, t_.pixels, ws.planes);
  }

  void gradient_of_conv(int64_t n, Workspace& ws, const Run& run) const {
    A* maps = ws.planes + planes_.size();
    const T* saved = static_cast<const T*>(p_.saved.maps) + n * 2 * t_.pixels;
    for (int64_t m = 0; m < 2; ++m)
      for (int64_t begin = 0; begin < t_.pixels; begin += kColumnTile) {
        const int64_t count = t_.pixels - begin < kColumnTile ? t_.pixels - begin : kColumnTile;
        A widened[kColumnTile];
        for_vectors<A>(count, [&](int64_t j, auto lanes) {
          lanes.store(widened + j, lanes.load(saved + m * t_.pixels + begin + j));
        });
        planes_.insert(widened, begin, begin + count, maps + m * planes_.size());
      }
    const int64_t kernel_rows = shape_.kernel_depth * shape_.kernel_height;
    run(2 * kernel_rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t m = i / kernel_rows;
        weight_gradient(planes_, ws.planes, maps + m * planes_.size(), i % kernel_rows,
                        batch_.d_conv(n) + m * shape_.taps());
      }
    });
    batch_.d_conv(n)[2 * shape_.taps()] = sum_of_row(ws.pixel_sum(t_.channels_first), t_.pixels);
  }

  // dmean / C and dmax.
  void gradient_of_maps(const Workspace& ws, const MapGradients<A>& maps, const Run& run) const {
    run(planes_.image_rows(), [&](int64_t begin, int64_t end) {
      const int64_t width = shape_.width;
      for (int64_t row = begin; row < end; ++row) {
        A* mean = maps.d_mean + row * width;
        correlate_row(planes_, ws.planes, 1, flipped_, A(0), row, mean);
        correlate_row(planes_, ws.planes, 1, flipped_ + shape_.taps(), A(0), row,
                      maps.d_max + row * width);
        for (int64_t w = 0; w < width; ++w) mean[w] /= static_cast<A>(shape_.channels);
      }
    });
  }

  // dg: adds to the channels' sums what reaches the gate through the maps.
  void add_map_terms(int64_t n, Workspace& ws, const MapGradients<A>& maps, const Run& run) const {
    if (t_.channels_first) {
      run(t_.rows, [&](int64_t begin, int64_t end) {
        for_rows<2 * kRowsTogether>(begin, end, [&](auto together, int64_t c) {
          map_terms_of_rows<decltype(together)::value>(n, c, ws, maps);
        });
      });
    } else {
      run(row_blocks(t_.rows), [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) map_terms_of_block(n, b, ws, maps);
      });
      merge_partials(ws.partial, ws.partial, run);
      add_scaled(ws.partial, A(1), ws.col_sum, t_.cols);
    }
  }

  // Channels first: the map terms of kRows channels.
  template <int kRows>
  CBAM_INLINE_MEMBER void map_terms_of_rows(int64_t n, int64_t c, Workspace& ws,
                                            const MapGradients<A>& maps) const {
    A terms[kRows];
    weighted_sums<kRows>(
        t_.x(n), c,
        [&](int64_t s, auto lanes) {
          const vec_t<A> mean = lanes.load(maps.d_mean + s), max = lanes.load(maps.d_max + s);
          const ivec_t<A> maximum_of = lanes.indices(t_.channel_argmax(n) + s);
          return [=](int i) { return mean + where<A>(maximum_of == index_t<A>(c + i), max); };
        },
        terms);
    for (int i = 0; i < kRows; ++i) ws.row_sum[c + i] += terms[i];
  }

  // Channels last: the map terms of one block of pixels.
  void map_terms_of_block(int64_t n, int64_t block, const Workspace& ws,
                          const MapGradients<A>& maps) const {
    A* partial = ws.partial + block * t_.cols;
    const int64_t end = (block + 1) * kRowBlock < t_.rows ? (block + 1) * kRowBlock : t_.rows;
    for (int64_t c = 0; c < t_.cols; ++c) partial[c] = A(0);
    for (int64_t s = block * kRowBlock; s < end; ++s) {
      const T* row = t_.x(n).row(s);
      add_scaled(row, maps.d_mean[s], partial, t_.cols);
      const int32_t c = t_.channel_argmax(n)[s];
      partial[c] += maps.d_max[s] * load_one(row + c);
    }
  }

  // dl
  void gradient_of_gate(int64_t n, Workspace& ws) const {
    A* d_gate = ws.channel_sum(t_.channels_first);
    if (p_.d_channel_gate)
      add_scaled(static_cast<const A*>(p_.d_channel_gate) + n * shape_.channels, A(1), d_gate,
                 shape_.channels);
    A* d_logits = batch_.d_logits(n);
    const A* gate = t_.channel_gate(n);
    for (int64_t c = 0; c < shape_.channels; ++c)
      d_logits[c] = d_gate[c] * sigmoid_derivative<A>(gate[c]);
  }

  A* d_pooled(int64_t n) const { return d_pooled_ + n * 2 * shape_.channels; }

  const BackwardProblem& p_;
  const Shape& shape_;
  Mlp<T> mlp_;
  Planes<A> planes_;
  BackwardTensors<T> t_;
  InputGradient<T> input_gradient_;
  bool reaches_gate_;  // whether anything before the spatial gate was asked for
  const BatchGradients<T>& batch_;
  A* d_pooled_;  // [samples, 2, channels]: of the mean (over S) and of the maximum over space
  A* flipped_;   // [2, taps]
};

template <class T>
void run(const BackwardProblem& problem, const ThreadPool& pool) {
  using A = acc_t<T>;
  BatchGradients<T> batch(problem);
  A *d_pooled = nullptr, *flipped = nullptr;
  Scratch scratch;
  scratch.carve([&](Carver& carver) {
    batch.carve(carver);
    d_pooled = carver.array<A>(problem.shape.samples * 2 * problem.shape.channels);
    flipped = carver.array<A>(2 * problem.shape.taps());
  });
  run_samples(Backward<T>(problem, batch, d_pooled, flipped), problem, pool, 2 * sizeof(T));
  batch.finish(pool);
}

}  // namespace

namespace CBAM_CPU_TARGET {

void backward(const BackwardProblem& problem, const ThreadPool& pool) {
  switch (problem.dtype) {
    case DType::kFloat32: return run<float>(problem, pool);
    case DType::kFloat64: return run<double>(problem, pool);
    case DType::kFloat16: return run<Half>(problem, pool);
    case DType::kBFloat16: return run<BFloat16>(problem, pool);
  }
}

}  // namespace CBAM_CPU_TARGET
}  // namespace cbam::cpu
