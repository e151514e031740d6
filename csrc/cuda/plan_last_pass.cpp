// The geometry of the last pass: boxes of pixels whose maps, with a halo, are staged in shared
// memory, and chunks of channels.
#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan_parts.h"

namespace cbam::cuda {
namespace {

// Pixels of a box: large ones have less halo, small ones fill the device; the last size is for
// images whose rows are no whole number of vectors, where only many rows together are.
constexpr int kMostPixels = 1024, kFewestPixels = 256, kExceptionalPixels = 8192;
// Bytes of x in a row of the box: memory is slow in short pieces (on an H100, pieces of 32 bytes
// load at half the speed).
constexpr int64_t kNarrowest = 256;
constexpr int64_t kNeverIfAvoidable = int64_t{1} << 48;
// Channels whose gates a block holds, at most.
constexpr int64_t kMostChannels = 4096;
// Vectors of a chunk of channels where channels come last: 128 bytes of every pixel.
constexpr int kChunkVectors = 8;

// Values of the maps that all boxes of a sample stage.
int64_t staged_values(const ScaleGeometry& g, const Shape& s) {
  return 2 * g.boxes() * (g.box_depth + s.kernel_depth - 1) * (g.box_height + s.kernel_height - 1) *
         (g.box_width + s.kernel_width - 1);
}

class BoxSearch {
 public:
  BoxSearch(const ForwardProblem& problem, const ScaleGeometry& geometry, const SharedOfBox& needed,
            int64_t shared_limit)
      : p_(problem), s_(problem.shape), g_(geometry), needed_(needed), limit_(shared_limit) {}

  // The box of at most `most_pixels` that stages the least; false where none fits.
  bool run(int most_pixels) {
    best_cost_ = 0;
    for (int64_t depth : extents(s_.depth))
      for (int64_t height : extents(s_.height))
        for (int64_t width : extents(s_.width))
          if (depth * height * width <= most_pixels) consider(depth, height, width);
    return best_cost_ > 0;
  }
  const ScaleGeometry& best() const { return best_; }

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
    if (needed_(g) > limit_) return;
    const bool narrow =
        p_.strides.channels_first() && width != s_.width && width * bytes_of(p_.dtype) < kNarrowest;
    const int64_t cost = staged_values(g, s_) + (narrow ? kNeverIfAvoidable : 0);
    const bool wider = cost == best_cost_ && width > best_.box_width;
    if (best_cost_ > 0 && cost >= best_cost_ && !wider) return;
    best_ = g;
    best_cost_ = cost;
  }

  const ForwardProblem& p_;
  const Shape& s_;
  ScaleGeometry g_, best_{};
  const SharedOfBox& needed_;
  int64_t limit_, best_cost_ = 0;
};

std::optional<ScaleGeometry> search(const ForwardProblem& p, const ScaleGeometry& g,
                                    int64_t samples, int64_t most_chunks,
                                    const DeviceLimits& device, const SharedOfBox& needed) {
  for (const int64_t limit : {kSharedWithoutOptIn, device.shared_per_block}) {
    BoxSearch search(p, g, needed, limit);
    std::optional<ScaleGeometry> found;
    for (int pixels = kMostPixels; pixels >= kFewestPixels; pixels /= 2) {
      if (!search.run(pixels)) break;
      found = search.best();
      if (samples * found->boxes() * most_chunks >= wanted_blocks(device)) break;
    }
    if (!found && search.run(kExceptionalPixels)) found = search.best();
    if (found) return found;
  }
  return std::nullopt;
}

[[noreturn]] void fail(const ForwardProblem& p, const DeviceLimits& device) {
  const Shape& s = p.shape;
  throw std::invalid_argument(
      "conv_weight: expected a kernel whose window fits into the " +
      std::to_string(device.shared_per_block) + " bytes of shared memory of " + device.name +
      ", got " + std::to_string(s.kernel_depth) + "x" + std::to_string(s.kernel_height) + "x" +
      std::to_string(s.kernel_width));
}

// Sets how many channels a block takes.
void set_chunk(ScaleGeometry& g, const ForwardProblem& p, int64_t samples, int map_splits,
               const DeviceLimits& device) {
  const Shape& s = p.shape;
  const Pieces& pieces = pieces_of(p, samples);
  const double x_bytes = static_cast<double>(s.channels * s.pixels() * bytes_of(p.dtype));
  const double map_bytes =
      static_cast<double>(staged_values(g, s) * map_splits * bytes_of_accumulator(p.dtype));
  const int64_t fewest = ceil_div(s.channels, kMostChannels);
  const int64_t most =
      std::max(fewest, std::min(s.channels / pieces.channels,
                                static_cast<int64_t>(pieces.map_share * x_bytes / map_bytes)));
  const int64_t chunks =
      std::clamp(ceil_div(wanted_blocks(device), samples * g.boxes()), fewest, most);
  const int64_t multiple = p.strides.channels_first() ? g.row_group
                           : g.access == Access::kVector
                               ? kChunkVectors * elements_per_vector(p.dtype)
                               : 1;
  const int64_t chunk = ceil_div(ceil_div(s.channels, chunks), multiple) * multiple;
  g.chunk = static_cast<int>(std::min(chunk, s.channels));
  g.chunks = static_cast<int>(ceil_div(s.channels, g.chunk));
}

}  // namespace

int threads_along(int64_t vectors) {
  int best = 1;
  double best_share = 0;
  const auto most = static_cast<int>(std::min<int64_t>(vectors, kThreads));
  for (int threads = std::min(most, 32); threads <= most; ++threads) {
    const double covered =
        static_cast<double>(vectors) / static_cast<double>(ceil_div(vectors, threads) * threads);
    const double share = covered * (kThreads / threads * threads) / kThreads;
    if (share < best_share) continue;
    best = threads;
    best_share = share;
  }
  return best;
}

ScaleGeometry find_box(const ForwardProblem& p, ScaleGeometry g, int64_t samples,
                       int64_t most_chunks, const DeviceLimits& device, const SharedOfBox& needed) {
  auto found = search(p, g, samples, most_chunks, device, needed);
  if (!found && g.access != Access::kScalar) {
    g.access = Access::kScalar;  // the boxes whose vectors lie in one piece are all too large
    found = search(p, g, samples, most_chunks, device, needed);
  }
  if (!found) fail(p, device);
  return *found;
}

ScaleGeometry plan_last_pass(const ForwardProblem& p, int64_t samples, int map_splits,
                             const DeviceLimits& device) {
  const Shape& s = p.shape;
  const int vector = elements_per_vector(p.dtype);
  const bool first = p.strides.channels_first();
  const ColumnAccess in(View(p, p.strides, p.x), vector);
  const ColumnAccess out(View(p, p.out_strides, p.out), vector);
  const int64_t most_chunks = std::max<int64_t>(1, s.channels / pieces_of(p, samples).channels);
  ScaleGeometry g{};
  g.access = in.access == out.access ? in.access : Access::kScalar;
  g.chunk = static_cast<int>(std::min(s.channels, kMostChannels));  // what room they may need
  g = find_box(p, g, samples, most_chunks, device, [&](const ScaleGeometry& box) {
    return p.dtype == DType::kFloat64 ? shared_bytes<ScaleShared<double>>(
                                            box, s.kernel_depth, s.kernel_height, s.kernel_width)
                                      : shared_bytes<ScaleShared<float>>(
                                            box, s.kernel_depth, s.kernel_height, s.kernel_width);
  });
  const bool packed = g.access == Access::kPacked;
  g.period = in.period;
  g.row_group = packed ? in.row_group : 1;
  if (packed && !first) {
    g.chunk = static_cast<int>(s.channels);
    g.chunks = 1;
  } else {
    set_chunk(g, p, samples, map_splits, device);
  }
  const int elements = g.access == Access::kScalar ? 1 : vector;
  g.threads_along = threads_along(packed  ? g.period
                                  : first ? g.pixels() / elements
                                          : g.chunk / elements);
  return g;
}

}  // namespace cbam::cuda
