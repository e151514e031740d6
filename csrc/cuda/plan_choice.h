// The choice between the strategies, made so that neighbouring shapes get the same one.
//
// What a resident plan takes goes up and down as a shape grows: teams of whole blocks fill the
// device more or less well. So where neither strategy is clearly faster, the choice is that of a
// typical shape, which many neighbours share. Along a walk through shapes it changes only where
// samples start or stop to fit on the chip, where one strategy starts or stops to be clearly
// faster, or where the typical shape changes; and never to what is clearly slower.
#pragma once

#include "plan_parts.h"

namespace cbam::cuda {

// A strategy that is predicted to take so many times as long as the other is clearly slower: what
// barriers, products and walks take is estimated, and may be wrong by as much.
constexpr double kClearly = 1.15;

// The power of two next to a batch. Ways to hold samples are chosen for it, so that neighbouring
// batches get the same one wherever their last rounds end.
int64_t typical_batch(int64_t samples);
// The same in all sizes: of channels and hidden units, powers of two; of space, 7, 14, 28 and so
// on, as in networks for images of 224 pixels.
ForwardProblem typical(ForwardProblem p);
BackwardProblem typical(BackwardProblem p);

// Why x is streamed, though `held` would hold its samples; null where it is not. `streaming` says
// what streaming takes.
template <class Geometry, class Problem, class Streaming>
const char* why_streamed(const ResidentPlan<Geometry>& held, const Problem& p,
                         const DeviceLimits& device, Streaming streaming) {
  const double seconds = streaming(p, device);
  if (held.seconds * kClearly < seconds) return nullptr;
  if (held.seconds > seconds * kClearly) return "a resident plan is predicted to be slower";
  const Problem near = typical(p);
  const auto held_near = plan_resident(near, device);
  if (held_near.geometry && held_near.seconds < streaming(near, device)) return nullptr;
  return "a resident plan is predicted to take about as long, and not less in shapes nearby";
}

// The resident plan, where it is asked for or chosen. Else a plan that holds but the reason.
template <class Plan, class Problem, class Streaming>
Plan held_plan(const Problem& p, const DeviceLimits& device, const Strategy& strategy,
               Streaming streaming) {
  Plan plan{};
  plan.reason = "a part of a direction is streamed";
  if (p.part != Part::kAll) return plan;
  plan.reason = "asked for";
  if (strategy.kind == Strategy::kStreaming) return plan;
  const bool forced = strategy.kind != Strategy::kAuto;
  Problem of_batch = p;
  of_batch.shape.samples = typical_batch(p.shape.samples);
  const auto held = plan_resident(of_batch, device, strategy.way);
  if (forced && !held.geometry) throw not_possible(held.reason);
  if (!forced) plan.reason = held.reason;
  if (!held.geometry) return plan;
  if (!forced)
    if (const char* reason = why_streamed(held, of_batch, device, streaming)) {
      plan.reason = reason;
      return plan;
    }
  const auto resident = for_batch(held, p, device);
  plan.resident = resident.geometry;
  plan.seconds = resident.seconds;
  plan.group = {p.shape.samples, false};
  plan.shared_limit = device.shared_per_block;
  return plan;
}

}  // namespace cbam::cuda
