// From a problem and the limits of a device to everything that the launches need to know. A pure
// function: no CUDA calls, and the same answer for GPUs that are not here.
#pragma once

#include <optional>
#include <string>

#include "../problem.h"
#include "kernels/backward.h"
#include "kernels/resident.h"
#include "limits.h"

namespace cbam::cuda {

// Samples that take all launches before the next ones start, so that what one pass read is still
// in the L2 cache for the next.
struct Group {
  int64_t samples;
  bool in_cache;  // x of one group stays in the L2 cache
};

enum class Strategy { kAuto, kStreaming, kResident };

// By its name: "auto", "streaming" or "resident"; else throws std::invalid_argument.
Strategy strategy_of(const std::string& name);
// The one that the environment asks for, in CBAM_CUDA_STRATEGY.
Strategy strategy_asked_for();

// Streaming: x is read three times, out written once, in five launches for each group of samples.
// Resident, where `resident` is set: x is read once, in one launch; what follows it is not used.
struct ForwardPlan {
  std::optional<ResidentGeometry> resident;
  const char* reason;  // for this strategy
  double seconds;      // predicted
  Group group;
  ReductionGeometry pool;  // over space
  int hidden_threads;
  ReductionGeometry maps;  // over channels
  ScaleGeometry scale;
  int64_t shared_limit;  // of a block of the device
};

// Throws std::invalid_argument where no plan exists: a convolution so large that no box of pixels
// fits into shared memory with its halo, or a resident strategy where no sample fits on the chip.
ForwardPlan plan(const ForwardProblem& problem, const DeviceLimits& device,
                 Strategy strategy = Strategy::kAuto);

// The launches for a group of `samples`, in their order.
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

// Backward: x and dout are read twice each, dx written once, in six launches for each group, and up
// to six small ones that sum over the batch; those whose results nobody asked for are left out. The
// plan of an empty batch has no groups.
struct BackwardPlan {
  Group group;
  TileGeometry cross;  // both sums of dout * x
  BoxGeometry stencil;
  TileGeometry terms;    // what reaches the channel gate through the maps
  TileGeometry input;    // dx
  int64_t shared_limit;  // of a block of the device
};
BackwardPlan plan(const BackwardProblem& problem, const DeviceLimits& device);

struct BackwardGrids {
  Grid cross, stencil, terms, gate, hidden, input;
};
BackwardGrids grids(const BackwardPlan& plan, const BackwardProblem& problem, int64_t samples);

// The sums over the batch that make the gradients of the weights.
struct WeightGrids {
  Grid fc1, fc2, fc1_bias, fc2_bias, conv, conv_bias;
};
WeightGrids weight_grids(const BackwardProblem& problem);

// Bytes of scratch memory, each part a multiple of 16: for a group, and from dm on for all samples.
struct BackwardScratch {
  int64_t cross_rows, cross_cols, d_maps, terms, d_pooled;
  int64_t dm, d_hidden, d_conv;

  int64_t total() const {
    return cross_rows + cross_cols + d_maps + terms + d_pooled + dm + d_hidden + d_conv;
  }
};
BackwardScratch scratch(const BackwardPlan& plan, const BackwardProblem& problem);

}  // namespace cbam::cuda
