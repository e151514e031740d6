#include "plan.h"

#include <algorithm>
#include <climits>
#include <numeric>

#include "plan_choice.h"

namespace cbam::cuda {
namespace {

// Elements of a part of a row: no fewer, so that its partial result stays small beside it; of rows
// and columns no more than the following, so that a sum keeps its digits and the factor fits into
// shared memory.
constexpr int64_t kShortestRowPart = 4096;
// Rows of a block that share one reading of the factor, where there are blocks enough.
constexpr int kMostScaledRows = 128;
constexpr int64_t kLongestPart = 4096;
constexpr int64_t kLongestUnscaledRowPart = 1 << 16;
// Vectors side by side in a block that reduces down columns: 1 KB of a row, or 256 bytes.
constexpr int kMostAlong = 64, kFewestAlong = 16;
// What short rows take of a block's shared memory, at most, and of that each thread.
constexpr int64_t kPackedBytes = 32 * 1024, kPackedBytesOfThread = kPackedBytes / kThreads;

// What passes leave in the cache shares it with what they write.
constexpr double kCacheShare = 0.4;
// What a launch takes longer where it waits for the one before to end.
constexpr double kWithoutOverlap = 0.8e-6;
// Fitted to 96 forwards of a ResNet-50's blocks on an H100, of 1 to 256 samples: to 11 % (the root
// of the mean square, in logarithms).
constexpr StreamedCosts kStreamedCosts = {10.5e-6, 1.6e-6, 0.80, 33e-12};

// Short rows that are no whole number of vectors, taken as one piece of memory.
bool are_packed(const View& view, int vector, DType dtype) {
  return view.vectors && view.row_stride == view.cols && view.cols % vector != 0 &&
         view.cols * bytes_of(dtype) <= kPackedBytesOfThread * 32;
}

ReductionGeometry packed_rows(const View& view, int vector, DType dtype, int64_t samples,
                              int64_t wanted) {
  ReductionGeometry g{};
  g.along_rows = true;
  g.access = Access::kPacked;
  g.row_group = 1;
  g.splits = 1;
  g.span = static_cast<int>(ceil_div(view.cols, vector) * vector);
  const int64_t row = g.span * bytes_of(dtype);
  const auto tile_rows = [&](int rows) {
    g.tile = rows;
    g.tiles = static_cast<int>(ceil_div(view.rows, rows));
  };
  g.lanes = 1;
  while (g.lanes < 32 && g.lanes * kPackedBytesOfThread < row) g.lanes *= 2;
  tile_rows(kThreads / g.lanes);
  while (g.lanes < 32 && samples * g.tiles < wanted) tile_rows(kThreads / (g.lanes *= 2));
  while (2 * g.tile * row <= kPackedBytes && samples * g.tiles >= 8 * wanted) tile_rows(2 * g.tile);
  return g;
}

ReductionGeometry along_rows(const ForwardProblem& p, int64_t samples, bool scaled,
                             int64_t wanted) {
  const View view(p, p.strides, p.x);
  const int vector = elements_per_vector(p.dtype);
  if (!scaled && are_packed(view, vector, p.dtype))
    return packed_rows(view, vector, p.dtype, samples, wanted);
  const int64_t vectors = view.cols / vector, rows = samples * view.rows;
  ReductionGeometry g{};
  g.along_rows = true;
  g.access = Access::kVector;
  g.row_group = 1;
  // A row over a block takes 33 instructions an element, of which its loop has 4 (8x256x56x56 in
  // float16, H100, 2026-11-28). From how many rows on a warp is faster is a guess, not run.
  const bool few_rows = !scaled && 2 * rows < wanted * (kThreads / 32);
  const int64_t enough_for_a_block = few_rows ? kThreads : 4 * kThreads;
  // As few threads a row as fill the device: each has many loads, and merging is rare.
  const bool many_rows = rows >= wanted * (kThreads / 8);
  g.lanes = vectors >= enough_for_a_block ? kThreads : vectors >= 64 && !many_rows ? 32 : 8;
  const int at_once = kThreads / g.lanes;
  g.tile = at_once;
  if (scaled) {
    const int fewest = std::max(at_once, pieces_of(p, samples).rows_per_factor);
    g.tile = std::max(at_once, kMostScaledRows);
    while (g.tile > fewest && samples * ceil_div(view.rows, g.tile) < wanted) g.tile /= 2;
  }
  g.tiles = static_cast<int>(ceil_div(view.rows, g.tile));
  split(g, view.cols, samples * g.tiles, wanted, kShortestRowPart,
        scaled ? kLongestPart : kLongestUnscaledRowPart, vector);
  return g;
}

// Sets tiles of so many vectors and parts that fill the device evenly; how much of the device's
// threads then have work.
double set_columns(ReductionGeometry& g, int tile, int64_t rows, int64_t samples, int64_t shortest,
                   int64_t at_once) {
  g.tile = tile;
  g.tiles = static_cast<int>(ceil_div(g.period, tile));
  const int64_t fewest = ceil_div(rows, kLongestPart);
  const int64_t parts =
      even_pieces(samples * g.tiles, at_once, fewest, std::max(fewest, rows / shortest));
  g.span = static_cast<int>(ceil_div(ceil_div(rows, parts), g.row_group) * g.row_group);
  g.splits = static_cast<int>(ceil_div(rows, g.span));
  const double covered = static_cast<double>(g.period) / (int64_t{1} * g.tiles * tile);
  const double busy = static_cast<double>(kThreads / tile * tile) / kThreads;
  return covered * busy * fullness(samples * g.blocks_per_sample(), at_once);
}

ReductionGeometry down_columns(const ForwardProblem& p, int64_t samples, int multiprocessors) {
  constexpr double kGood = 0.85;  // wider tiles are worth more than the rest
  const View view(p, p.strides, p.x);
  const int vector = elements_per_vector(p.dtype);
  const ColumnAccess access = ColumnAccess(view, vector).of_two_rows(vector);
  const int64_t shortest = pieces_of(p, samples).shortest_part;
  const int64_t at_once = int64_t{kColumnBlocks} * multiprocessors;
  ReductionGeometry g{};
  g.access = access.access;
  g.period = access.period;
  g.row_group = access.row_group;
  if (g.access == Access::kPacked || g.period <= kFewestAlong) {
    set_columns(g, g.period, view.rows, samples, shortest, at_once);
    return g;
  }
  ReductionGeometry best{};
  double best_share = 0;
  for (int64_t tiles = ceil_div(g.period, kMostAlong); best_share < kGood; ++tiles) {
    // Even: pieces of whole sectors.
    const auto tile = static_cast<int>(ceil_div(ceil_div(g.period, tiles), 2) * 2);
    if (best_share > 0 && tile < kFewestAlong) break;
    const double share = set_columns(g, tile, view.rows, samples, shortest, at_once);
    if (share <= best_share) continue;
    best = g;
    best_share = share;
  }
  return best;
}

int launches_of(const ForwardProblem& p) { return takes_layers_together(p) ? 4 : 5; }

Group groups_of(const ForwardProblem& p, const DeviceLimits& device) {
  const int rereads = p.part == Part::kAll ? 2 : p.part == Part::kLogits ? 1 : 0;
  return group_samples(kStreamedCosts, p, device, 1, rereads, launches_of(p));
}

double streaming_seconds(const ForwardProblem& p, const DeviceLimits& device) {
  const int first = p.ending.residual ? 3 : 2;  // x, out and the residual
  return streamed_seconds(kStreamedCosts, p, device, groups_of(p, device), first, 2,
                          launches_of(p));
}

template <class A>
int64_t reduction_bytes(const ReductionGeometry& g, bool scaled, DType dtype) {
  if (g.along_rows && g.access == Access::kPacked)
    return bytes_of(dtype) == 2 ? shared_bytes<PackedRowShared<Half>>(g)
                                : shared_bytes<PackedRowShared<float>>(g);
  if (g.along_rows) return shared_bytes<RowShared<A>>(g, scaled);
  const int elements = g.access == Access::kScalar ? 1 : elements_per_vector(dtype);
  return shared_bytes<ColumnShared<A>>(g, scaled, elements);
}

template <class A>
ForwardGrids grids_of(const ForwardPlan& plan, const ForwardProblem& p, int64_t samples) {
  const Shape& s = p.shape;
  const MlpGeometry& mlp = plan.mlp;
  const ScaleGeometry& g = plan.scale;
  return {
      grid_of(plan, samples * plan.pool.blocks_per_sample(), kThreads,
              reduction_bytes<A>(plan.pool, false, p.dtype)),
      grid_of(plan, ceil_div(samples, mlp.hidden_samples) * hidden_tiles(mlp, s), kThreads,
              mlp.together ? walk_shared_bytes<A, BothShared>(mlp.hidden_samples)
                           : walk_shared_bytes<A, HiddenShared>(mlp.hidden_samples)),
      grid_of(plan, mlp.together ? 0 : ceil_div(samples, mlp.gate_samples) * gate_tiles(s),
              kGateChannels, walk_shared_bytes<A, GateShared>(mlp.gate_samples)),
      grid_of(plan, samples * plan.maps.blocks_per_sample(), kThreads,
              reduction_bytes<A>(plan.maps, true, p.dtype)),
      grid_of(plan, samples * g.boxes() * g.chunks, kThreads,
              shared_bytes<ScaleShared<A>>(g, space_of(s))),
  };
}

}  // namespace

// Grouping pays where reading a group's x again from the cache saves more than its launches take.
// Below kSamplesPerWalk samples it would also read the MLP's weights more often.
Group group_samples(const StreamedCosts& costs, const ForwardProblem& p, const DeviceLimits& device,
                    int tensors, int rereads, int launches) {
  const int64_t sample = tensors * p.shape.channels * p.shape.pixels() * bytes_of(p.dtype);
  const auto room = static_cast<int64_t>(kCacheShare * static_cast<double>(device.l2_bytes));
  const int64_t fitting = room / sample;
  if (fitting >= p.shape.samples) return {p.shape.samples, true};
  const int64_t most = fitting / kSamplesPerWalk * kSamplesPerWalk;
  if (most == 0 || device.bandwidth <= 0) return {p.shape.samples, false};
  const int64_t groups = ceil_div(p.shape.samples, most);
  const int64_t samples =
      ceil_div(ceil_div(p.shape.samples, groups), kSamplesPerWalk) * kSamplesPerWalk;
  const Group grouped{samples, true}, whole{p.shape.samples, false};
  const auto seconds = [&](const Group& group) {
    return streamed_seconds(costs, p, device, group, 0, rereads, launches);
  };
  return seconds(grouped) < seconds(whole) ? grouped : whole;
}

double streamed_seconds(const StreamedCosts& costs, const ForwardProblem& p,
                        const DeviceLimits& device, const Group& group, int first, int again,
                        int launches) {
  const double pass = static_cast<double>(p.shape.samples * p.shape.channels * p.shape.pixels() *
                                          bytes_of(p.dtype)) /
                      (costs.bandwidth * device.bandwidth);
  const auto groups = static_cast<double>(ceil_div(p.shape.samples, group.samples));
  const double passes = first + (group.in_cache ? again / kCacheSpeed : again);
  const double launch =
      costs.launch + (device.capability >= kOverlapCapability ? 0 : kWithoutOverlap);
  // Two vectors through the first layer and one through the second, in both directions.
  const double products = 3.0 *
                          static_cast<double>(p.shape.samples * p.shape.channels * p.shape.hidden) *
                          costs.product / device.multiprocessors;
  return groups * (costs.group + launches * launch) + passes * pass + products;
}

int64_t most_samples(int64_t blocks_per_sample) {
  return std::max<int64_t>(INT_MAX / blocks_per_sample / kSamplesPerWalk * kSamplesPerWalk, 1);
}

View::View(const ForwardProblem& p, const Strides& strides, const void* data) {
  const bool first = p.strides.channels_first();
  rows = first ? p.shape.channels : p.shape.pixels();
  cols = first ? p.shape.pixels() : p.shape.channels;
  row_stride = rows == 1 ? cols : first ? strides.channel : strides.pixel;
  channels_first = first;
  vectors = p.dtype != DType::kFloat64 && reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
            (p.shape.samples == 1 || strides.sample % elements_per_vector(p.dtype) == 0);
}

ColumnAccess::ColumnAccess(const View& view, int vector) : period(static_cast<int>(view.cols)) {
  if (!view.vectors) return;
  if (view.row_stride % vector == 0 && view.cols % vector == 0) {
    access = Access::kVector;
    period = static_cast<int>(view.cols / vector);
    return;
  }
  const int64_t common = std::gcd(view.cols, static_cast<int64_t>(vector));
  if (!view.channels_first || view.row_stride != view.cols || view.cols / common > kThreads ||
      view.rows % (vector / common))
    return;
  access = Access::kPacked;
  period = static_cast<int>(view.cols / common);
  row_group = static_cast<int>(vector / common);
}

ColumnAccess ColumnAccess::of_two_rows(int vector) const {
  const int cols = period * vector / row_group;
  if (access != Access::kPacked || cols + 1 >= vector) return *this;
  ColumnAccess narrowed = *this;
  narrowed.access = Access::kScalar;
  narrowed.period = cols;
  narrowed.row_group = 1;
  return narrowed;
}

const Pieces& pieces_of(const ForwardProblem& p, int64_t samples) {
  static constexpr Pieces kThrifty{256, 64, 64, 0.1}, kSmall{64, 8, 32, 4.0};
  constexpr int64_t kSmallBytes = 4 << 20;  // 1.3 us at 3 TB/s
  const int64_t bytes = samples * p.shape.channels * p.shape.pixels() * bytes_of(p.dtype);
  return bytes < kSmallBytes ? kSmall : kThrifty;
}

int threads_along(int64_t vectors, int threads) {
  int best = 1;
  double best_share = 0;
  const auto most = static_cast<int>(std::min<int64_t>(vectors, threads));
  for (int along = std::min(most, 32); along <= most; ++along) {
    const double covered =
        static_cast<double>(vectors) / static_cast<double>(ceil_div(vectors, along) * along);
    const double share = covered * (threads / along * along) / threads;
    if (share < best_share) continue;
    best = along;
    best_share = share;
  }
  return best;
}

int64_t wanted_blocks(const DeviceLimits& device) {
  return int64_t{device.multiprocessors} * device.threads_per_multiprocessor / kThreads / 4;
}

namespace {

ForwardPlan plan_streaming(const ForwardProblem& p, const DeviceLimits& device,
                           const char* reason) {
  const int64_t wanted = wanted_blocks(device);
  ForwardPlan plan{};
  plan.reason = reason;
  plan.group = groups_of(p, device);
  const int64_t samples = plan.group.samples;
  if (p.strides.channels_first()) {
    plan.pool = along_rows(p, samples, false, wanted);
    plan.maps = down_columns(p, samples, device.multiprocessors);
  } else {
    plan.pool = down_columns(p, samples, device.multiprocessors);
    plan.maps = along_rows(p, samples, true, wanted);
  }
  plan.maps.reverse = true;  // starts with what the pool read last
  plan.scale = plan_last_pass(p, samples, p.part == Part::kScale ? 1 : plan.maps.splits, device);
  plan.mlp = plan_mlp(p, samples, plan.pool.splits, device);
  plan.shared_limit = device.shared_per_block;
  plan.overlaps = device.capability >= kOverlapCapability;
  const int64_t blocks = std::max({plan.pool.blocks_per_sample(), plan.maps.blocks_per_sample(),
                                   plan.scale.boxes() * plan.scale.chunks, int64_t{1}});
  plan.group.samples = std::min(samples, most_samples(blocks));
  plan.seconds = streaming_seconds(p, device);
  return plan;
}

}  // namespace

ForwardPlan plan(const ForwardProblem& p, const DeviceLimits& device, const Strategy& strategy) {
  const auto held = held_plan<ForwardPlan>(p, device, strategy, streaming_seconds);
  return held.resident ? held : plan_streaming(p, device, held.reason);
}

ForwardGrids grids(const ForwardPlan& plan, const ForwardProblem& p, int64_t samples) {
  return p.dtype == DType::kFloat64 ? grids_of<double>(plan, p, samples)
                                    : grids_of<float>(plan, p, samples);
}

ForwardScratch scratch(const ForwardPlan& plan, const ForwardProblem& p) {
  if (const auto& r = plan.resident) return {0, 0, 0, 0, r->exchanged()};
  if (p.part == Part::kScale) return {};
  const int64_t acc = bytes_of_accumulator(p.dtype), samples = plan.group.samples;
  const int64_t pooled = samples * plan.pool.splits * p.shape.channels;
  const int64_t mapped = samples * plan.maps.splits * p.shape.pixels();
  const bool merges_pool = plan.pool.splits > 1, merges_maps = plan.maps.splits > 1;
  return {merges_pool ? padded(pooled * 2 * acc) : 0,
          merges_pool && p.training() ? padded(pooled * 4) : 0, padded(mapped * 2 * acc),
          merges_maps && p.training() ? padded(mapped * 4) : 0, 0};
}

}  // namespace cbam::cuda
