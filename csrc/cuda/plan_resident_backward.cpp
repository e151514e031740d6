// The resident backward: what of it fits, and how long it would take.
#include <algorithm>
#include <numeric>

#include "plan_teams.h"

namespace cbam::cuda {
namespace {

// Fitted as those of forwards, to 545 backwards: to 11 %, or 7 %.
constexpr VisitCosts kVisitCosts = {38e-6, 0,      0.89, 0.16e-9, 0.21e-9, 0.19e-9, 21e-12, 1.6,
                                    2,     0.3e-9, 0,    4.7e-6,  4.75e-6, 0.31e-6, 3.3e-6};
// Chunks of x that a block has room for where not all of them stay; at least two, so that one
// arrives while the other is read.
constexpr int kMostSlots = 4, kFewestSlots = 2;
// Chunks of a slice then, about: smaller ones, of which some find room.
constexpr int64_t kFleetingChunks = 8;

class BackwardFitting : public Teams {
 public:
  using Geometry = ResidentBackwardGeometry;

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
    g.chunk = static_cast<int>(ceil_div(ceil_div(g.rows, kFleetingChunks), rows) * rows);
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

  double seconds(const Geometry& g) const {
    const Visit visit = {g.holds_x() ? 3 : 3 + 1 / kCacheSpeed,
                         g.split == Split::kPixels ? 4.0 : 3.0, g.holds_x() ? 0.0 : g.chunks};
    return Teams::seconds(kVisitCosts, g, visit);
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
                                                     const DeviceLimits& device, const Way& only) {
  if (const char* reason = why_not_held(p, device)) return {{}, 0, reason};
  if (!in_whole_vectors(p, p.strides, p.x) || !in_whole_vectors(p, p.dout_strides, p.dout) ||
      (p.gradients.x && !in_whole_vectors(p, p.dx_strides, p.gradients.x)))
    return {{}, 0, "rows of x, dout or dx are no whole vectors of 16 bytes, or have gaps"};
  return WaySearch(BackwardFitting(p, device), device, only).best();
}

ResidentPlan<ResidentBackwardGeometry> for_batch(const ResidentPlan<ResidentBackwardGeometry>& plan,
                                                 const BackwardProblem& p,
                                                 const DeviceLimits& device) {
  return for_batch(plan, BackwardFitting(p, device));
}

Grid resident_grid(const BackwardPlan& plan, const BackwardProblem& p) {
  SharedLayout layout;
  return grid_of_teams(plan, resident_shared_bytes(p, *plan.resident, layout));
}

}  // namespace cbam::cuda
