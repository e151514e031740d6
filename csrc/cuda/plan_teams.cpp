#include "plan_teams.h"

#include <algorithm>
#include <numeric>

namespace cbam::cuda {
namespace {

// What memory sends at a time, and so the shortest piece of a row that is the largest share of a
// block where channels come last.
constexpr int64_t kSectorBytes = 32;
// Bytes of a row of a slice that is worth a bulk copy of its own: one thread after the other issues
// them, some 40 cycles each.
constexpr int64_t kBulkPiece = 1024;
// What a block holds is loaded in about so many chunks: while one drains, the next sample's begin
// to arrive. Each takes some 0.2 us on an H100, and 8 for 4 up to a tenth of a visit.
constexpr int64_t kWantedChunks = 4;
// What a multiprocessor can be sent, in shares of the memory's bandwidth: some blocks do not use
// all of it.
constexpr double kMostShare = 2.5;
// A barrier of a cluster and of a part of a grid alone, on an H100; what waits for it is counted in
// the costs of visits.
constexpr double kClusterBarrier = 0.6e-6, kPartBarrier = 0.8e-6;
// What a second block costs the first one on its multiprocessor: it uses some of what that waits.
constexpr double kBeside = 0.9;

// What is used of the bandwidth in pieces of so many bytes: one that starts anywhere touches up to
// a sector more than it has. From two sectors on that counts as usual.
double used_in_pieces(double bytes) {
  constexpr double kSector = kSectorBytes;
  return std::min(1.0, 1.5 * bytes / (bytes + kSector));
}

}  // namespace

Teams::Teams(const ForwardProblem& p, const DeviceLimits& device, int tensors, int threads)
    : p_(p),
      s_(p.shape),
      device_(device),
      space_(space_of(p.shape)),
      vector_(elements_per_vector(p.dtype)),
      first_(p.strides.channels_first()),
      tensors_(tensors),
      threads_(threads) {}

int64_t Teams::visits(const ResidentGeometry& g) const { return ceil_div(s_.samples, g.samples); }

int64_t Teams::teams(const ResidentGeometry& g) const {
  int64_t at_once = int64_t{device_.multiprocessors} * blocks(g) / g.team;
  for (int size = 0; g.cluster && size < kClusterSizes; ++size)
    if (1 << size == g.team) at_once = int64_t{device_.clusters[size]} * blocks(g);
  return std::min(visits(g), at_once);
}

int Teams::samples_per_visit() const {
  const int64_t weights = 2 * s_.channels * s_.hidden * bytes_of(p_.weights.dtype);
  const int64_t sample = tensors_ * s_.channels * s_.pixels() * bytes_of(p_.dtype);
  int samples = 1;
  while (samples < kMostVisited && 2 * samples <= s_.samples && 4 * weights > samples * sample)
    samples *= 2;
  return samples;
}

int Teams::fewest_blocks(int samples, int blocks) const {
  const int64_t held = samples * s_.channels * s_.pixels() * bytes_of(p_.dtype);
  return static_cast<int>(ceil_div(held, limit(blocks)));
}

int64_t Teams::limit(int blocks) const {
  return blocks == 1 ? device_.shared_per_block : device_.shared_per_multiprocessor / blocks - 1024;
}

Copy Teams::copy_of(const ResidentGeometry& g) const {
  const bool whole = first_ == (g.split == Split::kChannels);
  const bool pieces_pay = whole || g.pitch * bytes_of(p_.dtype) >= kBulkPiece;
  if (device_.capability >= kClusterCapability && pieces_pay) return Copy::kBulk;
  return device_.capability >= kAsyncCapability ? Copy::kAsync : Copy::kPlain;
}

bool Teams::set_slice(ResidentGeometry& g, const Candidate& c) const {
  g.cluster = c.cluster;
  g.team = c.team;
  g.threads = threads_ / c.blocks;
  g.samples = c.samples;
  g.split = c.split;
  if (!(g.split == Split::kPixels ? share_pixels(g) : share_channels(g))) return false;
  if (int64_t{g.held_channels} * g.pixels * bytes_of(p_.dtype) > device_.shared_per_block)
    return false;
  g.rows = first_ ? g.held_channels : g.pixels;
  g.pitch = first_ ? g.pixels : g.held_channels;
  const int64_t step = first_ && g.split == Split::kChannels ? g.channel_group : 1;
  const int64_t wanted = ceil_div(int64_t{g.samples} * g.rows * tensors_, kWantedChunks);
  g.chunk = static_cast<int>(ceil_div(std::min<int64_t>(wanted, g.rows), step) * step);
  g.chunks = static_cast<int>(ceil_div(g.rows, g.chunk));
  const int64_t vectors = g.pitch / vector_;
  g.lanes = vectors >= 64 ? 32 : vectors >= 8 || first_ ? 8 : 4;
  g.copy = copy_of(g);
  g.teams = teams(g);
  return g.teams >= 1;
}

bool Teams::set_team(ResidentGeometry& g, int64_t groups) {
  // A grid's team needs no more blocks than keep the largest share as it is.
  if (!g.cluster) g.team = static_cast<int>(ceil_div(groups, ceil_div(groups, g.team)));
  return g.team <= groups;
}

bool Teams::share_channels(ResidentGeometry& g) const {
  const int64_t common = std::gcd(s_.pixels(), int64_t{vector_});
  const int64_t multiple = first_ ? vector_ / common : vector_;
  if (s_.channels % multiple || !set_team(g, s_.channels / multiple)) return false;
  g.channel_group = static_cast<int>(multiple);
  g.channels = static_cast<int>(ceil_div(s_.channels / multiple, g.team) * multiple);
  g.held_channels = g.channels;
  g.pixels = static_cast<int>(s_.pixels());
  g.pixel_group = 1;
  return first_ || g.team == 1 || g.channels * bytes_of(p_.dtype) >= kSectorBytes;
}

bool Teams::share_pixels(ResidentGeometry& g) const {
  const int64_t multiple = first_ ? vector_ : 1;
  if (g.samples > 1 || (first_ ? s_.pixels() : s_.channels) % vector_) return false;
  if (!set_team(g, s_.pixels() / multiple)) return false;
  g.pixel_group = static_cast<int>(multiple);
  g.pixels = static_cast<int>(ceil_div(s_.pixels() / multiple, g.team) * multiple);
  g.channel_group = 1;
  g.channels = static_cast<int>(ceil_div(s_.channels, g.team));
  g.held_channels = static_cast<int>(s_.channels);
  return !first_ || g.team == 1 || g.pixels * bytes_of(p_.dtype) >= kSectorBytes;
}

void Teams::set_boxes(ResidentGeometry& g, int64_t each) const {
  if (g.split == Split::kPixels) {
    const Space space = space_of(s_);
    const Shares shares(space.pixels(), g.pixel_group, g.team);
    g.boxes = {1, 1, 1, 1, 1, 1};
    for (int rank = 0; rank < g.team; ++rank) {
      const PixelBox box = box_around(space, shares.first(rank), shares.count(rank));
      g.boxes.box_depth = std::max(g.boxes.box_depth, box.depth);
      g.boxes.box_height = std::max(g.boxes.box_height, box.height);
      g.boxes.box_width = std::max(g.boxes.box_width, box.width);
    }
    g.boxes_each = 1;
    return;
  }
  int64_t wanted = std::max<int64_t>(1, g.team * each / g.samples);
  const auto cut = [&](int64_t extent, int& box, int& boxes) {
    box = static_cast<int>(ceil_div(extent, std::min(wanted, extent)));
    boxes = static_cast<int>(ceil_div(extent, box));
    wanted = std::max<int64_t>(1, wanted / boxes);
  };
  cut(s_.depth, g.boxes.box_depth, g.boxes.boxes_depth);
  cut(s_.height, g.boxes.box_height, g.boxes.boxes_height);
  cut(s_.width, g.boxes.box_width, g.boxes.boxes_width);
  g.boxes_each = static_cast<int>(ceil_div(g.samples * g.boxes.boxes(), g.team));
}

int Teams::groups(const ResidentGeometry& g, int64_t columns) {
  return static_cast<int>(std::max<int64_t>(1, g.threads / columns));
}

double Teams::rate(const ResidentGeometry& g, double teams) const {
  const double all = device_.multiprocessors;
  const bool pixels = g.split == Split::kPixels;
  const double length = pixels ? static_cast<double>(s_.pixels()) / g.team : share(g);
  const double piece = length * static_cast<double>(bytes_of(p_.dtype));
  const bool whole = g.team == 1 || first_ != pixels;
  const double used = whole ? 1 : used_in_pieces(piece);
  return used * device_.bandwidth / std::max(std::min(all, teams * g.team), all / kMostShare);
}

double Teams::share(const ResidentGeometry& g) const {
  return static_cast<double>(s_.channels) / g.team;
}

double Teams::slice(const ResidentGeometry& g) const {
  return share(g) * static_cast<double>(g.samples * s_.pixels());
}

double Teams::weights_read(const ResidentGeometry& g) const {
  if (g.weight_bytes) return 0;  // they came while the first samples did
  const double weights = 2.0 * share(g) * static_cast<double>(s_.hidden);
  return weights * static_cast<double>(bytes_of(p_.weights.dtype));
}

double Teams::sums_read(const ResidentGeometry& g, double vectors) const {
  // Of a unit: sums of so many vectors, and what is made of them, three values a sample together.
  const double of_unit = g.shares_units ? 3.0 * g.mlp_samples() : vectors * g.team;
  return static_cast<double>(s_.hidden) * of_unit * sizeof(float);
}

bool Teams::sharing_units_pays(const ResidentGeometry& g, int vectors) const {
  if (g.samples == 1) return false;
  const double speed = rate(g, static_cast<double>(g.teams)) * kCacheSpeed;
  const auto read_in = [&](bool shares) {
    ResidentGeometry other = g;
    other.shares_units = shares;
    return sums_read(other, vectors) / speed;
  };
  return read_in(true) + (g.cluster ? kClusterBarrier : kPartBarrier) < read_in(false);
}

double Teams::seconds(const VisitCosts& costs, const ResidentGeometry& g,
                      const Visit& visit) const {
  constexpr int kSharesTogether = 4;
  const auto at_once = static_cast<double>(std::min(visits(g), g.teams));
  const double speed = rate(g, at_once), elements = slice(g), samples = g.samples;
  const bool by_pixels = g.split == Split::kPixels;
  const bool whole = !first_ || s_.pixels() % vector_ == 0;
  // Two vectors of a sample go through two layers, in either direction.
  const double vectors = 2.0 * g.mlp_samples();
  const double products = 2 * share(g) * static_cast<double>(s_.hidden) * vectors;
  const double merged =
      samples * static_cast<double>(read_by_team(g, s_)) / (by_pixels ? g.team : 1);
  const double collected = by_pixels ? 0 : samples * static_cast<double>(s_.pixels());
  const double of_block =
      costs.memory * visit.passes * elements * static_cast<double>(bytes_of(p_.dtype)) / speed +
      elements * (costs.element + (whole ? 0 : costs.of_rest) + (by_pixels ? costs.of_pixels : 0)) +
      (costs.weights * weights_read(g) + costs.sums * sums_read(g, vectors)) /
          (speed * kCacheSpeed) +
      products * costs.product + merged * costs.merged + collected * costs.collected;
  const double barriers = visit.barriers + (g.shares_units ? 1 : 0);
  const double of_round = costs.round + of_block * blocks_at_once(g, at_once) +
                          barriers * (g.cluster ? costs.cluster_barrier : costs.part_barrier) +
                          static_cast<double>(ceil_div(g.team, kSharesTogether)) * costs.shares +
                          visit.chunks * costs.chunk;
  // Parts of rounds count as parts, so that neighbouring batches get the same plan.
  return costs.once + static_cast<double>(visits(g)) / at_once * of_round;
}

double Teams::blocks_at_once(const ResidentGeometry& g, double teams) const {
  const double wanted = teams * g.team / device_.multiprocessors;
  const double many = std::clamp(wanted, 1.0, static_cast<double>(blocks(g)));
  return 1 + kBeside * (many - 1);
}

const char* why_not_held(const ForwardProblem& p, const DeviceLimits& device) {
  if (p.dtype == DType::kFloat64) return "float64 is streamed";
  return device.bandwidth <= 0 ? "the device does not tell how fast its memory is" : nullptr;
}

bool in_whole_vectors(const ForwardProblem& p, const Strides& strides, const void* data) {
  const View view(p, strides, data);
  const int vector = elements_per_vector(p.dtype);
  if (!view.vectors) return false;
  return view.channels_first ? view.row_stride == view.cols
                             : view.row_stride % vector == 0 && view.cols % vector == 0;
}

}  // namespace cbam::cuda
