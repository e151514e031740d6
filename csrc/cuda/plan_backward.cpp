#include <algorithm>
#include <numeric>

#include "plan_choice.h"

namespace cbam::cuda {
namespace {

// Bytes that memory gives together, on such a multiple: tiles of sums share none.
constexpr int kSectorBytes = 32;
// Columns of a block of the last pass, and rows: what belongs to them stands in shared memory.
constexpr int64_t kInputColumns = 1024, kFewestInputColumns = 128, kInputRows = 1024;
// Vectors of a row of that block: its threads take them all at once, several rows below each other.
// Two walks down the rows, for half of them each, are slower: 103 MB took 97 us on an H100, and 80
// where one walk was enough.
constexpr int64_t kMostInputVectors = 64, kFewestInputVectors = 32;
constexpr int64_t kLongestSpan = 4096;
// Pixels of a block whose terms stand in shared memory.
constexpr int64_t kTermPixels = 1024;
// The stencil is content with this fraction of the blocks that a pass over x wants: larger boxes
// have less halo.
constexpr int64_t kStencilShare = 5;
// Products of up to so many outputs are cut into small tiles, up to four to a multiprocessor of the
// two together; larger ones read too much that way.
constexpr int64_t kSmallProduct = 1 << 16;
// Fitted as those of forwards, to 96 backwards: to 10 %.
constexpr StreamedCosts kStreamedCosts = {0, 4.2e-6, 0.70, 62e-12};

void set_scalar(ColumnAccess& access, const View& view) {
  access.access = Access::kScalar;
  access.period = static_cast<int>(view.cols);
  access.row_group = 1;
}

// How two tensors, given by their views, can be read together.
ColumnAccess common_access(const View& a, const View& b, int vector) {
  ColumnAccess access(a, vector);
  const ColumnAccess other(b, vector);
  if (access.access != other.access) set_scalar(access, a);
  return access;
}

// Tiles of equal width, of at most `most` columns and whole vectors.
void set_tiles(TileGeometry& g, const ColumnAccess& access, int64_t cols, int64_t most,
               int vector) {
  g.access = access.access;
  g.row_group = access.row_group;
  if (g.access == Access::kPacked) {
    g.tile = static_cast<int>(cols);
    g.tiles = 1;
    return;
  }
  const int64_t tile = ceil_div(cols, ceil_div(cols, most));
  g.tile = static_cast<int>(std::min(ceil_div(tile, vector) * vector, cols));
  g.tiles = static_cast<int>(ceil_div(cols, g.tile));
}

// How sums read rows: a lane has up to two vectors of a packed group, so that its rows are no
// shorter than a vector; and rows of few vectors are packed as well, where nothing lies between
// them and a kernel for that exists.
ColumnAccess sums_access(ColumnAccess access, const View& view, bool gapless, int vector) {
  const int64_t multiple = vector / std::gcd(view.cols, int64_t{vector});
  const int64_t period = view.cols * multiple / vector;
  const bool few = access.access == Access::kVector && gapless && 2 * period <= 32;
  if (access.access != Access::kPacked && !few) return access;
  if (view.cols < vector || period > kMostPackedVectors) {
    set_scalar(access, view);
    return access;
  }
  int64_t groups = kMostPackedVectors / period;
  while (view.rows % (multiple * groups)) --groups;
  access.access = Access::kPacked;
  access.period = static_cast<int>(period * groups);
  access.row_group = static_cast<int>(multiple * groups);
  return access;
}

// Sums over tiles of one tensor or of two.
TileGeometry plan_sums(const BackwardProblem& p, const View& view, const ColumnAccess& access,
                       int columns, int64_t longest, int64_t samples, const DeviceLimits& device) {
  const int vector = elements_per_vector(p.dtype);
  const bool packed = access.access == Access::kPacked;
  TileGeometry g{};
  set_tiles(g, access, view.cols, columns, kSectorBytes / static_cast<int>(bytes_of(p.dtype)));
  g.chunk = packed ? kPartGroups * g.row_group : kPartRows;
  while (g.chunk << (g.row_lanes_log + 1) <= 32) ++g.row_lanes_log;
  g.warp_parts = std::max(packed ? 2 * kPartGroups * access.period : kPartRows * kPartPitch,
                          packed ? access.period * vector : columns);
  split(g, view.rows, samples * g.tiles, wanted_blocks(device), pieces_of(p, samples).channels,
        longest, g.row_group);
  return g;
}

// Vectors of a tile, of `vectors` of a row, that keep the most threads of a block at work.
int64_t vectors_at_once(int64_t vectors) {
  int64_t best = vectors;
  double best_share = 0;
  for (int64_t tiles = ceil_div(vectors, kMostInputVectors);; ++tiles) {
    const int64_t tile = ceil_div(vectors, tiles);
    if (best_share > 0 && tile < kFewestInputVectors) return best;
    const double share = static_cast<double>(vectors) / static_cast<double>(tiles * tile) *
                         static_cast<double>(kThreads / tile * tile) / kThreads;
    if (share <= best_share) continue;
    best = tile;
    best_share = share;
  }
}

TileGeometry plan_input(const BackwardProblem& p, const View& dout, const View& dx, int64_t samples,
                        const DeviceLimits& device) {
  const int vector = elements_per_vector(p.dtype);
  ColumnAccess access = common_access(dout, dx, vector);
  // A packed vector touches two rows at most.
  if (access.access == Access::kPacked && dout.cols < vector) set_scalar(access, dout);
  TileGeometry g{};
  int64_t most = kInputColumns;
  // As in split(), nearly enough blocks are not cut in two.
  while (most > kFewestInputColumns &&
         2 * samples * ceil_div(dout.cols, most) <= wanted_blocks(device))
    most /= 2;
  if (access.access == Access::kVector)
    most = std::min(most, vector * vectors_at_once(ceil_div(dout.cols, vector)));
  set_tiles(g, access, dout.cols, most, vector);
  g.chunk = 0;
  g.threads_along =
      threads_along(g.access == Access::kPacked ? access.period : g.tile / access.elements(vector));
  split(g, dout.rows, samples * g.tiles, wanted_blocks(device), pieces_of(p, samples).channels,
        kInputRows, g.row_group);
  return g;
}

template <class A>
int64_t stencil_bytes(const BoxGeometry& g, const BackwardProblem& p) {
  return shared_bytes<StencilShared<A>>(g, space_of(p.shape), p.gradients.conv());
}

BoxGeometry plan_stencil(const BackwardProblem& p, int64_t samples, const DeviceLimits& device) {
  const auto bytes = [&](const BoxGeometry& box) {
    return p.dtype == DType::kFloat64 ? stencil_bytes<double>(box, p)
                                      : stencil_bytes<float>(box, p);
  };
  const BoxSearch boxes{p, device, samples * kStencilShare, bytes};
  const auto found = boxes.find(Access::kScalar);
  if (!found) throw boxes.no_box();
  return *found;
}

template <class A>
BackwardGrids grids_of(const BackwardPlan& plan, const BackwardProblem& p, int64_t samples) {
  const Shape& s = p.shape;
  const MlpBackwardGeometry& mlp = plan.mlp;
  const bool both = takes_both_layers(plan, p);
  BackwardGrids grids = {
      grid_of(plan, samples * plan.cross.blocks_per_sample(), kThreads,
              shared_bytes<CrossShared<A>>(plan.cross)),
      grid_of(plan, ceil_div(samples * (s.channels + s.pixels()), kThreads), kThreads, 0),
      grid_of(plan, samples * plan.stencil.boxes(), kThreads, stencil_bytes<A>(plan.stencil, p)),
      grid_of(plan, samples * plan.terms.blocks_per_sample(), kThreads,
              shared_bytes<TermsShared<A>>(plan.terms, p.strides.channels_first())),
      grid_of(plan, ceil_div(samples, mlp.gate_samples) * gate_tiles(mlp, s),
              kGateBackwardThreads<A>,
              both ? walk_shared_bytes<A, BothBackwardShared>(mlp.gate_samples)
                   : walk_shared_bytes<A, GateBackwardShared>(mlp.gate_samples)),
      grid_of(plan, both ? 0 : ceil_div(samples, mlp.hidden_samples) * hidden_tiles(mlp, s),
              kHiddenBackwardThreads,
              walk_shared_bytes<A, HiddenBackwardShared>(mlp.hidden_samples)),
      grid_of(plan, samples * plan.input.blocks_per_sample(), kThreads,
              shared_bytes<InputGradientShared<A>>(plan.input)),
  };
  // As the first launch it would not wait before it reads the weights.
  grids.stencil.overlaps &= p.part != Part::kLogits;
  return grids;
}

int launches_of(const BackwardProblem& p) { return takes_layers_together(p) ? 5 : 6; }

Group groups_of(const BackwardProblem& p, const DeviceLimits& device) {
  const int rereads = p.part == Part::kAll ? 2 : 0;
  return group_samples(kStreamedCosts, p, device, 2, rereads, launches_of(p));
}

double streaming_seconds(const BackwardProblem& p, const DeviceLimits& device) {
  // With the two launches that sum over the batch, which a resident backward has as well.
  return streamed_seconds(kStreamedCosts, p, device, groups_of(p, device), 3, 2,
                          launches_of(p) + 2);
}

void plan_streaming(BackwardPlan& plan, const BackwardProblem& p, const DeviceLimits& device) {
  const int vector = elements_per_vector(p.dtype);
  const View x(p, p.strides, p.x), dout(p, p.dout_strides, p.dout);
  plan.group = groups_of(p, device);
  const int64_t samples = plan.group.samples;
  const bool gapless = x.row_stride == x.cols;
  plan.cross = plan_sums(p, x,
                         sums_access(common_access(x, dout, vector), x,
                                     gapless && dout.row_stride == dout.cols, vector),
                         kTileColumns, kLongestSpan, samples, device);
  plan.stencil = plan_stencil(p, samples, device);
  plan.terms =
      plan_sums(p, x, sums_access(ColumnAccess(x, vector), x, gapless && x.channels_first, vector),
                x.channels_first ? kTileColumns : kTermChannels,
                x.channels_first ? kLongestSpan : kTermPixels, samples, device);
  plan.terms.reverse = true;  // starts with what the first pass read last
  plan.mlp = plan_mlp(p, samples, device);
  if (p.gradients.x)
    plan.input = plan_input(p, dout, View(p, p.dx_strides, p.gradients.x), samples, device);
  plan.shared_limit = device.shared_per_block;
  const int64_t blocks =
      std::max({plan.cross.blocks_per_sample(), plan.stencil.boxes(),
                plan.terms.blocks_per_sample(), plan.input.blocks_per_sample(), int64_t{1}});
  plan.group.samples = std::min(samples, most_samples(blocks));
  plan.seconds = streaming_seconds(p, device);
}

}  // namespace

BackwardPlan plan(const BackwardProblem& p, const DeviceLimits& device, const Strategy& strategy) {
  BackwardPlan plan{};
  if (p.shape.samples == 0) return plan;
  plan = held_plan<BackwardPlan>(p, device, strategy, streaming_seconds);
  plan.overlaps = device.capability >= kOverlapCapability;
  if (!plan.resident) plan_streaming(plan, p, device);
  return plan;
}

BackwardGrids grids(const BackwardPlan& plan, const BackwardProblem& p, int64_t samples) {
  return p.dtype == DType::kFloat64 ? grids_of<double>(plan, p, samples)
                                    : grids_of<float>(plan, p, samples);
}

WeightGrids weight_grids(const BackwardPlan& plan, const BackwardProblem& p) {
  const Shape& s = p.shape;
  const Gradients& g = p.gradients;
  const bool wide = p.dtype == DType::kFloat64;
  const int64_t outer_bytes =
      wide ? shared_bytes<OuterShared<double>>() : shared_bytes<OuterShared<float>>();
  const int64_t sum_bytes =
      wide ? shared_bytes<VectorSumsShared<double>>() : shared_bytes<VectorSumsShared<float>>();
  const int tile = s.hidden * s.channels > kSmallProduct ? kLargeTile : kSmallTile;
  const int64_t tiles = outer_blocks(s.hidden, s.channels, tile);
  const auto blocks = [](const void* gradient, int64_t length) {
    return gradient ? vector_blocks(length) : 0;
  };
  return {
      grid_of(plan, (g.fc1_weight ? tiles : 0) + (g.fc2_weight ? tiles : 0), kThreads, outer_bytes),
      grid_of(plan,
              blocks(g.fc1_bias, s.hidden) + blocks(g.fc2_bias, s.channels) +
                  blocks(g.conv_weight, 2 * s.taps()) + blocks(g.conv_bias, 1),
              kSumThreads, sum_bytes),
      tile};
}

BackwardScratch scratch(const BackwardPlan& plan, const BackwardProblem& p) {
  const Shape& s = p.shape;
  const int64_t acc = bytes_of_accumulator(p.dtype), samples = plan.group.samples;
  const bool first = p.strides.channels_first();
  const int64_t rows = first ? s.channels : s.pixels(), cols = first ? s.pixels() : s.channels;
  const int64_t cross_rows = padded(samples * plan.cross.tiles * rows * acc),
                cross_cols = padded(samples * plan.cross.splits * cols * acc);
  if (p.part == Part::kScale) return {cross_rows, cross_cols, 0, 0, 0, 0, 0, 0, 0};
  const int64_t conv = p.gradients.conv() ? s.samples * plan.conv_shares() : 0;
  BackwardScratch bytes{};
  bytes.dm = padded(s.samples * s.channels * acc);
  bytes.d_hidden = padded(s.samples * 2 * s.hidden * acc);
  bytes.d_conv = padded(conv * (2 * s.taps() + 1) * acc);
  if (const auto& r = plan.resident) {
    bytes.exchange = r->exchanged();
    if (p.gradients.mlp()) return bytes;
    bytes.dm = bytes.d_hidden = 0;
    return bytes;
  }
  const int64_t term_parts = first ? plan.terms.tiles : plan.terms.splits;
  if (p.part != Part::kLogits) {
    bytes.cross_rows = cross_rows;
    bytes.cross_cols = cross_cols;
  }
  bytes.d_maps = padded(samples * 2 * s.pixels() * acc);
  bytes.terms = padded(samples * term_parts * s.channels * acc);
  bytes.d_pooled = padded(samples * 2 * s.channels * acc);
  return bytes;
}

}  // namespace cbam::cuda
