#include "plan.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace cbam::cuda {
namespace {

// A part of a reduction is at least this long, so that its partial result stays small beside what
// it read, and at most so long, so that a sum keeps its digits and the factor fits into shared
// memory.
constexpr int64_t kShortestColumnPart = 256;
constexpr int64_t kShortestRowPart = 4096;
constexpr int64_t kLongestPart = 4096;
constexpr int64_t kLongestUnscaledRowPart = 1 << 16;
// Rows of a block that share one reading of the factor, and vectors side by side that do.
constexpr int kRowsPerFactor = 64;
constexpr int kFewestVectorsPerFactor = 16;
// Channels of a block in the last pass, which reads the maps and computes the spatial gate for each
// chunk again: at least so many, and no more chunks than keep those maps under this share of x.
constexpr int kFewestChannels = 128;
constexpr double kMapShare = 0.02;
// Pixels of a box in the last pass: smaller boxes fill the device, larger ones have less halo.
constexpr int kMostPixels = 1024, kFewestPixels = 256;
// Bytes of x in a row of the box: memory is slow in short pieces (on an H100, pieces of 32 bytes
// load at half the speed).
constexpr int64_t kNarrowest = 256;
constexpr int64_t kNeverIfAvoidable = int64_t{1} << 48;
// A launch may use this much shared memory without asking.
constexpr int64_t kSharedWithoutOptIn = 48 * 1024;

// The cost of grouping: every launch waits for the one before (1.3 us on an H100 in a CUDA graph),
// and the cache is no more than this many times as fast as memory (5.5 against 3.0 TB/s there).
constexpr double kLaunchSeconds = 1.3e-6;
constexpr double kCacheSpeed = 1.8;
constexpr double kCacheShare = 0.4;
constexpr int kLaunches = 5;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int elements_per_vector(DType dtype) { return static_cast<int>(16 / bytes_of(dtype)); }

// One tensor of x's size as the kernels see it.
struct View {
  int64_t rows, cols, row_stride, sample_stride;
  bool aligned;  // every sample starts on a multiple of 16 bytes

  View(const ForwardProblem& p, const Strides& strides, const void* data) {
    const bool first = p.strides.channels_first();
    rows = first ? p.shape.channels : p.shape.pixels();
    cols = first ? p.shape.pixels() : p.shape.channels;
    row_stride = rows == 1 ? cols : first ? strides.channel : strides.pixel;
    sample_stride = strides.sample;
    aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
              (p.shape.samples == 1 || sample_stride % elements_per_vector(p.dtype) == 0);
  }
};

// How columns of a view can be read.
struct ColumnAccess {
  Access access = Access::kScalar;
  int period, row_group = 1;

  ColumnAccess(const View& view, int vector) : period(static_cast<int>(view.cols)) {
    if (!view.aligned || vector == 1) return;
    if (view.row_stride % vector == 0 && view.cols % vector == 0) {
      access = Access::kVector;
      period = static_cast<int>(view.cols / vector);
      return;
    }
    const int64_t common = std::gcd(view.cols, static_cast<int64_t>(vector));
    if (view.row_stride != view.cols || view.cols / common > kThreads ||
        view.rows % (vector / common))
      return;
    access = Access::kPacked;
    period = static_cast<int>(view.cols / common);
    row_group = static_cast<int>(vector / common);
  }
  int elements(int vector) const { return access == Access::kScalar ? 1 : vector; }
};

// Blocks of kThreads that fill a quarter of the device's threads: with four loads of 16 bytes in
// flight for each, 32 KB a multiprocessor of an H100, where 23 KB saturate its memory.
int64_t wanted_blocks(const DeviceLimits& device) {
  return int64_t{device.multiprocessors} * device.threads_per_multiprocessor / kThreads / 4;
}

// Sets splits and span so that there are enough blocks, parts are no shorter than `shortest`, no
// longer than `longest`, and start on multiples of `multiple`.
void split(ReductionGeometry& g, int64_t count, int64_t blocks, int64_t wanted, int64_t shortest,
           int64_t longest, int64_t multiple) {
  const int64_t most = std::max<int64_t>(1, count / shortest);
  const int64_t splits =
      std::max(std::min(ceil_div(wanted, blocks), most), ceil_div(count, longest));
  g.span = static_cast<int>(ceil_div(ceil_div(count, splits), multiple) * multiple);
  g.splits = static_cast<int>(ceil_div(count, g.span));
}

ReductionGeometry along_rows(const View& view, const ForwardProblem& p, int64_t samples,
                             bool scaled, int64_t wanted) {
  ReductionGeometry g{};
  const int vector = elements_per_vector(p.dtype);
  const int64_t vectors = view.cols / vector;
  g.along_rows = true;
  g.row_group = 1;
  const bool few_rows = samples * view.rows < wanted * (kThreads / 32);
  const int64_t enough_for_a_block = few_rows ? kThreads : 4 * kThreads;
  g.lanes = vectors >= enough_for_a_block ? kThreads : vectors >= 64 ? 32 : 8;
  const int at_once = kThreads / g.lanes;
  g.tile = scaled ? std::max(at_once, kRowsPerFactor) : at_once;
  g.tiles = static_cast<int>(ceil_div(view.rows, g.tile));
  split(g, view.cols, samples * g.tiles, wanted, kShortestRowPart,
        scaled ? kLongestPart : kLongestUnscaledRowPart, vector);
  return g;
}

ReductionGeometry down_columns(const View& view, const ForwardProblem& p, int64_t samples,
                               bool scaled, int64_t wanted) {
  ReductionGeometry g{};
  const ColumnAccess access(view, elements_per_vector(p.dtype));
  g.access = access.access;
  g.period = access.period;
  g.row_group = access.row_group;
  const int fewest = scaled ? kFewestVectorsPerFactor : 8;
  g.tile = g.access == Access::kPacked ? g.period : std::min(g.period, 32);
  if (g.access != Access::kPacked)
    while (g.tile > fewest && samples * ceil_div(g.period, g.tile) < wanted) g.tile /= 2;
  g.tiles = static_cast<int>(ceil_div(g.period, g.tile));
  split(g, view.rows, samples * g.tiles, wanted, kShortestColumnPart, kLongestPart, g.row_group);
  return g;
}

// Threads side by side over `vectors` vectors of a row: as many as leave the fewest idle.
int threads_side_by_side(int64_t vectors) {
  int best = 1;
  double best_share = 0;
  for (int threads = 1; threads <= std::min<int64_t>(vectors, kThreads); ++threads) {
    const double covered = static_cast<double>(vectors) / (ceil_div(vectors, threads) * threads);
    const double share = covered * (kThreads / threads * threads) / kThreads;
    if (share >= best_share) {
      best = threads;
      best_share = share;
    }
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

// The box, in pixels, of a block of the last pass.
class BoxSearch {
 public:
  BoxSearch(const ForwardProblem& problem, ScaleGeometry geometry, int64_t limit)
      : p_(problem), s_(problem.shape), g_(geometry), limit_(limit) {}

  // The box of at most `most_pixels` that reads the least halo; a smaller one where none fits.
  bool run(int most_pixels) {
    best_cost_ = 0;
    for (int64_t depth : extents(s_.depth))
      for (int64_t height : extents(s_.height))
        for (int64_t width : extents(s_.width))
          if (depth * height * width <= most_pixels) consider(depth, height, width);
    return best_cost_ > 0;
  }
  const ScaleGeometry& best() const { return best_; }
  // Pixels of the maps that all boxes of a sample read, of both maps together.
  static int64_t read(const ScaleGeometry& g, const Shape& s) {
    return 2 * g.boxes() * (g.box_depth + s.kernel_depth - 1) *
           (g.box_height + s.kernel_height - 1) * (g.box_width + s.kernel_width - 1);
  }

 private:
  static std::vector<int64_t> extents(int64_t full) {
    std::vector<int64_t> found{full};
    for (int64_t e = 1; e < full && e <= kMostPixels; e *= 2) found.push_back(e);
    return found;
  }

  // Whether every vector of the box lies in one piece and on a multiple of 16 bytes.
  bool suits(int64_t depth, int64_t height, int64_t width) const {
    const bool whole = depth == s_.depth && height == s_.height && width == s_.width;
    if (g_.access == Access::kPacked) return whole;
    if (g_.access == Access::kScalar || !p_.strides.channels_first()) return true;
    const int vector = elements_per_vector(p_.dtype);
    if (s_.width % vector == 0) return width % vector == 0;
    if (width != s_.width) return false;
    const int64_t plane = s_.height * s_.width;
    if (height == s_.height) return whole || depth * plane % vector == 0;
    return depth == 1 && height * width % vector == 0 && (s_.depth == 1 || plane % vector == 0);
  }

  void consider(int64_t depth, int64_t height, int64_t width) {
    if (!suits(depth, height, width)) return;
    ScaleGeometry g = g_;
    g.box_depth = static_cast<int>(depth);
    g.box_height = static_cast<int>(height);
    g.box_width = static_cast<int>(width);
    g.boxes_depth = static_cast<int>(ceil_div(s_.depth, depth));
    g.boxes_height = static_cast<int>(ceil_div(s_.height, height));
    g.boxes_width = static_cast<int>(ceil_div(s_.width, width));
    if (needed(g) > limit_) return;
    const bool narrow =
        p_.strides.channels_first() && width != s_.width && width * bytes_of(p_.dtype) < kNarrowest;
    const int64_t cost = read(g, s_) + (narrow ? kNeverIfAvoidable : 0);
    const bool wider = cost == best_cost_ && width > best_.box_width;
    if (best_cost_ > 0 && cost >= best_cost_ && !wider) return;
    best_ = g;
    best_cost_ = cost;
  }

  int64_t needed(const ScaleGeometry& g) const {
    const auto bytes = [&](auto shared) {
      return shared_bytes<typename decltype(shared)::type>(g, s_.kernel_depth, s_.kernel_height,
                                                           s_.kernel_width);
    };
    return p_.dtype == DType::kFloat64 ? bytes(Type<ScaleShared<double>>())
                                       : bytes(Type<ScaleShared<float>>());
  }

  const ForwardProblem& p_;
  const Shape& s_;
  ScaleGeometry g_, best_{};
  int64_t limit_, best_cost_ = 0;
};

// The best box for `g`, without asking for more shared memory where that is possible.
std::optional<ScaleGeometry> find_box(const ForwardProblem& p, const ScaleGeometry& g,
                                      int64_t samples, int64_t most_chunks,
                                      const DeviceLimits& device) {
  for (const int64_t limit : {kSharedWithoutOptIn, device.shared_per_block}) {
    BoxSearch search(p, g, limit);
    bool found = false;
    for (int pixels = kMostPixels; pixels > 0; pixels /= 2) {
      if (!search.run(pixels)) continue;
      found = true;
      const int64_t blocks = samples * search.best().boxes() * most_chunks;
      if (pixels <= kFewestPixels || blocks >= wanted_blocks(device)) break;
    }
    if (found) return search.best();
  }
  return std::nullopt;
}

ScaleGeometry last_pass(const ForwardProblem& p, int64_t samples, int map_splits,
                        const DeviceLimits& device) {
  const Shape& s = p.shape;
  const int vector = elements_per_vector(p.dtype);
  const bool first = p.strides.channels_first();
  const ColumnAccess in(View(p, p.strides, p.x), vector),
      out(View(p, p.out_strides, p.out), vector);
  ScaleGeometry g{};
  g.access = in.access == out.access ? in.access : Access::kScalar;
  g.chunk = static_cast<int>(std::min<int64_t>(s.channels, kLongestPart));
  const auto most_chunks = [&] {
    const bool whole = !first && g.access == Access::kPacked;
    return whole ? 1 : std::max(ceil_div(s.channels, g.chunk), s.channels / kFewestChannels);
  };
  auto boxed = find_box(p, g, samples, most_chunks(), device);
  if (!boxed && g.access != Access::kScalar) {
    g.access = Access::kScalar;  // the boxes whose vectors lie in one piece are all too large
    boxed = find_box(p, g, samples, most_chunks(), device);
  }
  if (!boxed)
    throw std::invalid_argument(
        "conv_weight: expected a kernel whose window fits into the " +
        std::to_string(device.shared_per_block) + " bytes of shared memory of " + device.name +
        ", got " + std::to_string(s.kernel_depth) + "x" + std::to_string(s.kernel_height) + "x" +
        std::to_string(s.kernel_width));
  g = *boxed;
  const bool packed = g.access == Access::kPacked;
  const int elements = g.access == Access::kScalar ? 1 : vector;
  g.period = in.period;
  g.row_group = packed ? in.row_group : 1;
  const int64_t blocks = samples * g.boxes(), multiple = first ? g.row_group : elements;
  const double x_bytes = static_cast<double>(s.channels * s.pixels() * bytes_of(p.dtype));
  const double map_bytes =
      static_cast<double>(BoxSearch::read(g, s) * map_splits * bytes_of_accumulator(p.dtype));
  const auto affordable = static_cast<int64_t>(kMapShare * x_bytes / map_bytes);
  const int64_t fewest = ceil_div(s.channels, g.chunk);
  const int64_t most = std::max(fewest, std::min(most_chunks(), affordable));
  const int64_t chunks = std::clamp(ceil_div(wanted_blocks(device), blocks), fewest, most);
  g.chunk = packed && !first
                ? static_cast<int>(s.channels)
                : static_cast<int>(ceil_div(ceil_div(s.channels, chunks), multiple) * multiple);
  g.chunks = static_cast<int>(ceil_div(s.channels, g.chunk));
  g.tile = threads_side_by_side(packed  ? g.period
                                : first ? g.pixels() / elements
                                        : g.chunk / elements);
  return g;
}

// Grouping pays where reading a group's x again from the cache saves more than its launches cost.
// Below kSamplesPerWalk samples it would also read the MLP's weights more often.
Group group_of(const ForwardProblem& p, const DeviceLimits& device) {
  const int64_t sample = p.shape.channels * p.shape.pixels() * bytes_of(p.dtype);
  const auto room = static_cast<int64_t>(kCacheShare * static_cast<double>(device.l2_bytes));
  const int64_t fitting = room / sample;
  if (fitting >= p.shape.samples) return {p.shape.samples, true};
  const int64_t most = fitting / kSamplesPerWalk * kSamplesPerWalk;
  if (most == 0) return {p.shape.samples, false};
  const int64_t groups = ceil_div(p.shape.samples, most);
  const int64_t samples =
      ceil_div(ceil_div(p.shape.samples, groups), kSamplesPerWalk) * kSamplesPerWalk;
  const double pass = static_cast<double>(sample * p.shape.samples) / device.bandwidth;
  const double saved = 2 * pass * (1 - 1 / kCacheSpeed);
  const double cost = static_cast<double>(groups - 1) * kLaunches * kLaunchSeconds;
  return saved > cost ? Group{samples, true} : Group{p.shape.samples, false};
}

int64_t padded(int64_t bytes) { return ceil_div(bytes, 16) * 16; }

template <class A>
int64_t shared_bytes(const ReductionGeometry& g, bool scaled, DType dtype) {
  if (g.along_rows) return shared_bytes<RowShared<A>>(g, scaled);
  const int elements = g.access == Access::kScalar ? 1 : elements_per_vector(dtype);
  return shared_bytes<ColumnShared<A>>(g, scaled, kThreads / g.tile * g.tile * elements);
}

template <class A>
ForwardGrids grids_of(const ForwardPlan& plan, const ForwardProblem& p, int64_t samples) {
  const Shape& s = p.shape;
  const int64_t walks = ceil_div(samples, kSamplesPerWalk);
  const int units = plan.hidden_threads / 32 * kUnitsPerWarp;
  const ScaleGeometry& g = plan.scale;
  return {
      {samples * plan.pool.blocks_per_sample(), kThreads,
       shared_bytes<A>(plan.pool, false, p.dtype)},
      {walks * ceil_div(s.hidden, units), plan.hidden_threads, shared_bytes<HiddenShared<A>>()},
      {walks * ceil_div(s.channels, kGateChannels), kGateChannels, shared_bytes<GateShared<A>>()},
      {samples * plan.maps.blocks_per_sample(), kThreads,
       shared_bytes<A>(plan.maps, true, p.dtype)},
      {samples * g.boxes() * g.chunks, kThreads,
       shared_bytes<ScaleShared<A>>(g, s.kernel_depth, s.kernel_height, s.kernel_width)},
  };
}

}  // namespace

ForwardPlan plan(const ForwardProblem& p, const DeviceLimits& device) {
  const Shape& s = p.shape;
  const View x(p, p.strides, p.x);
  const int64_t wanted = wanted_blocks(device);
  ForwardPlan plan{};
  plan.group = group_of(p, device);
  const int64_t samples = plan.group.samples;
  const bool first = p.strides.channels_first();
  plan.pool =
      first ? along_rows(x, p, samples, false, wanted) : down_columns(x, p, samples, false, wanted);
  plan.maps =
      first ? down_columns(x, p, samples, true, wanted) : along_rows(x, p, samples, true, wanted);
  plan.maps.reverse = true;  // starts with what the pool read last
  plan.scale = last_pass(p, samples, plan.maps.splits, device);
  plan.hidden_threads =
      static_cast<int>(32 * std::min<int64_t>(kThreads / 32, ceil_div(s.hidden, kUnitsPerWarp)));
  return plan;
}

ForwardGrids grids(const ForwardPlan& plan, const ForwardProblem& p, int64_t samples) {
  return p.dtype == DType::kFloat64 ? grids_of<double>(plan, p, samples)
                                    : grids_of<float>(plan, p, samples);
}

ForwardScratch scratch(const ForwardPlan& plan, const ForwardProblem& p) {
  const int64_t acc = bytes_of_accumulator(p.dtype), samples = plan.group.samples;
  const int64_t pooled = samples * plan.pool.splits * p.shape.channels;
  const int64_t mapped = samples * plan.maps.splits * p.shape.pixels();
  const bool merges_pool = plan.pool.splits > 1, merges_maps = plan.maps.splits > 1;
  return {merges_pool ? padded(pooled * 2 * acc) : 0,
          merges_pool && p.training() ? padded(pooled * 4) : 0, padded(mapped * 2 * acc),
          merges_maps && p.training() ? padded(mapped * 4) : 0};
}

}  // namespace cbam::cuda
