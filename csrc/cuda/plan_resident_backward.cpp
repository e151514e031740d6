// The resident backward: what of it fits, and how long it would take.
#include <algorithm>
#include <numeric>

#include "plan_teams.h"

namespace cbam::cuda {
namespace {

// The walks over an element of x and of dout in shared memory, by a multiprocessor; estimated.
constexpr double kElementSeconds = 50e-12;
// Chunks of x that a block has room for where not all of them stay; at least two, so that one
// arrives while the other is read.
constexpr int kMostSlots = 4, kFewestSlots = 2;
// The barriers, merges and shuffles that a chunk of x costs where chunks come and go; estimated.
constexpr double kChunkSeconds = 0.3e-6;
// Four taps of the convolution's gradients over 32 pixels, by a warp; estimated.
constexpr double kPlaceSeconds = 40e-9;

class BackwardFitting : public Teams {
 public:
  using Geometry = ResidentBackwardGeometry;
  static constexpr Measured kMeasured{18e-6, 3.2, 5.5, 3.6};

  BackwardFitting(const BackwardProblem& p, const DeviceLimits& device)
      : Teams(p, device, 2, kBackwardThreads), problem_(p) {}

  // Null where the slices do not fit, or not as many teams as one.
  std::optional<Geometry> geometry(const Candidate& c) const {
    Geometry g{};
    if (!set_slice(g, c)) return std::nullopt;
    g.shares_units = sharing_units_pays(g, g.mlp_samples());
    g.groups = groups(g, int64_t{g.samples} * ceil_div(g.pitch, columns_together(g)));
    set_access(g);
    g.x_slots = g.samples * g.chunks;
    if (fit(g, limit(c.blocks))) return g;
    if (g.samples > 1) return std::nullopt;
    // Chunks of whole groups of rows; the number of rows in each kind is a power of two.
    const int64_t rows = std::max(kRowsTogether, g.row_group);
    g.chunk = static_cast<int>(ceil_div(g.chunk, rows) * rows);
    g.chunks = static_cast<int>(ceil_div(g.rows, g.chunk));
    for (int slots = std::min(kMostSlots, g.chunks - 1); slots >= kFewestSlots; --slots) {
      g.x_slots = slots;
      if (fit(g, limit(c.blocks))) return g;
    }
    return std::nullopt;
  }

  int64_t shared_bytes(const Geometry& g) const {
    SharedLayout layout;
    return resident_shared_bytes(problem_, g, layout);
  }

  // Of a visit of each of `teams` teams.
  double round_seconds(const Geometry& g, double teams) const {
    const double bytes = slice(g) * static_cast<double>(bytes_of(p_.dtype));
    const double passes = g.holds_x() ? 3 : 3 + 1 / kCacheSpeed;
    const double memory =
        passes * bytes / rate(g, teams) + weight_seconds(g, rate(g, teams)) +
        merge_seconds(g, g.mlp_samples(), rate(g, teams)) +
        exchange_seconds(g, exchanged_pixels(g, s_, g.samples).read, rate(g, teams));
    const int barriers = g.split == Split::kPixels ? 4 : 3;
    const double chunks = g.holds_x() ? 0 : 2.0 * g.chunks;
    const int64_t pixels = ceil_div(g.boxes.pixels(), g.threads) * g.boxes_each;
    const int64_t places = ceil_div(g.mapped_pixels() / g.boxes_each, 32) * g.boxes_each *
                           ceil_div(2 * s_.taps(), int64_t{4} * g.threads / 32);
    const double waits = barrier_seconds(g, barriers) + share_seconds(g) +
                         slice(g) * kElementSeconds +
                         0.75 * product_seconds(g, 2 * g.mlp_samples()) + chunks * kChunkSeconds +
                         static_cast<double>(s_.taps() * pixels) * kTapSeconds +
                         static_cast<double>(places) * kPlaceSeconds;
    return together(g, teams, memory, waits);
  }

 private:
  // As threads read columns to sum them: several at once where rows are whole groups of them.
  int columns_together(const Geometry& g) const {
    const auto together = static_cast<int>(kBytesTogether / bytes_of(p_.dtype));
    return g.pitch % together == 0 ? together : 1;
  }

  // Rows of channels are whole vectors, those of pixels perhaps only several together.
  void set_access(Geometry& g) const {
    const int64_t cols = g.pitch, common = std::gcd(cols, int64_t{vector_});
    g.row_group = static_cast<int>(vector_ / common);
    g.access = g.row_group == 1 ? Access::kVector : Access::kPacked;
    // A thread for every vector, where there are so many: it keeps what belongs to its columns for
    // all rows. Else as few passes along the rows as will do: a chunk has few rows to share.
    const int64_t vectors = cols / common;
    g.threads_along = static_cast<int>(ceil_div(vectors, ceil_div(vectors, g.threads)));
  }

  // Sets the boxes; whether all fits into `limit` bytes.
  bool fit(Geometry& g, int64_t limit) const {
    set_boxes(g, 1);
    if (shared_bytes(g) > limit) return false;
    g.exchange = g.cluster ? 0 : exchange_bytes(g);
    return true;
  }

  int64_t exchange_bytes(const Geometry& g) const {
    ExchangeCarver carver(nullptr);
    BackwardExchange<float>(carver, g, static_cast<int>(s_.hidden));
    return carver.bytes();
  }

  const BackwardProblem& problem_;
};

template <class T>
int64_t lay_out(const BackwardProblem& p, const ResidentBackwardGeometry& g, SharedLayout& layout) {
  const int units = static_cast<int>(p.shape.hidden);
  LayoutCarver carver(layout);
  // As if all gradients were asked for: a sample's dx must not depend on which others are.
  const ResidentBackwardShared<T, float> shared(carver, g, units, space_of(p.shape));
  if (g.cluster) BackwardExchange<float>(carver, g, units, shared.of_pixels);
  return static_cast<int64_t>(carver.bytes());
}

}  // namespace

int64_t resident_shared_bytes(const BackwardProblem& p, const ResidentBackwardGeometry& g,
                              SharedLayout& layout) {
  return p.dtype == DType::kFloat32 ? lay_out<float>(p, g, layout) : lay_out<Half>(p, g, layout);
}

ResidentPlan<ResidentBackwardGeometry> plan_resident(const BackwardProblem& p,
                                                     const DeviceLimits& device,
                                                     std::optional<Split> only) {
  if (const char* reason = why_not_held(p, device)) return {{}, 0, reason};
  if (!in_whole_vectors(p, p.strides, p.x) || !in_whole_vectors(p, p.dout_strides, p.dout) ||
      (p.gradients.x && !in_whole_vectors(p, p.dx_strides, p.gradients.x)))
    return {{}, 0, "rows of x, dout or dx are no whole vectors of 16 bytes, or have gaps"};
  return fastest(BackwardFitting(p, device), p.shape, device, only);
}

ResidentPlan<ResidentBackwardGeometry> for_batch(const ResidentPlan<ResidentBackwardGeometry>& plan,
                                                 const BackwardProblem& p,
                                                 const DeviceLimits& device) {
  return for_batch(plan, BackwardFitting(p, device), p.shape);
}

Grid resident_grid(const BackwardPlan& plan, const BackwardProblem& p) {
  SharedLayout layout;
  return grid_of_teams(plan, resident_shared_bytes(p, *plan.resident, layout));
}

}  // namespace cbam::cuda
