// What the planners of both resident kernels share: how many blocks hold how many samples, which
// part of them a block takes, and how long copies and waits take.
#pragma once

#include "kernels/resident.h"
#include "plan_parts.h"

namespace cbam::cuda {

// Sizes of clusters that share multiprocessors, up to 8 blocks. Of 16, two may stand on one: there
// compute-sanitizer reports a missing wait at barriers that have just been set up, and they were
// faster for few samples alone, which are streamed.
constexpr int kClustersBeside = 4;
// The first compute capability that brings long pieces to the cache by one instruction.
constexpr int kPrefetchCapability = 90;

// Blocks of a team, samples of a visit, blocks on a multiprocessor, and what they hold.
struct Candidate {
  bool cluster;
  int team, samples, blocks;
  Split split;
};

// What a launch takes on an H100, in seconds: `once`, and for every round of visits the rest, of
// which what a block computes and moves counts for all blocks on its multiprocessor.
struct VisitCosts {
  double once, round;  // whatever is visited
  double memory;       // a part of what the tensors' bytes would take at the memory's bandwidth
  double element, of_rest, of_pixels;  // of the slice; more where rows are no whole vectors; more
                                       // where blocks hold pixels
  double product;                      // of the MLP
  double weights, sums;  // parts of what bytes would take from the cache: the MLP's weights, and
                         // the team's sums of the hidden layer
  double merged, collected;  // a pixel's maps of one block, a pixel's gates
  double cluster_barrier, part_barrier;
  double shares;  // four blocks' shares of a sum, one after the other
  double chunk;   // of x, where not all of them stay
};

// What of a visit depends on its direction.
struct Visit {
  double passes;  // over a block's slice in memory
  double barriers;
  double chunks;  // that come and go
};

class Teams {
 public:
  // `tensors` of x's size are on the chip, at most; the blocks of a multiprocessor have `threads`.
  Teams(const ForwardProblem& p, const DeviceLimits& device, int tensors, int threads);

  int64_t visits(const ResidentGeometry& g) const;
  // As many as there are visits, and as run at once.
  int64_t teams(const ResidentGeometry& g) const;
  // Samples that share one reading of the MLP's weights, so that these stay a quarter of what a
  // visit reads of the tensors.
  int samples_per_visit() const;
  // Blocks without which so many samples have no room, of so many on a multiprocessor.
  int fewest_blocks(int samples, int blocks) const;
  // Until all have been visited.
  double seconds(const VisitCosts& costs, const ResidentGeometry& g, const Visit& visit) const;
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
  // one with a group of channels more than others gets more of it.
  double share(const ResidentGeometry& g) const;
  double slice(const ResidentGeometry& g) const;
  // Bytes of the weights of the MLP where every visit reads them, and of the team's sums of the
  // hidden layer for so many vectors.
  double weights_read(const ResidentGeometry& g) const;
  double sums_read(const ResidentGeometry& g, double vectors) const;
  // Whether it is faster that each block adds up some units for all: of 16 blocks at 7x7 each would
  // else read 131 KB, 3 us on an H100, where a barrier takes one.
  bool sharing_units_pays(const ResidentGeometry& g, int vectors) const;

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
  // Of a multiprocessor on which `teams` teams run, as so many of which each runs alone.
  double blocks_at_once(const ResidentGeometry& g, double teams) const;

  // Of a multiprocessor.
  int blocks(const ResidentGeometry& g) const { return threads_ / g.threads; }

  int tensors_, threads_;
};

// Why no plan holds a problem on any device of this kind, or null.
const char* why_not_held(const ForwardProblem& p, const DeviceLimits& device);

// Whether slices of a tensor of the problem are whole vectors.
bool in_whole_vectors(const ForwardProblem& p, const Strides& strides, const void* data);

// The same, with the weights on the chip where it leaves them room and teams come back for more
// samples.
template <class Fitting>
typename Fitting::Geometry with_weights(const Fitting& fitting,
                                        const typename Fitting::Geometry& g) {
  auto held = g;
  held.weight_bytes = fitting.weight_bytes();
  const bool comes_back = fitting.visits(g) > g.teams;
  return comes_back && fitting.shared_bytes(held) <= fitting.limit(held) ? held : g;
}

// The way to hold samples that is estimated to be the fastest of those that are asked for.
template <class Fitting>
class WaySearch {
 public:
  using Geometry = typename Fitting::Geometry;

  WaySearch(const Fitting& fitting, const DeviceLimits& device, const Way& only)
      : fitting_(fitting), device_(device), only_(only) {
    const bool can = !only.ahead || device.capability >= kPrefetchCapability;
    for (const Split split : {Split::kChannels, Split::kPixels}) {
      if (!can || (only.split && *only.split != split)) continue;
      const int several = split == Split::kPixels ? 1 : fitting.samples_per_visit();
      consider_all(only.samples ? only.samples : several, split);
      if (several > 1 && !only.samples) consider_all(1, split);
    }
    if (best_.geometry) return;
    best_.reason = only.cluster ? "samples cannot be held in the way that is named"
                                : "a sample does not fit on the chip";
  }
  const ResidentPlan<Geometry>& best() const { return best_; }

 private:
  void consider_all(int samples, Split split) {
    const int fewest = only_.blocks ? only_.blocks : 1, most = only_.blocks ? only_.blocks : 2;
    for (int blocks = fewest; blocks <= most; ++blocks) {
      if (only_.cluster.value_or(true)) consider_clusters(samples, blocks, split);
      if (!only_.cluster.value_or(false)) consider_grid(samples, blocks, split);
    }
  }
  void consider_clusters(int samples, int blocks, Split split) {
    const int sizes = blocks == 1 || only_.blocks ? kClusterSizes : kClustersBeside;
    for (int size = 0; size < sizes; ++size)
      if (device_.clusters[size] && (!only_.team || only_.team == 1 << size))
        consider({true, 1 << size, samples, blocks, split});
  }
  // Of the whole grid's teams, which leave fewer blocks without a team than clusters do.
  void consider_grid(int samples, int blocks, Split split) {
    if (only_.team) {
      consider({false, only_.team, samples, blocks, split});
      return;
    }
    const int most = device_.multiprocessors * blocks;
    int team = fitting_.fewest_blocks(samples, blocks);
    // The smallest, and those that are hardly larger.
    while (team < most && !fitting_.geometry({false, team, samples, blocks, split})) ++team;
    for (const int last = team + team / 4; team <= last; ++team)
      consider({false, team, samples, blocks, split});
    // The largest of which so many run at once.
    for (team = most; team > 0; team = most / (most / team + 1))
      team = consider({false, team, samples, blocks, split});
  }
  // Returns how many blocks the candidate's team needs.
  int consider(const Candidate& candidate) {
    const auto fitted = fitting_.geometry(candidate);
    if (!fitted) return candidate.team;
    auto g = with_weights(fitting_, *fitted);
    g.fetches_ahead = only_.ahead;
    const double needed = fitting_.seconds(g);
    if (!best_.geometry || needed < best_.seconds)
      best_ = {g, needed, g.cluster ? "clusters hold the samples" : "the whole grid holds samples"};
    return g.team;
  }

  const Fitting& fitting_;
  const DeviceLimits& device_;
  const Way& only_;
  ResidentPlan<Geometry> best_;
};

// The same way to hold a sample, for a batch of another size.
template <class Fitting>
ResidentPlan<typename Fitting::Geometry> for_batch(ResidentPlan<typename Fitting::Geometry> plan,
                                                   const Fitting& fitting) {
  if (!plan.geometry) return plan;
  plan.geometry->teams = fitting.teams(*plan.geometry);
  plan.seconds = fitting.seconds(*plan.geometry);
  return plan;
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
