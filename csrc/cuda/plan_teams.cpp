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
// A slice is loaded in about so many chunks: while one drains, the next sample's begin to arrive.
constexpr int64_t kWantedChunks = 8;
// What a multiprocessor can be sent, in shares of the memory's bandwidth: some blocks do not use
// all of it.
constexpr double kMostShare = 2.5;

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

int64_t Teams::teams(const ResidentGeometry& g) const {
  int64_t at_once = int64_t{device_.multiprocessors} * blocks(g) / g.team;
  for (int size = 0; g.cluster && size < kClusterSizes; ++size)
    if (1 << size == g.team) at_once = int64_t{device_.clusters[size]} * blocks(g);
  return std::min(ceil_div(s_.samples, g.samples), at_once);
}

int Teams::samples_per_visit() const {
  const int64_t weights = 2 * s_.channels * s_.hidden * bytes_of(p_.weights.dtype);
  const int64_t sample = tensors_ * s_.channels * s_.pixels() * bytes_of(p_.dtype);
  int samples = 1;
  while (samples < kMostVisited && 2 * samples <= s_.samples && 4 * weights > samples * sample)
    samples *= 2;
  return samples;
}

double Teams::measured(const Measured& measured, const ResidentGeometry& g,
                       double estimated) const {
  const bool whole = !first_ || s_.pixels() % vector_ == 0;
  const double of_one = whole ? measured.whole : measured.rest;
  return measured.more + (g.samples > 1 ? measured.several : of_one) * estimated;
}

int Teams::fewest_blocks(int samples) const {
  const int64_t held = samples * s_.channels * s_.pixels() * bytes_of(p_.dtype);
  return static_cast<int>(ceil_div(held, device_.shared_per_block));
}

int64_t Teams::limit(int blocks) const {
  return blocks == 1 ? device_.shared_per_block : device_.shared_per_multiprocessor / blocks - 1024;
}

Copy Teams::copy_of(const ResidentGeometry& g) const {
  const bool pieces_pay = first_ || int64_t{g.channels} * bytes_of(p_.dtype) >= kBulkPiece;
  if (device_.capability >= kClusterCapability && pieces_pay) return Copy::kBulk;
  return device_.capability >= kAsyncCapability ? Copy::kAsync : Copy::kPlain;
}

bool Teams::set_slice(ResidentGeometry& g, const Candidate& c) const {
  g.cluster = c.cluster;
  g.team = c.team;
  g.threads = threads_ / c.blocks;
  g.samples = c.samples;
  const int64_t common = std::gcd(s_.pixels(), int64_t{vector_});
  const int64_t multiple = first_ ? vector_ / common : vector_;
  const int64_t groups = s_.channels / multiple;
  if (s_.channels % multiple || (g.cluster && g.team > groups)) return false;
  // A grid's team needs no more blocks than keep the largest share as it is.
  if (!g.cluster) g.team = static_cast<int>(ceil_div(groups, ceil_div(groups, g.team)));
  const int64_t channels = ceil_div(groups, g.team) * multiple;
  if (!first_ && g.team > 1 && channels * bytes_of(p_.dtype) < kSectorBytes) return false;
  if (channels * s_.pixels() * bytes_of(p_.dtype) > device_.shared_per_block) return false;
  g.channels = static_cast<int>(channels);
  g.channel_group = static_cast<int>(multiple);
  g.rows = static_cast<int>(first_ ? channels : s_.pixels());
  g.pitch = static_cast<int>(first_ ? s_.pixels() : channels);
  const int64_t step = first_ ? multiple : 1;
  const int64_t wanted = ceil_div(int64_t{g.samples} * g.rows, kWantedChunks);
  g.chunk = static_cast<int>(ceil_div(std::min<int64_t>(wanted, g.rows), step) * step);
  g.chunks = static_cast<int>(ceil_div(g.rows, g.chunk));
  const int64_t vectors = (first_ ? s_.pixels() : channels) / vector_;
  g.lanes = vectors >= 64 ? 32 : vectors >= 8 || first_ ? 8 : 4;
  g.copy = copy_of(g);
  g.teams = teams(g);
  return g.teams >= 1;
}

void Teams::set_boxes(ResidentGeometry& g, int64_t each) const {
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
  const double piece = share(g) * static_cast<double>(bytes_of(p_.dtype));
  const double used = first_ || g.team == 1 ? 1 : used_in_pieces(piece);
  return used * device_.bandwidth / std::max(std::min(all, teams * g.team), all / kMostShare);
}

double Teams::share(const ResidentGeometry& g) const {
  return static_cast<double>(s_.channels) / g.team;
}

double Teams::slice(const ResidentGeometry& g) const {
  return share(g) * static_cast<double>(g.samples * s_.pixels());
}

double Teams::weight_seconds(const ResidentGeometry& g, double rate) const {
  if (g.weight_bytes) return 0;  // they came while the first samples did
  const double weights = 2.0 * share(g) * static_cast<double>(s_.hidden);
  return weights * static_cast<double>(bytes_of(p_.weights.dtype)) / (rate * kCacheSpeed);
}

double Teams::product_seconds(const ResidentGeometry& g, int vectors) const {
  return 2.0 * share(g) * static_cast<double>(s_.hidden) * vectors * kProductSeconds;
}

double Teams::merge_seconds(const ResidentGeometry& g, int vectors, double rate) const {
  const double sums = static_cast<double>(s_.hidden) * vectors * g.team;
  return sums * sizeof(float) / (rate * kCacheSpeed);
}

double Teams::barrier_seconds(const ResidentGeometry& g, double barriers) {
  return barriers * (g.cluster ? kClusterBarrier : kPartBarrier);
}

double Teams::together(const ResidentGeometry& g, double teams, double memory, double waits) const {
  const bool shared = blocks(g) > 1 && teams * g.team > device_.multiprocessors;
  return shared ? std::max(2 * memory, memory + waits) : memory + waits;
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
