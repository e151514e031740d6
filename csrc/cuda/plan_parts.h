// What the planner's files share: how the kernels see a tensor, how its columns can be read, and
// how many blocks fill a device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <stdexcept>

#include "plan.h"

namespace cbam::cuda {

// The cache is no more than this many times as fast as memory (5.5 against 3.0 TB/s on an H100).
constexpr double kCacheSpeed = 1.8;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int elements_per_vector(DType dtype) {
  return static_cast<int>(kVectorBytes / bytes_of(dtype));
}

// One tensor of x's size: channels x pixels where x's channels come first, else pixels x channels.
struct View {
  int64_t rows, cols, row_stride;
  bool channels_first;
  bool vectors;  // every sample starts on a multiple of 16 bytes; never in float64

  View(const ForwardProblem& p, const Strides& strides, const void* data);
};

struct ColumnAccess {
  Access access = Access::kScalar;
  int period, row_group = 1;

  ColumnAccess(const View& view, int vector);
  // The same, but no packed vectors that touch more than two rows.
  ColumnAccess of_two_rows(int vector) const;
  // Of one load.
  int elements(int vector) const { return access == Access::kScalar ? 1 : vector; }
};

// How small the pieces of a launch may get where there are few blocks. Every piece has a price:
// parts are written and merged, and each block reads the gates or maps of its piece again.
struct Pieces {
  int64_t shortest_part;  // rows of a part of a reduction down columns
  int rows_per_factor;    // rows of a block that share one reading of the factor
  int64_t channels;       // of a block in the last pass
  double map_share;       // bytes of maps that the last pass reads, beside x's
};

// Bounds that keep what is no pass over x small; where x itself is so small that a pass over it
// takes no longer than a launch, filling the device comes first.
const Pieces& pieces_of(const ForwardProblem& p, int64_t samples);

// Blocks of kThreads that fill a quarter of the device's threads: with four loads of 16 bytes in
// flight for each, 32 KB a multiprocessor of an H100, where 23 KB saturate its memory.
int64_t wanted_blocks(const DeviceLimits& device);

// How full the waves are in which a device runs so many blocks, `at_once` of them at a time.
inline double fullness(int64_t blocks, int64_t at_once) {
  return static_cast<double>(blocks) / static_cast<double>(ceil_div(blocks, at_once) * at_once);
}
// Waves of blocks that are so full are not filled further: each block begins with what others do as
// well. On an H200 a pass of 512 blocks, 396 of them at a time, took 69 us, and one of 1536 79.
constexpr double kFullWaves = 0.6;

// Into how many pieces each of `blocks` is to be cut, so that they run in full waves: the fewest
// where several do, those that come the closest where none does.
inline int64_t even_pieces(int64_t blocks, int64_t at_once, int64_t fewest, int64_t most) {
  int64_t best = fewest;
  for (int64_t pieces = fewest + 1; pieces <= most; ++pieces) {
    if (fullness(blocks * best, at_once) >= kFullWaves) break;
    if (fullness(blocks * pieces, at_once) > fullness(blocks * best, at_once)) best = pieces;
  }
  return best;
}

// What a kernel's arrays take of shared memory.
template <class Shared, class... Arguments>
int64_t shared_bytes(const Arguments&... arguments) {
  SharedCarver carver(nullptr);
  Shared(carver, arguments...);
  return static_cast<int64_t>(carver.bytes());
}

// Threads side by side over `vectors` vectors of a row: at least a warp's worth where there are so
// many, so that a warp reads in one piece, and as many as leave the fewest idle.
int threads_along(int64_t vectors, int threads = kThreads);

// plan_boxes.cpp: what decides about the boxes of an image.
struct BoxSearch {
  const ForwardProblem& problem;
  const DeviceLimits& device;
  int64_t blocks_per_box;  // of a whole launch, at most
  std::function<int64_t(const BoxGeometry&)> shared_bytes;

  // The boxes that stage the least and fill the device, in which x can be read so; without asking
  // for more shared memory than a launch has anyway where that is possible. None where none fits.
  std::optional<BoxGeometry> find(Access access) const;
  // What is thrown where none fits at all.
  std::invalid_argument no_box() const;
};

// Values of the maps that all boxes of a sample stage.
int64_t staged_values(const BoxGeometry& g, const Shape& s);

// What streaming takes: seconds of a group's launches together and of each; the part of the
// memory's bandwidth that passes reach; a product of the MLP, by a multiprocessor.
struct StreamedCosts {
  double group, launch, bandwidth, product;
};

// How samples are grouped where `tensors` tensors of x's size are read, `rereads` of the readings
// could come from the cache, and a group takes `launches` launches.
Group group_samples(const StreamedCosts& costs, const ForwardProblem& p, const DeviceLimits& device,
                    int tensors, int rereads, int launches);

// The most samples whose launches, of at most so many blocks a sample, a grid can count.
int64_t most_samples(int64_t blocks_per_sample);

// Sets splits and span (of ReductionGeometry and TileGeometry) so that there are enough blocks,
// parts are no shorter than `shortest`, no longer than `longest`, and start on multiples of
// `multiple`. Nearly enough blocks are not cut in two: every part costs bytes.
template <class Geometry>
void split(Geometry& g, int64_t count, int64_t blocks, int64_t wanted, int64_t shortest,
           int64_t longest, int64_t multiple) {
  const int64_t most = std::max<int64_t>(1, count / shortest);
  const int64_t splits = std::max(std::clamp<int64_t>((wanted + blocks / 2) / blocks, 1, most),
                                  ceil_div(count, longest));
  g.span = static_cast<int>(ceil_div(ceil_div(count, splits), multiple) * multiple);
  g.splits = static_cast<int>(ceil_div(count, g.span));
}

inline int64_t padded(int64_t bytes) { return ceil_div(bytes, 16) * 16; }

// The geometry that is estimated to be the fastest, and the seconds; none, and why, where no sample
// fits.
template <class Geometry>
struct ResidentPlan {
  std::optional<Geometry> geometry;
  double seconds = 0;
  const char* reason = "";
};

// plan_resident_forward.cpp, plan_resident_backward.cpp; held as `only` says.
ResidentPlan<ResidentForwardGeometry> plan_resident(const ForwardProblem& p,
                                                    const DeviceLimits& device,
                                                    const Way& only = {});
ResidentPlan<ResidentBackwardGeometry> plan_resident(const BackwardProblem& p,
                                                     const DeviceLimits& device,
                                                     const Way& only = {});
// The same way to hold a sample, for a batch of another size.
ResidentPlan<ResidentForwardGeometry> for_batch(const ResidentPlan<ResidentForwardGeometry>& plan,
                                                const ForwardProblem& p,
                                                const DeviceLimits& device);
ResidentPlan<ResidentBackwardGeometry> for_batch(const ResidentPlan<ResidentBackwardGeometry>& plan,
                                                 const BackwardProblem& p,
                                                 const DeviceLimits& device);

// plan_exchange.cpp: bytes that the blocks of a team that is no cluster write for each other, and
// read, of so many samples: what belongs to pixels and to channels, but not the hidden layer's
// sums.
struct Exchanged {
  int64_t written, read;
};
// For those sums: so many of a unit and a sample, and so many results of them where blocks share
// units. All samples of a visit are written; the sums of `samples` are read.
Exchanged exchanged_units(const ResidentGeometry& g, const Shape& s, int sums, int results,
                          int64_t visits, int64_t samples);
Exchanged exchanged_maps(const ResidentForwardGeometry& g, const ForwardProblem& p,
                         int64_t samples);
Exchanged exchanged_pixels(const ResidentBackwardGeometry& g, const Shape& s, int64_t samples);
// How many pixels all boxes of an image read, each with its halo; and for an image, all blocks of a
// team.
int64_t read_by_boxes(const BoxGeometry& g, const Shape& s);
int64_t read_by_team(const ResidentGeometry& g, const Shape& s);

// What passes over tensors of x's size take where x is streamed: `first` from memory or to it, and
// `again` as many that could come from the cache, in so many launches for each group.
double streamed_seconds(const StreamedCosts& costs, const ForwardProblem& p,
                        const DeviceLimits& device, const Group& group, int first, int again,
                        int launches);

// plan_mlp.cpp: how the MLP's layers are cut, forwards and backwards, whether one launch takes
// both, and how many blocks share the samples of a walk over the weights of each.
bool takes_layers_together(const ForwardProblem& p);
MlpGeometry plan_mlp(const ForwardProblem& p, int64_t samples, int pool_splits,
                     const DeviceLimits& device);
MlpBackwardGeometry plan_mlp(const BackwardProblem& p, int64_t samples, const DeviceLimits& device);
int64_t hidden_tiles(const MlpGeometry& g, const Shape& s);
int64_t hidden_tiles(const MlpBackwardGeometry& g, const Shape& s);
int64_t gate_tiles(const Shape& s);
int64_t gate_tiles(const MlpBackwardGeometry& g, const Shape& s);

// The grid of a launch that is no resident one.
template <class Plan>
Grid grid_of(const Plan& plan, int64_t blocks, int threads, int64_t shared_bytes) {
  Grid grid{blocks, threads, shared_bytes, plan.shared_limit};
  grid.overlaps = plan.overlaps;
  return grid;
}

// What a kernel that walks over the MLP's weights takes of shared memory, for so many samples.
template <class A, template <class, int> class Shared>
int64_t walk_shared_bytes(int samples) {
  return samples == kFewSamples ? shared_bytes<Shared<A, kFewSamples>>()
                                : shared_bytes<Shared<A, kSamplesPerWalk>>();
}

// plan_last_pass.cpp
ScaleGeometry plan_last_pass(const ForwardProblem& p, int64_t samples, int map_splits,
                             const DeviceLimits& device);

}  // namespace cbam::cuda
