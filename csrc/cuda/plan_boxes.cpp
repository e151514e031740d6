// How the pixels of an image are cut into boxes whose maps, with a halo, fit into shared memory.
#include <algorithm>
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

std::vector<int64_t> extents(int64_t full) {
  std::vector<int64_t> found{full};
  for (int64_t e = 1; e < full && e <= kMostPixels; e *= 2) {
    found.push_back(e);
    const int64_t even = ceil_div(full, ceil_div(full, e));  // the last box no smaller
    if (even != e) found.push_back(even);
  }
  return found;
}

// Whether every vector of the box lies in one piece and on a multiple of 16 bytes.
bool suits(const ForwardProblem& p, Access access, const BoxGeometry& g) {
  const Shape& s = p.shape;
  const bool whole = g.boxes() == 1;
  if (access == Access::kPacked) return whole;
  if (access == Access::kScalar || !p.strides.channels_first()) return true;
  const int vector = elements_per_vector(p.dtype);
  if (s.width % vector == 0) return g.box_width % vector == 0;
  if (g.box_width != s.width) return false;
  const int64_t plane = s.height * s.width;
  if (g.box_height == s.height) return whole || g.box_depth * plane % vector == 0;
  return g.box_depth == 1 && g.box_height * s.width % vector == 0 &&
         (s.depth == 1 || plane % vector == 0);
}

BoxGeometry boxes_of(const Shape& s, int64_t depth, int64_t height, int64_t width) {
  return {static_cast<int>(depth),
          static_cast<int>(height),
          static_cast<int>(width),
          static_cast<int>(ceil_div(s.depth, depth)),
          static_cast<int>(ceil_div(s.height, height)),
          static_cast<int>(ceil_div(s.width, width))};
}

// The box of at most `most_pixels` that stages the least.
std::optional<BoxGeometry> cheapest(const BoxSearch& wanted, Access access, int64_t limit,
                                    int most_pixels) {
  const ForwardProblem& p = wanted.problem;
  const Shape& s = p.shape;
  std::optional<BoxGeometry> best;
  int64_t best_cost = 0;
  for (int64_t depth : extents(s.depth))
    for (int64_t height : extents(s.height))
      for (int64_t width : extents(s.width)) {
        if (depth * height * width > most_pixels) continue;
        const BoxGeometry g = boxes_of(s, depth, height, width);
        if (!suits(p, access, g) || wanted.shared_bytes(g) > limit) continue;
        const bool narrow = p.strides.channels_first() && width != s.width &&
                            width * bytes_of(p.dtype) < kNarrowest;
        const int64_t cost = staged_values(g, s) + (narrow ? kNeverIfAvoidable : 0);
        const bool wider = best && cost == best_cost && width > best->box_width;
        if (best && cost >= best_cost && !wider) continue;
        best = g;
        best_cost = cost;
      }
  return best;
}

}  // namespace

int64_t staged_values(const BoxGeometry& g, const Shape& s) {
  return 2 * g.boxes() * (g.box_depth + s.kernel_depth - 1) * (g.box_height + s.kernel_height - 1) *
         (g.box_width + s.kernel_width - 1);
}

std::optional<BoxGeometry> BoxSearch::find(Access access) const {
  for (const int64_t limit : {kSharedWithoutOptIn, device.shared_per_block}) {
    std::optional<BoxGeometry> found;
    for (int pixels = kMostPixels; pixels >= kFewestPixels; pixels /= 2) {
      const auto smaller = cheapest(*this, access, limit, pixels);
      if (!smaller) break;
      found = smaller;
      if (blocks_per_box * found->boxes() >= wanted_blocks(device)) break;
    }
    if (!found) found = cheapest(*this, access, limit, kExceptionalPixels);
    if (found) return found;
  }
  return std::nullopt;
}

std::invalid_argument BoxSearch::no_box() const {
  const Shape& s = problem.shape;
  return std::invalid_argument(
      "conv_weight: expected a kernel whose window fits into the " +
      std::to_string(device.shared_per_block) + " bytes of shared memory of " + device.name +
      ", got " + std::to_string(s.kernel_depth) + "x" + std::to_string(s.kernel_height) + "x" +
      std::to_string(s.kernel_width));
}

}  // namespace cbam::cuda
