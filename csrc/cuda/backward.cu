#include <algorithm>
#include <stdexcept>
#include <string>

#include "backward.h"
#include "samples.h"

namespace cbam::cuda {
namespace {

// One group of samples: what its launches are handed.
class BackwardGroup {
 public:
  BackwardGroup(const BackwardProblem& problem, const BackwardPlan& plan,
                const BackwardScratch& bytes, void* scratch)
      : p_(problem), plan_(plan), first_(problem.strides.channels_first()) {
    ScratchParts parts(scratch);
    const Sums rows{parts.take(bytes.cross_rows), plan.cross.tiles};
    const Sums cols{parts.take(bytes.cross_cols), plan.cross.splits};
    d_spatial_ = first_ ? cols : rows;
    d_channel_ = first_ ? rows : cols;
    if (p_.part == Part::kLogits) {  // all of both is given
      d_spatial_ = given(p_.d_spatial_gate);
      d_channel_ = given(p_.d_channel_gate);
    } else {
      more_spatial_ = p_.d_spatial_gate;
      more_channel_ = p_.d_channel_gate;
    }
    d_maps_ = parts.take(bytes.d_maps);
    terms_ = {parts.take(bytes.terms), first_ ? plan.terms.tiles : plan.terms.splits};
    d_pooled_ = parts.take(bytes.d_pooled);
  }

  CrossSums cross_sums() const {
    const Saved& s = p_.saved;
    return {x(),
            matrix_of(p_, p_.dout, p_.dout_strides),
            first_ ? s.channel_gate : s.spatial_gate,
            first_ ? s.spatial_gate : s.channel_gate,
            plan_.cross,
            first_ ? d_channel_ : d_spatial_,
            first_ ? d_spatial_ : d_channel_};
  }

  TotalSums total_sums() const {
    const int channels = static_cast<int>(p_.shape.channels),
              pixels = static_cast<int>(p_.shape.pixels());
    const Gradients& g = p_.gradients;
    return {p_.shape.samples, channels,       pixels,        d_channel_,
            d_spatial_,       g.channel_gate, g.spatial_gate};
  }

  Stencil stencil(void* d_conv) const {
    const Shape& s = p_.shape;
    Stencil g{};
    g.channels = static_cast<int>(s.channels);
    g.space = space_of(s);
    g.geometry = plan_.stencil;
    g.d_spatial = d_spatial_;
    g.d_spatial_gate = more_spatial_;
    g.spatial_gate = p_.part == Part::kLogits ? nullptr : p_.saved.spatial_gate;
    g.maps = p_.saved.maps;
    g.weight_dtype = p_.weights.dtype;
    g.conv_weight = p_.weights.conv_weight;
    g.d_maps = d_maps_;
    g.d_conv = d_conv;
    return g;
  }

  MapTerms map_terms() const {
    return {x(), first_, d_maps_, p_.saved.channel_argmax, plan_.terms, terms_};
  }

  ChannelGateBackward channel_gate(void* dm, void* d_hidden) const {
    const Shape& s = p_.shape;
    return {static_cast<int>(s.samples),
            static_cast<int>(s.channels),
            static_cast<int>(s.hidden),
            s.pixels(),
            plan_.mlp,
            p_.weights.dtype,
            p_.weights.fc1_weight,
            p_.weights.fc2_weight,
            d_channel_,
            terms_,
            more_channel_,
            p_.saved.channel_gate,
            p_.saved.hidden,
            dm,
            d_hidden,
            d_pooled_};
  }

  InputGradient input_gradient() const {
    const Saved& s = p_.saved;
    return {matrix_of(p_, p_.dout, p_.dout_strides),
            p_.gradients.x,
            p_.dx_strides.sample,
            first_ ? p_.dx_strides.channel : p_.dx_strides.pixel,
            first_,
            s.spatial_gate,
            d_maps_,
            s.channel_argmax,
            s.channel_gate,
            d_pooled_,
            s.pixel_argmax,
            plan_.input};
  }

 private:
  Matrix x() const { return matrix_of(p_, p_.x, p_.strides); }
  // A sum in one part, or in none; kernels only read it.
  static Sums given(const void* sum) { return {const_cast<void*>(sum), sum ? 1 : 0}; }

  const BackwardProblem& p_;
  const BackwardPlan& plan_;
  bool first_;
  const void* more_spatial_ = nullptr;
  const void* more_channel_ = nullptr;
  Sums d_spatial_, d_channel_, terms_;
  void* d_maps_;
  void* d_pooled_;
};

// What the launches leave for the gradients of the weights, for all samples.
struct WeightSums {
  void* dm;        // acc [samples, channels]
  void* d_hidden;  // acc [samples, 2, hidden]
  void* d_conv;    // acc [samples * conv_shares, 2 * taps + 1], the bias last
};

// What a sum over the batch is handed; of length 0 where nobody asked for it.
OuterSum outer_sum(Vectors a, Vectors b, void* out) {
  if (!out) a.length = b.length = 0;
  return {a, b, out};
}
VectorSum vector_sum(Vectors a, double scale, void* out, const ConvWeight& of = {}) {
  if (!out) a.length = 0;
  if (out && a.count > kMostSummed)
    throw std::runtime_error("cbam_cuda: sums over the batch: expected at most " +
                             std::to_string(kMostSummed) + " values to add, got " +
                             std::to_string(a.count));
  return {a, scale, out, of};
}

// The batch's sums, once every group has been. Of an empty batch they are 0.
void weight_gradients(const BackwardProblem& p, const BackwardPlan& plan, const WeightSums& sums,
                      Stream stream) {
  const Shape& s = p.shape;
  const Gradients& g = p.gradients;
  const WeightGrids grid = weight_grids(plan, p);
  const int64_t n = s.samples;
  const int channels = static_cast<int>(s.channels), hidden = static_cast<int>(s.hidden),
            taps = static_cast<int>(2 * s.taps());
  const Vectors dm{sums.dm, channels, n, 1, channels};
  const Vectors d_hidden{sums.d_hidden, hidden, 2 * n, 1, hidden};
  const Vectors both_hidden{p.saved.hidden, int64_t{2} * hidden, n, 2, hidden};
  const Vectors pooled{p.saved.pooled, channels, 2 * n, 1, channels};
  const void* bias = further(sums.d_conv, taps, bytes_of_accumulator(p.dtype));
  const int64_t shares = n * plan.conv_shares();
  const Vectors conv{sums.d_conv, taps + 1, shares, 1, taps};
  const Vectors conv_bias{bias, taps + 1, shares, 1, 1};
  if (grid.products.blocks)
    outer_sums(p.weights.dtype,
               {grid.tile, outer_sum(d_hidden, pooled, g.fc1_weight),
                outer_sum(dm, both_hidden, g.fc2_weight)},
               grid.products, stream);
  if (grid.sums.blocks)
    vector_sums(p.weights.dtype,
                {{vector_sum(d_hidden, 1.0, g.fc1_bias),
                  vector_sum(dm, 2.0, g.fc2_bias),  // once for each of the two pooled vectors
                  vector_sum(conv, 1.0, g.conv_weight, p.weights.conv_weight),
                  vector_sum(conv_bias, 1.0, g.conv_bias)}},
                grid.sums, stream);
}

void run_resident(const BackwardProblem& p, const BackwardPlan& plan, void* exchange,
                  const WeightSums& sums, Stream stream) {
  const bool first = p.strides.channels_first();
  ResidentBackward r{};
  set_resident(r, p, exchange);
  r.dout = matrix_of(p, p.dout, p.dout_strides);
  r.dx = p.gradients.x;
  r.dx_sample_stride = p.dx_strides.sample;
  r.dx_row_stride = first ? p.dx_strides.channel : p.dx_strides.pixel;
  r.d_channel_gate = p.d_channel_gate;
  r.d_spatial_gate = p.d_spatial_gate;
  r.dm = sums.dm;
  r.d_hidden = sums.d_hidden;
  r.d_conv = sums.d_conv;
  r.geometry = *plan.resident;
  resident_shared_bytes(p, r.geometry, r.layout);
  const auto backward = r.geometry.split == Split::kPixels ? resident_backward<Split::kPixels>
                                                           : resident_backward<Split::kChannels>;
  backward(p.dtype, first, r, resident_grid(plan, p), stream);
}

void run_streaming(const BackwardProblem& problem, const BackwardPlan& plan,
                   const BackwardScratch& bytes, void* memory, const WeightSums& sums,
                   Stream stream) {
  const Shape& s = problem.shape;
  const int64_t acc = bytes_of_accumulator(problem.dtype), boxes = plan.stencil.boxes();
  const bool channel = problem.gradients.x || problem.gradients.mlp();
  for (int64_t first = 0; first < s.samples; first += plan.group.samples) {
    const int64_t count = std::min(plan.group.samples, s.samples - first);
    BackwardProblem part = problem;
    select_samples(part, first, count);
    const BackwardGroup group(part, plan, bytes, memory);
    const BackwardGrids grid = grids(plan, part, count);
    if (part.part != Part::kLogits) cross_sums(part.dtype, group.cross_sums(), grid.cross, stream);
    if (part.part == Part::kScale) {
      total_sums(part.dtype, group.total_sums(), grid.totals, stream);
      continue;
    }
    stencil(part.dtype,
            group.stencil(further(sums.d_conv, first * boxes * (2 * s.taps() + 1), acc)),
            grid.stencil, stream);
    if (!channel) continue;
    map_terms(part.dtype, group.map_terms(), grid.terms, stream);
    const ChannelGateBackward gate =
        group.channel_gate(further(sums.dm, first * s.channels, acc),
                           further(sums.d_hidden, first * 2 * s.hidden, acc));
    if (takes_both_layers(plan, part))
      both_layers_backward(gate, grid.gate, stream);
    else
      gate_layer_backward(gate, grid.gate, stream);
    if (!part.gradients.x) continue;
    if (!plan.mlp.together) hidden_layer_backward(gate, grid.hidden, stream);
    input_gradient(part.dtype, group.input_gradient(), grid.input, stream);
  }
}

}  // namespace

BackwardPlan plan_to_run(const BackwardProblem& p, const DeviceLimits& device) {
  return plan_that_runs(p, device, [&](const BackwardPlan& found) {
    const auto why_not = found.resident->split == Split::kPixels
                             ? why_no_resident_backward<Split::kPixels>
                             : why_no_resident_backward<Split::kChannels>;
    return why_not(p.dtype, p.strides.channels_first(), *found.resident, resident_grid(found, p));
  });
}

void run(const BackwardProblem& problem, const BackwardPlan& plan, void* memory, Stream stream) {
  const BackwardScratch bytes = scratch(plan, problem);
  ScratchParts parts(memory);
  parts.take(bytes.total() - bytes.exchange - bytes.dm - bytes.d_hidden - bytes.d_conv);
  void* exchange = parts.take(bytes.exchange);
  WeightSums sums{};
  sums.dm = parts.take(bytes.dm);
  sums.d_hidden = parts.take(bytes.d_hidden);
  sums.d_conv = parts.take(bytes.d_conv);
  if (plan.resident)
    run_resident(problem, plan, exchange, sums, stream);
  else
    run_streaming(problem, plan, bytes, memory, sums, stream);
  weight_gradients(problem, plan, sums, stream);
}

}  // namespace cbam::cuda
