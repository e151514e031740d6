// The resident strategy: how many blocks hold how many samples, what of it fits, and how long it
// would take.
#include <algorithm>
#include <numeric>

#include "kernels/resident.h"
#include "plan_parts.h"

namespace cbam::cuda {
namespace {

// Bytes of a row of a slice where channels come last, at least: memory is slow in shorter pieces.
constexpr int64_t kShortestPiece = 64;
// Bytes of a row of a slice that is worth a bulk copy of its own: one thread after the other issues
// them, some 40 cycles each.
constexpr int64_t kBulkPiece = 1024;
// A slice is loaded in about so many chunks: while one drains, the next sample's begin to arrive.
constexpr int64_t kWantedChunks = 8;
constexpr int64_t kMostBands = 8;
// What a multiprocessor can be sent, in shares of the memory's bandwidth: some blocks do not use
// all of it.
constexpr double kMostShare = 2.5;

// The costs beside memory, all estimates until measured: a barrier of a cluster (0.5 us for 4
// blocks, 0.65 us for 8 on an H100) and of a whole grid; a walk over an element in shared memory by
// a multiprocessor; a product of the MLP; the launch and the first bytes.
constexpr double kClusterBarrier = 0.6e-6, kGridBarrier = 1.3e-6;
constexpr double kElementSeconds = 22e-12, kProductSeconds = 8e-12, kStartSeconds = 3e-6;
// A tap of the convolution, for a run of pixels of one thread.
constexpr double kTapSeconds = 10e-9;

// Blocks of a team, samples of a visit, blocks on a multiprocessor.
struct Candidate {
  bool cluster;
  int team, samples, blocks;
};

class Fitting {
 public:
  Fitting(const ForwardProblem& p, const DeviceLimits& device)
      : p_(p),
        s_(p.shape),
        device_(device),
        space_(space_of(p.shape)),
        vector_(elements_per_vector(p.dtype)),
        first_(p.strides.channels_first()) {}

  // Null where the slices do not fit, or not as many teams as one.
  std::optional<ResidentGeometry> geometry(const Candidate& c) const {
    ResidentGeometry g{};
    g.cluster = c.cluster;
    g.team = c.team;
    g.threads = kMostTeamThreads / c.blocks;
    g.samples = c.samples;
    if (!set_slice(g)) return std::nullopt;
    g.copy = copy_of(g);
    g.teams = teams(g);
    const int64_t limit = c.blocks == 1 ? device_.shared_per_block
                                        : device_.shared_per_multiprocessor / c.blocks - 1024;
    if (g.teams < 1 || !fit(g, limit)) return std::nullopt;
    return g;
  }

  // As many as there are visits, and as run at once.
  int64_t teams(const ResidentGeometry& g) const {
    const int64_t blocks = kMostTeamThreads / g.threads;  // of a multiprocessor
    int64_t at_once = device_.multiprocessors * blocks / g.team;
    for (int size = 0; g.cluster && size < kClusterSizes; ++size)
      if (1 << size == g.team) at_once = device_.clusters[size] * blocks;
    return std::min(ceil_div(s_.samples, g.samples), at_once);
  }

  // Parts of visits and of rounds count as parts, so that neighbouring batches get the same plan.
  double seconds(const ResidentGeometry& g) const {
    const double visits = std::max(1.0, static_cast<double>(s_.samples) / g.samples);
    const double at_once = std::min(visits, static_cast<double>(g.teams));
    return kStartSeconds + visits / at_once * round_seconds(g, at_once);
  }

 private:
  Copy copy_of(const ResidentGeometry& g) const {
    const bool pieces_pay = first_ || int64_t{g.channels} * bytes_of(p_.dtype) >= kBulkPiece;
    if (device_.capability >= kClusterCapability && pieces_pay) return Copy::kBulk;
    return device_.capability >= kAsyncCapability ? Copy::kAsync : Copy::kPlain;
  }

  // Of a visit of each of `teams` teams.
  double round_seconds(const ResidentGeometry& g, double teams) const {
    const double blocks = teams * g.team, all = device_.multiprocessors;
    const bool shared = kMostTeamThreads / g.threads > 1 && blocks > all;
    const double rate = device_.bandwidth / std::max(std::min(all, blocks), all / kMostShare);
    // Of one block, as if its multiprocessor had nothing else to do.
    const double slice = static_cast<double>(g.samples) * g.rows * g.pitch;
    const double weights = 2.0 * g.channels * static_cast<double>(s_.hidden);
    const double memory =
        2 * slice * static_cast<double>(bytes_of(p_.dtype)) / rate +
        weights * static_cast<double>(bytes_of(p_.weights.dtype)) / (rate * kCacheSpeed);
    const double barriers = 1.0 + 2.0 * static_cast<double>(ceil_div(s_.pixels(), g.band));
    const double products = 0.75 * weights * g.vectors();
    const int64_t runs = ceil_div(g.boxes.pixels(), int64_t{kRun} * g.threads) * g.boxes_each;
    const double taps = 2.0 * static_cast<double>(s_.taps() * runs);
    const double waits = barriers * (g.cluster ? kClusterBarrier : kGridBarrier) +
                         slice * kElementSeconds + products * kProductSeconds + taps * kTapSeconds;
    // Where two blocks share a multiprocessor, the one uses what the other waits.
    return shared ? std::max(2 * memory, memory + waits) : memory + waits;
  }

  // Which part of a sample a block holds; false where it would be none or no whole vectors.
  bool set_slice(ResidentGeometry& g) const {
    const int64_t common = std::gcd(s_.pixels(), int64_t{vector_});
    const int64_t multiple = first_ ? vector_ / common : vector_;
    const int64_t channels = ceil_div(ceil_div(s_.channels, g.team), multiple) * multiple;
    if (s_.channels % multiple || (g.team - 1) * channels >= s_.channels) return false;
    if (!first_ && g.team > 1 && channels * bytes_of(p_.dtype) < kShortestPiece) return false;
    if (channels * s_.pixels() * bytes_of(p_.dtype) > device_.shared_per_block) return false;
    g.channels = static_cast<int>(channels);
    g.rows = static_cast<int>(first_ ? channels : s_.pixels());
    g.pitch = static_cast<int>(first_ ? s_.pixels() : channels);
    const int64_t step = first_ ? multiple : 1;
    const int64_t wanted = ceil_div(int64_t{g.samples} * g.rows, kWantedChunks);
    g.chunk = static_cast<int>(ceil_div(std::min<int64_t>(wanted, g.rows), step) * step);
    g.chunks = static_cast<int>(ceil_div(g.rows, g.chunk));
    const int64_t vectors = (first_ ? s_.pixels() : channels) / vector_;
    g.lanes = vectors >= 64 ? 32 : vectors >= 8 || first_ ? 8 : 4;
    return true;
  }

  // Sets the boxes and bands with the fewest barriers that fit into `limit` bytes.
  bool fit(ResidentGeometry& g, int64_t limit) const {
    for (int64_t bands = 1; bands <= kMostBands; ++bands)
      for (int64_t each = 1; each <= 4; each *= 2) {
        g.band = static_cast<int>(ceil_div(s_.pixels(), bands));
        set_boxes(g, each);
        // Between bands each box stays staged, and no scratch is there to share a column.
        if (bands > 1 && (g.boxes_each > 1 || g.band < g.threads)) continue;
        const int64_t columns = int64_t{g.samples} * (first_ ? g.band : g.channels);
        g.groups = static_cast<int>(std::max<int64_t>(1, g.threads / columns));
        if (resident_shared_bytes(p_, g) > limit) continue;
        g.exchange = g.cluster ? 0 : exchange_bytes(g);
        return true;
      }
    return false;
  }

  // Boxes for every block of the team, `each` times: cut along the slowest dimension first.
  void set_boxes(ResidentGeometry& g, int64_t each) const {
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

  int64_t exchange_bytes(const ResidentGeometry& g) const {
    ExchangeCarver carver(nullptr);
    Exchange<float>(carver, g, static_cast<int>(s_.hidden), space_, p_.training());
    return carver.bytes();
  }

  const ForwardProblem& p_;
  const Shape& s_;
  const DeviceLimits& device_;
  Space space_;
  int vector_;
  bool first_;
};

template <class T>
int64_t shared_bytes_of(const ForwardProblem& p, const ResidentGeometry& g) {
  const int units = static_cast<int>(p.shape.hidden);
  SharedCarver carver(nullptr);
  ResidentShared<T, float>(carver, g, units, space_of(p.shape), p.training());
  if (g.cluster) Exchange<float>(carver, g, units, space_of(p.shape), p.training());
  return static_cast<int64_t>(carver.bytes());
}

// Whether slices of the tensor are whole vectors.
bool in_whole_vectors(const ForwardProblem& p, const Strides& strides, const void* data) {
  const View view(p, strides, data);
  const int vector = elements_per_vector(p.dtype);
  if (!view.vectors) return false;
  return view.channels_first ? view.row_stride == view.cols
                             : view.row_stride % vector == 0 && view.cols % vector == 0;
}

// Samples that share one reading of the MLP's weights, so that these stay a quarter of what a visit
// reads of x.
int samples_per_visit(const ForwardProblem& p) {
  const Shape& s = p.shape;
  const int64_t weights = 2 * s.channels * s.hidden * bytes_of(p.weights.dtype);
  const int64_t sample = s.channels * s.pixels() * bytes_of(p.dtype);
  int samples = 1;
  while (samples < kMostVisited && 2 * samples <= s.samples && 4 * weights > samples * sample)
    samples *= 2;
  return samples;
}

}  // namespace

int64_t resident_shared_bytes(const ForwardProblem& p, const ResidentGeometry& g) {
  return p.dtype == DType::kFloat32 ? shared_bytes_of<float>(p, g) : shared_bytes_of<Half>(p, g);
}

ResidentPlan plan_resident(const ForwardProblem& p, const DeviceLimits& device) {
  if (p.dtype == DType::kFloat64) return {{}, 0, "float64 is streamed"};
  if (device.bandwidth <= 0) return {{}, 0, "the device does not tell how fast its memory is"};
  if (!in_whole_vectors(p, p.strides, p.x) || !in_whole_vectors(p, p.out_strides, p.out))
    return {{}, 0, "rows of x or out are no whole vectors of 16 bytes, or have gaps"};
  const Fitting fitting(p, device);
  ResidentPlan best;
  const auto consider = [&](const Candidate& candidate) {
    const auto g = fitting.geometry(candidate);
    if (!g) return;
    const double seconds = fitting.seconds(*g);
    if (best.geometry && seconds >= best.seconds) return;
    best = {g, seconds, g->cluster ? "clusters hold the samples" : "the whole grid holds samples"};
  };
  const auto consider_all = [&](int samples) {
    for (int blocks = 1; blocks <= 2; ++blocks)
      for (int size = 0; size < kClusterSizes; ++size)
        if (device.clusters[size]) consider({true, 1 << size, samples, blocks});
    if (best.geometry && best.geometry->cluster) return;
    for (int team = 1; team <= device.multiprocessors; team *= 2)
      consider({false, team, samples, 1});
  };
  const int samples = samples_per_visit(p);
  consider_all(samples);
  if (samples > 1) consider_all(1);
  if (!best.geometry) best.reason = "a sample does not fit on the chip";
  return best;
}

ResidentPlan for_batch(ResidentPlan plan, const ForwardProblem& p, const DeviceLimits& device) {
  if (!plan.geometry) return plan;
  const Fitting fitting(p, device);
  plan.geometry->teams = fitting.teams(*plan.geometry);
  plan.seconds = fitting.seconds(*plan.geometry);
  return plan;
}

Grid resident_grid(const ForwardPlan& plan, const ForwardProblem& p) {
  const ResidentGeometry& g = *plan.resident;
  Grid grid;
  grid.blocks = g.teams * g.team;
  grid.threads = g.threads;
  grid.shared_bytes = resident_shared_bytes(p, g);
  grid.shared_limit = plan.shared_limit;
  grid.cluster = g.cluster ? g.team : 1;
  grid.cooperative = !g.cluster;
  return grid;
}

}  // namespace cbam::cuda
