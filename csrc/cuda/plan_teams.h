// What the planners of both resident kernels share: how many blocks hold how many samples, which
// part of them a block takes, and how long copies and waits take.
#pragma once

#include "kernels/resident.h"
#include "plan_parts.h"

namespace cbam::cuda {

// The costs beside memory, estimates that are measured as a whole: a barrier of a cluster (0.5 us
// for 4 blocks, 0.65 us for 8 on an H100) and of a part of a grid (0.7 to 1.1 us in visits of
// 56x56, where its 8 blocks come together); a product of the MLP; a tap of the convolution, for
// what one thread computes of it at a time; the launch and the first bytes.
constexpr double kClusterBarrier = 0.6e-6, kPartBarrier = 0.8e-6;
constexpr double kProductSeconds = 8e-12, kTapSeconds = 10e-9, kStartSeconds = 3e-6;

// Blocks of a team, samples of a visit, blocks on a multiprocessor, and what they hold.
struct Candidate {
  bool cluster;
  int team, samples, blocks;
  Split split;
};

// What plans took on an H100 and an H200 beside what is estimated here: seconds more, and so many
// times as long, where rows are whole vectors, where they are not, and where a visit has several
// samples. Of 576 predictions for blocks of a ResNet-50, both strategies in both directions, 449
// were met within a third, when what blocks exchange through the cache was no part of the
// estimates.
struct Measured {
  double more, whole, rest, several;
};

class Teams {
 public:
  // `tensors` of x's size are on the chip, at most; the blocks of a multiprocessor have `threads`.
  Teams(const ForwardProblem& p, const DeviceLimits& device, int tensors, int threads);

  // As many as there are visits, and as run at once.
  int64_t teams(const ResidentGeometry& g) const;
  // Samples that share one reading of the MLP's weights, so that these stay a quarter of what a
  // visit reads of the tensors.
  int samples_per_visit() const;
  double measured(const Measured& measured, const ResidentGeometry& g, double estimated) const;
  // Blocks without which so many samples have no room.
  int fewest_blocks(int samples) const;
  // Bytes of shared memory that a block may take, of so many on a multiprocessor.
  int64_t limit(int blocks) const;
  int64_t limit(const ResidentGeometry& g) const { return limit(blocks(g)); }
  // Of a weight of the MLP.
  int weight_bytes() const { return static_cast<int>(bytes_of(p_.weights.dtype)); }

 protected:
  // Team, threads, samples and the part of a sample that a block holds, how it is copied, and how
  // many teams there are; a team of the grid has no more blocks than it needs. False where a part
  // would be none, no whole vectors or in short pieces, or where no team runs.
  bool set_slice(ResidentGeometry& g, const Candidate& c) const;
  // Boxes for every block of the team, `each` times: cut along the slowest dimension first. Where
  // blocks hold pixels, the largest that is around those of one.
  void set_boxes(ResidentGeometry& g, int64_t each) const;
  // Threads that share a column where these are so many in all.
  static int groups(const ResidentGeometry& g, int64_t columns);

  // Of a block, as if its multiprocessor had nothing else to do: bytes of memory a second where
  // `teams` teams run.
  double rate(const ResidentGeometry& g, double teams) const;
  // Channels of a block and elements of its slice, on average: blocks share the bandwidth, so that
  // one with a group of channels more than others gets more of it. Seconds for the weights of the
  // MLP where every visit reads them, for products with so many vectors, and for so many barriers
  // and that behind shared units.
  double share(const ResidentGeometry& g) const;
  double slice(const ResidentGeometry& g) const;
  double weight_seconds(const ResidentGeometry& g, double rate) const;
  double product_seconds(const ResidentGeometry& g, int vectors) const;
  // Until a block has read the team's shares of the hidden layer's sums for so many vectors.
  double merge_seconds(const ResidentGeometry& g, int vectors, double rate) const;
  // While a block reads the shares of a team one after the other, eight at a time, a microsecond
  // each on an H100: of more blocks than most of the teams that were measured have.
  static double share_seconds(const ResidentGeometry& g);
  // Whether it is faster that each block adds up some units for all: of 16 blocks at 7x7 each would
  // else read 131 KB, 3 us on an H100, where a barrier takes one.
  bool sharing_units_pays(const ResidentGeometry& g, int vectors) const;
  // Until the blocks of a team that is no cluster have read so many bytes of each other in all.
  static double exchange_seconds(const ResidentGeometry& g, int64_t bytes, double rate);
  static double barrier_seconds(const ResidentGeometry& g, double barriers);
  // Of a visit: where two blocks share a multiprocessor, the one uses what the other waits.
  double together(const ResidentGeometry& g, double teams, double memory, double waits) const;

  const ForwardProblem& p_;
  const Shape& s_;
  const DeviceLimits& device_;
  Space space_;
  int vector_;
  bool first_;

 private:
  // What a block is given of the channels or of the pixels; false where a share would be none, no
  // whole vectors or in short pieces.
  static bool set_team(ResidentGeometry& g, int64_t groups);
  bool share_channels(ResidentGeometry& g) const;
  bool share_pixels(ResidentGeometry& g) const;
  Copy copy_of(const ResidentGeometry& g) const;

  // Of a multiprocessor.
  int blocks(const ResidentGeometry& g) const { return threads_ / g.threads; }

  int tensors_, threads_;
};

// Why no plan holds a problem on any device of this kind, or null.
const char* why_not_held(const ForwardProblem& p, const DeviceLimits& device);

// Whether slices of a tensor of the problem are whole vectors.
bool in_whole_vectors(const ForwardProblem& p, const Strides& strides, const void* data);

// Parts of visits and of rounds count as parts, so that neighbouring batches get the same plan.
template <class Fitting>
double estimated(const Fitting& fitting, const Shape& s, const typename Fitting::Geometry& g) {
  const double visits = std::max(1.0, static_cast<double>(s.samples) / g.samples);
  const double at_once = std::min(visits, static_cast<double>(g.teams));
  return kStartSeconds + visits / at_once * fitting.round_seconds(g, at_once);
}

// The way to hold samples that is estimated to be the fastest, and the estimate, where every visit
// reads the weights. What was measured beside estimates does not say which of two ways is faster.
template <class Fitting>
ResidentPlan<typename Fitting::Geometry> fastest_way(const Fitting& fitting, const Shape& s,
                                                     const DeviceLimits& device,
                                                     std::optional<Split> only) {
  ResidentPlan<typename Fitting::Geometry> best, of_split;
  const int all = device.multiprocessors;
  // Returns how many blocks the candidate's team needs.
  const auto consider = [&](const Candidate& candidate) {
    const auto g = fitting.geometry(candidate);
    if (!g) return candidate.team;
    const double needed = estimated(fitting, s, *g);
    if (!of_split.geometry || needed < of_split.seconds)
      of_split = {g, needed,
                  g->cluster ? "clusters hold the samples" : "the whole grid holds samples"};
    return g->team;
  };
  const auto consider_all = [&](int samples, Split split) {
    for (int blocks = 1; blocks <= 2; ++blocks)
      for (int size = 0; size < kClusterSizes; ++size)
        if (device.clusters[size]) consider({true, 1 << size, samples, blocks, split});
    if (of_split.geometry && of_split.geometry->cluster) {
      // Of the whole grid's teams the smallest alone: they leave fewer blocks without a team.
      int team = fitting.fewest_blocks(samples);
      while (team < all && !fitting.geometry({false, team, samples, 1, split})) ++team;
      consider({false, team, samples, 1, split});
      return;
    }
    // The largest teams of which so many run at once.
    for (int team = all; team > 0; team = all / (all / team + 1))
      team = consider({false, team, samples, 1, split});
  };
  for (const Split split : {Split::kChannels, Split::kPixels}) {
    if (only && only != split) continue;
    of_split = {};
    const int samples = split == Split::kPixels ? 1 : fitting.samples_per_visit();
    consider_all(samples, split);
    if (samples > 1) consider_all(1, split);
    if (of_split.geometry && (!best.geometry || of_split.seconds < best.seconds)) best = of_split;
  }
  if (!best.geometry) best.reason = "a sample does not fit on the chip";
  return best;
}

// The same way to hold a sample, for a batch of another size.
template <class Fitting>
ResidentPlan<typename Fitting::Geometry> for_batch(ResidentPlan<typename Fitting::Geometry> plan,
                                                   const Fitting& fitting, const Shape& s) {
  if (!plan.geometry) return plan;
  plan.geometry->teams = fitting.teams(*plan.geometry);
  plan.seconds =
      fitting.measured(Fitting::kMeasured, *plan.geometry, estimated(fitting, s, *plan.geometry));
  return plan;
}

// The geometry of that way, with the weights on the chip where it leaves them room and teams come
// back for more samples. What else they would allow, or cost, is not measured.
template <class Fitting>
ResidentPlan<typename Fitting::Geometry> fastest(const Fitting& fitting, const Shape& s,
                                                 const DeviceLimits& device,
                                                 std::optional<Split> only) {
  auto best = fastest_way(fitting, s, device, only);
  if (!best.geometry) return best;
  auto held = *best.geometry;
  held.weight_bytes = fitting.weight_bytes();
  if (ceil_div(s.samples, held.samples) > held.teams &&
      fitting.shared_bytes(held) <= fitting.limit(held))
    best.geometry = held;
  return for_batch(best, fitting, s);
}

// The grid of a plan's launch.
template <class Plan>
Grid grid_of_teams(const Plan& plan, int64_t shared_bytes) {
  const auto& g = *plan.resident;
  Grid grid;
  grid.blocks = g.teams * g.team;
  grid.threads = g.threads;
  grid.shared_bytes = shared_bytes;
  grid.shared_limit = plan.shared_limit;
  grid.cluster = g.cluster ? g.team : 1;
  grid.cooperative = !g.cluster;
  return grid;
}

}  // namespace cbam::cuda
