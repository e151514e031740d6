#include <algorithm>
#include <stdexcept>

#include "forward.h"
#include "samples.h"

namespace cbam::cuda {
namespace {

// One group of samples: what its launches are handed.
class ForwardGroup {
 public:
  ForwardGroup(const ForwardProblem& problem, const ForwardPlan& plan, const ForwardScratch& bytes,
               void* scratch)
      : p_(problem), plan_(plan) {
    ScratchParts parts(scratch);
    void* pool_values = parts.take(bytes.pool_values);
    auto* pool_argmax = static_cast<int32_t*>(parts.take(bytes.pool_argmax));
    void* map_values = parts.take(bytes.map_values);
    auto* map_argmax = static_cast<int32_t*>(parts.take(bytes.map_argmax));
    pooled_ = {pool_values ? pool_values : p_.saved.pooled,
               pool_argmax ? pool_argmax : p_.saved.pixel_argmax, plan.pool.splits};
    maps_ = {map_values, map_argmax ? map_argmax : p_.saved.channel_argmax, plan.maps.splits};
  }

  Reduction pool() const { return {matrix_of(p_, p_.x, p_.strides), nullptr, plan_.pool, pooled_}; }
  Reduction maps() const {
    return {matrix_of(p_, p_.x, p_.strides), p_.saved.channel_gate, plan_.maps, maps_};
  }

  ChannelGate channel_gate() const {
    const bool saves = pooled_.splits > 1 && p_.training();
    return {static_cast<int>(p_.shape.samples),
            static_cast<int>(p_.shape.channels),
            static_cast<int>(p_.shape.hidden),
            plan_.mlp,
            p_.weights.dtype,
            p_.weights.fc1_weight,
            p_.weights.fc1_bias,
            p_.weights.fc2_weight,
            p_.weights.fc2_bias,
            pooled_,
            saves ? p_.saved.pooled : nullptr,
            saves ? p_.saved.pixel_argmax : nullptr,
            p_.saved.hidden,
            p_.saved.channel_gate};
  }

  SpatialGate spatial_gate() const {
    const Shape& s = p_.shape;
    SpatialGate g{};
    g.x = matrix_of(p_, p_.x, p_.strides);
    g.out = p_.out;
    g.channels_first = p_.strides.channels_first();
    g.out_sample_stride = p_.out_strides.sample;
    g.out_row_stride = g.channels_first ? p_.out_strides.channel : p_.out_strides.pixel;
    g.ending = ending_of(p_);
    g.channels = static_cast<int>(s.channels);
    g.space = space_of(s);
    g.geometry = plan_.scale;
    g.maps = maps_;
    g.channel_gate = p_.saved.channel_gate;
    g.weight_dtype = p_.weights.dtype;
    g.conv_weight = p_.weights.conv_weight;
    g.conv_bias = p_.weights.conv_bias;
    g.logits = p_.logits;
    g.saved_gate = p_.saved.spatial_gate;
    g.saved_maps = p_.saved.maps;
    g.saved_argmax = maps_.splits > 1 ? p_.saved.channel_argmax : nullptr;
    return g;
  }

 private:
  const ForwardProblem& p_;
  const ForwardPlan& plan_;
  Parts pooled_, maps_;
};

void reduce(DType dtype, const Reduction& r, const Grid& grid, Stream stream) {
  const ReductionGeometry& g = r.geometry;
  const auto reduction = !g.along_rows                 ? reduce_columns
                         : g.access == Access::kPacked ? reduce_packed_rows
                                                       : reduce_rows;
  reduction(dtype, r, grid, stream);
}

void run_streaming(const ForwardProblem& problem, const ForwardPlan& plan, void* memory,
                   Stream stream) {
  const ForwardScratch bytes = scratch(plan, problem);
  for (int64_t first = 0; first < problem.shape.samples; first += plan.group.samples) {
    const int64_t count = std::min(plan.group.samples, problem.shape.samples - first);
    ForwardProblem part = problem;
    select_samples(part, first, count);
    const ForwardGroup group(part, plan, bytes, memory);
    const ForwardGrids grid = grids(plan, part, count);
    if (part.part == Part::kScale) {
      scale(part.dtype, group.spatial_gate(), grid.scale, stream);
      continue;
    }
    reduce(part.dtype, group.pool(), grid.pool, stream);
    if (plan.mlp.together) {
      both_layers(group.channel_gate(), grid.hidden, stream);
    } else {
      hidden_layer(group.channel_gate(), grid.hidden, stream);
      gate_layer(group.channel_gate(), grid.gate, stream);
    }
    reduce(part.dtype, group.maps(), grid.maps, stream);
    const auto last = part.part == Part::kLogits ? spatial_logits : spatial_gate;
    last(part.dtype, group.spatial_gate(), grid.scale, stream);
  }
}

void run_resident(const ForwardProblem& p, const ForwardPlan& plan, void* memory, Stream stream) {
  const bool first = p.strides.channels_first();
  ResidentForward r{};
  set_resident(r, p, memory);
  r.out = p.out;
  r.out_sample_stride = p.out_strides.sample;
  r.out_row_stride = first ? p.out_strides.channel : p.out_strides.pixel;
  r.ending = ending_of(p);
  if (!p.training()) r.saved = {};
  r.geometry = *plan.resident;
  resident_shared_bytes(p, r.geometry, r.layout);
  const auto forward = r.geometry.split == Split::kPixels ? resident_forward<Split::kPixels>
                                                          : resident_forward<Split::kChannels>;
  forward(p.dtype, first, r, resident_grid(plan, p), stream);
}

}  // namespace

ForwardPlan plan_to_run(const ForwardProblem& p, const DeviceLimits& device) {
  return plan_that_runs(p, device, [&](const ForwardPlan& found) {
    const auto why_not = found.resident->split == Split::kPixels
                             ? why_no_resident_forward<Split::kPixels>
                             : why_no_resident_forward<Split::kChannels>;
    return why_not(p.dtype, p.strides.channels_first(), p.training(), resident_grid(found, p));
  });
}

void run(const ForwardProblem& problem, const ForwardPlan& plan, void* memory, Stream stream) {
  if (plan.resident)
    run_resident(problem, plan, memory, stream);
  else
    run_streaming(problem, plan, memory, stream);
}

}  // namespace cbam::cuda
