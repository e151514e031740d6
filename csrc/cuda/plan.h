// From a problem and the limits of a device to everything that the launches need to know. A pure
// function: no CUDA calls, and the same answer for GPUs that are not here.
#pragma once

#include <optional>

#include "../problem.h"
#include "kernels/resident_backward.h"
#include "kernels/resident_forward.h"
#include "limits.h"
#include "strategy.h"

namespace cbam::cuda {

// Samples that take all launches before the next ones start, so that what one pass read is still
// in the L2 cache for the next.
struct Group {
  int64_t samples;
  bool in_cache;  // x of one group stays in the L2 cache
};

// Streaming: x is read three times, out written once, in five launches for each group of samples,
// or four where one takes both layers of the MLP. Resident, where `resident` is set: x is read
// once, in one launch; the geometries of the passes are not used. A part of the forward is
// streamed, and leaves out the launches of the other.
struct ForwardPlan {
  std::optional<ResidentForwardGeometry> resident;
  const char* reason;  // for this strategy
  double seconds;      // predicted
  Group group;
  ReductionGeometry pool;  // over space
  MlpGeometry mlp;
  ReductionGeometry maps;  // over channels
  ScaleGeometry scale;
  int64_t shared_limit;  // of a block of the device
  bool overlaps;         // launches, with the one before each: where the device can
};

// Throws std::invalid_argument where no plan exists: a convolution so large that no box of pixels
// fits into shared memory with its halo, or a resident strategy where no sample fits on the chip.
ForwardPlan plan(const ForwardProblem& problem, const DeviceLimits& device,
                 const Strategy& strategy = {});

// Bytes of shared memory of a block that holds samples, and where its arrays stand.
int64_t resident_shared_bytes(const ForwardProblem& problem, const ResidentForwardGeometry& g,
                              SharedLayout& layout);
int64_t resident_shared_bytes(const BackwardProblem& problem, const ResidentBackwardGeometry& g,
                              SharedLayout& layout);

// The launches for a group of `samples`, in their order. Where one takes both layers of the MLP, it
// is that of the first of them, and the other has no blocks.
struct ForwardGrids {
  Grid pool, hidden, gate, maps, scale;
};
Grid resident_grid(const ForwardPlan& plan, const ForwardProblem& problem);
ForwardGrids grids(const ForwardPlan& plan, const ForwardProblem& problem, int64_t samples);

// Bytes of scratch memory of a group, each part a multiple of 16. A part is 0 where its result goes
// straight to where it is kept.
struct ForwardScratch {
  int64_t pool_values, pool_argmax, map_values, map_argmax;
  int64_t exchange;  // of a resident plan

  int64_t total() const { return pool_values + pool_argmax + map_values + map_argmax + exchange; }
};
ForwardScratch scratch(const ForwardPlan& plan, const ForwardProblem& problem);

// Backward, streaming: x and dout are read twice each, dx written once, in six launches for each
// group, or five as in a forward; those whose results nobody asked for are left out. Resident,
// where `resident` is set: dout is read once, x once or twice, in one launch; the geometries of the
// passes are not used. Up to two small launches follow that sum over the batch. Of the parts one
// has the first of the launches, and one more that adds up what it left, the other the rest. The
// plan of an empty batch has no groups.
struct BackwardPlan {
  std::optional<ResidentBackwardGeometry> resident;
  const char* reason;  // for this strategy
  double seconds;      // predicted, without the sums over the batch
  Group group;
  TileGeometry cross;  // both sums of dout * x
  BoxGeometry stencil;
  TileGeometry terms;  // what reaches the channel gate through the maps
  MlpBackwardGeometry mlp;
  TileGeometry input;    // dx
  int64_t shared_limit;  // of a block of the device
  bool overlaps;         // launches, with the one before each: where the device can

  // How many shares of the convolution's gradients a sample has; they are summed over the batch.
  int64_t conv_shares() const { return resident ? resident->conv_shares() : stencil.boxes(); }
};
BackwardPlan plan(const BackwardProblem& problem, const DeviceLimits& device,
                  const Strategy& strategy = {});

// plan_known.cpp: the same, kept from one call to the next.
ForwardPlan known_plan(const ForwardProblem& problem, const DeviceLimits& device,
                       const Strategy& strategy);
BackwardPlan known_plan(const BackwardProblem& problem, const DeviceLimits& device,
                        const Strategy& strategy);

// The plan of the strategy that the environment asks for; why_not_run(plan) tells why the teams of
// a resident one do not run on the device, as far as this process may use it, or null where they
// do.
template <class Problem, class WhyNotRun>
auto plan_that_runs(const Problem& p, const DeviceLimits& device, WhyNotRun why_not_run) {
  const Strategy strategy = strategy_asked_for();
  const auto found = known_plan(p, device, strategy);
  const char* reason = found.resident ? why_not_run(found) : nullptr;
  if (!reason) return found;
  if (strategy.kind != Strategy::kAuto) throw not_possible(reason);
  return known_plan(p, device, {Strategy::kStreaming});
}

// Whether one launch goes through both layers of the MLP: nobody needs the first without dx.
inline bool takes_both_layers(const BackwardPlan& plan, const BackwardProblem& p) {
  return plan.mlp.together && p.gradients.x;
}

// As in a forward; here the second layer comes first.
struct BackwardGrids {
  Grid cross, totals, stencil, terms, gate, hidden, input;
};
Grid resident_grid(const BackwardPlan& plan, const BackwardProblem& problem);
BackwardGrids grids(const BackwardPlan& plan, const BackwardProblem& problem, int64_t samples);

// The sums over the batch that make the gradients of the weights.
struct WeightGrids {
  Grid products, sums;  // without blocks where nobody asked for any
  int tile;             // rows, and columns, of a block's products

  int launches() const { return (products.blocks > 0) + (sums.blocks > 0); }
};
WeightGrids weight_grids(const BackwardPlan& plan, const BackwardProblem& problem);

// Bytes of scratch memory, each part a multiple of 16: for a group, of a resident plan, and from dm
// on for all samples. A part that nobody needs is 0.
struct BackwardScratch {
  int64_t cross_rows, cross_cols, d_maps, terms, d_pooled;
  int64_t exchange;
  int64_t dm, d_hidden, d_conv;

  int64_t total() const {
    return cross_rows + cross_cols + d_maps + terms + d_pooled + exchange + dm + d_hidden + d_conv;
  }
};
BackwardScratch scratch(const BackwardPlan& plan, const BackwardProblem& problem);

}  // namespace cbam::cuda
