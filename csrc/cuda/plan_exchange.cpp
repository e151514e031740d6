// What the blocks of a team tell each other through global memory, and what boxes read of maps.
#include <algorithm>

#include "plan_parts.h"

namespace cbam::cuda {
namespace {

// How many positions are read from `first` to `last` with a halo, none outside the extent.
int64_t with_halo(int64_t extent, int64_t first, int64_t last, int64_t kernel) {
  return std::min(last + kernel / 2, extent - 1) - std::max<int64_t>(first - kernel / 2, 0) + 1;
}

// The same of all boxes that an extent is cut into.
int64_t read_with_halo(int64_t extent, int64_t box, int64_t kernel) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < extent; begin += box)
    total += with_halo(extent, begin, std::min(begin + box, extent) - 1, kernel);
  return total;
}

// How many pixels a box reads with its halo.
int64_t read_by_box(const PixelBox& box, const Space& s) {
  return with_halo(s.depth, box.z, box.z + box.depth - 1, s.kernel_depth) *
         with_halo(s.height, box.y, box.y + box.height - 1, s.kernel_height) *
         with_halo(s.width, box.x, box.x + box.width - 1, s.kernel_width);
}

constexpr int64_t kAcc = sizeof(float);

Exchanged of_channels(const ResidentForwardGeometry& g, const Shape& s, int64_t index) {
  const int64_t each = 2 * kAcc + index;
  return {g.team * s.pixels() * each + s.pixels() * kAcc,
          g.team * (s.pixels() * kAcc + read_by_team(g, s) * each)};
}
Exchanged of_pixels(const ResidentForwardGeometry& g, const Shape& s, int64_t index) {
  const int64_t pools = g.team * s.channels * (2 * kAcc + index);
  return {pools + (s.channels + 2 * s.pixels()) * kAcc,
          pools + (g.team * s.channels + 2 * read_by_team(g, s)) * kAcc};
}

Exchanged of_channels(const ResidentBackwardGeometry& g, const Shape& s) {
  const int64_t each_pixel = 3 * kAcc + 4;
  return {(g.team * kAcc + each_pixel) * s.pixels(),
          g.team * (s.pixels() * each_pixel + read_by_team(g, s) * kAcc)};
}
Exchanged of_pixels(const ResidentBackwardGeometry& g, const Shape& s) {
  return {(s.pixels() + (g.team + 2) * s.channels) * kAcc,
          (read_by_team(g, s) + 3 * g.team * s.channels) * kAcc};
}

Exchanged times(int64_t samples, const Exchanged& each) {
  return {samples * each.written, samples * each.read};
}

}  // namespace

// How many pixels all boxes of an image read, each with its halo.
int64_t read_by_boxes(const BoxGeometry& g, const Shape& s) {
  return read_with_halo(s.depth, g.box_depth, s.kernel_depth) *
         read_with_halo(s.height, g.box_height, s.kernel_height) *
         read_with_halo(s.width, g.box_width, s.kernel_width);
}

int64_t read_by_team(const ResidentGeometry& g, const Shape& s) {
  if (g.split == Split::kChannels) return read_by_boxes(g.boxes, s);
  const Space space = space_of(s);
  const Shares shares(space.pixels(), g.pixel_group, g.team);
  int64_t read = 0;
  for (int rank = 0; rank < g.team; ++rank)
    read += read_by_box(box_around(space, shares.first(rank), shares.count(rank)), space);
  return read;
}

Exchanged exchanged_units(const ResidentGeometry& g, const Shape& s, int sums, int results,
                          int64_t visits, int64_t samples) {
  const int64_t unit = s.hidden * kAcc, all_sums = g.team * sums * unit;
  if (!g.shares_units) return {visits * g.mlp_samples() * all_sums, samples * g.team * all_sums};
  const int64_t all_results = visits * g.mlp_samples() * results * unit;
  return {visits * g.mlp_samples() * all_sums + all_results,
          samples * all_sums + g.team * all_results};
}

Exchanged exchanged_maps(const ResidentForwardGeometry& g, const ForwardProblem& p,
                         int64_t samples) {
  const int64_t index = p.training() ? 4 : 0;
  return times(samples, g.split == Split::kPixels ? of_pixels(g, p.shape, index)
                                                  : of_channels(g, p.shape, index));
}
Exchanged exchanged_pixels(const ResidentBackwardGeometry& g, const Shape& s, int64_t samples) {
  return times(samples, g.split == Split::kPixels ? of_pixels(g, s) : of_channels(g, s));
}

}  // namespace cbam::cuda
