// The resident forward: what of it fits, and how long it would take.
#include "plan_teams.h"

namespace cbam::cuda {
namespace {

constexpr int64_t kMostBands = 8;
// Elements of a row that is no whole number of vectors, up to which a thread walks along it alone.
constexpr int64_t kShortRow = 128;
// That share a row, where it is longer: eight read all banks of shared memory.
constexpr int kFewestLanes = 8;
// Threads that share the channels of some pixels, at most: they wait for each other's turn.
constexpr int kMostSharing = 8;
// Fitted to 792 forwards of a ResNet-50's blocks on an H100, in all ways to hold them that were
// expected to take less than 1.7 of the plan's: to 13 % (the root of the mean square, in
// logarithms), or 7 % where rounds are counted whole.
constexpr VisitCosts kVisitCosts = {19e-6, 5.0e-6, 0.87,    79e-12,  34e-12, 38e-12,  10e-12, 1.3,
                                    1.65,  81e-12, 0.54e-9, 2.25e-6, 2.4e-6, 0.24e-6, 0};

class ForwardFitting : public Teams {
 public:
  using Geometry = ResidentForwardGeometry;

  ForwardFitting(const ForwardProblem& p, const DeviceLimits& device)
      : Teams(p, device, 1, kForwardThreads) {}

  // Null where the slices do not fit, or not as many teams as one.
  std::optional<Geometry> geometry(const Candidate& c) const {
    Geometry g{};
    if (!set_slice(g, c)) return std::nullopt;
    g.shares_units = sharing_units_pays(g, g.vectors());
    if (!fit(g, limit(c.blocks))) return std::nullopt;
    return g;
  }

  int64_t shared_bytes(const Geometry& g) const {
    SharedLayout layout;
    return resident_shared_bytes(p_, g, layout);
  }

  double seconds(const Geometry& g) const {
    const auto bands = static_cast<double>(ceil_div(s_.pixels(), g.band));
    const double passes = p_.ending.residual ? 3 : 2;
    return Teams::seconds(kVisitCosts, g,
                          {passes, g.split == Split::kPixels ? 4 : 1 + 2 * bands, 0});
  }

 private:
  // Sets the boxes and bands with the fewest barriers that fit into `limit` bytes.
  bool fit(Geometry& g, int64_t limit) const {
    const bool by_pixels = g.split == Split::kPixels;
    for (int64_t bands = 1; bands <= (by_pixels ? 1 : kMostBands); ++bands)
      for (int64_t each = 1; each <= (by_pixels ? 1 : 4); each *= 2) {
        g.band = static_cast<int>(std::min<int64_t>(
            g.pixels, ceil_div(ceil_div(int64_t{g.pixels}, bands), vector_) * vector_));
        set_boxes(g, each);
        // Between bands each box stays staged, and no scratch is there to share a column.
        if (bands > 1 && (g.boxes_each > 1 || g.band < g.threads)) continue;
        set_walks(g);
        if (shared_bytes(g) > limit) continue;
        g.exchange = g.cluster ? 0 : exchange_bytes(g);
        return true;
      }
    return false;
  }

  // How threads share rows and columns: no thread makes the maps of so many neighbours that more
  // than a third of the threads have none.
  void set_walks(Geometry& g) const {
    // Fewer lanes sum a row up in fewer steps, and fewer of them are without a last vector; as long
    // as every thread has rows.
    const int64_t groups_of_rows = int64_t{g.samples} * g.rows / kRowsAlong;
    while (first_ && g.lanes > kFewestLanes && groups_of_rows * g.lanes / 2 >= g.threads)
      g.lanes /= 2;
    if (first_ && g.pixels % (vector_ / 2) && g.pixels <= kShortRow) g.lanes = 1;
    g.neighbours = 1;
    g.groups = groups(g, int64_t{g.samples} * (first_ ? g.band : g.held_channels));
    if (g.split == Split::kPixels) return;
    for (int count : {vector_ / 2, vector_}) {
      if (!first_ || g.pixels % count || g.band % count) continue;
      const int64_t columns = int64_t{g.samples} * g.band / count;
      const int sharing = std::min(groups(g, columns), kMostSharing);
      if (3 * columns * sharing < 2 * int64_t{g.threads}) continue;
      g.neighbours = count;
      g.groups = sharing;
    }
  }

  int64_t exchange_bytes(const Geometry& g) const {
    ExchangeCarver carver(nullptr);
    ForwardExchange<float>(carver, g, static_cast<int>(s_.hidden), space_, p_.training());
    return carver.bytes();
  }
};

template <class T>
int64_t lay_out(const ForwardProblem& p, const ResidentForwardGeometry& g, SharedLayout& layout) {
  const int units = static_cast<int>(p.shape.hidden);
  LayoutCarver carver(layout);
  ResidentForwardShared<T, float>(carver, g, units, space_of(p.shape), p.training());
  if (g.cluster) ForwardExchange<float>(carver, g, units, space_of(p.shape), p.training());
  return static_cast<int64_t>(carver.bytes());
}

}  // namespace

int64_t resident_shared_bytes(const ForwardProblem& p, const ResidentForwardGeometry& g,
                              SharedLayout& layout) {
  return p.dtype == DType::kFloat32 ? lay_out<float>(p, g, layout) : lay_out<Half>(p, g, layout);
}

ResidentPlan<ResidentForwardGeometry> plan_resident(const ForwardProblem& p,
                                                    const DeviceLimits& device, const Way& only) {
  if (const char* reason = why_not_held(p, device)) return {{}, 0, reason};
  const Ending& e = p.ending;
  if (!in_whole_vectors(p, p.strides, p.x) || !in_whole_vectors(p, p.out_strides, p.out) ||
      (e.residual && !in_whole_vectors(p, e.strides, e.residual)))
    return {{}, 0, "rows of x, out or the residual are no whole vectors of 16 bytes, or have gaps"};
  return WaySearch(ForwardFitting(p, device), device, only).best();
}

ResidentPlan<ResidentForwardGeometry> for_batch(const ResidentPlan<ResidentForwardGeometry>& plan,
                                                const ForwardProblem& p,
                                                const DeviceLimits& device) {
  return for_batch(plan, ForwardFitting(p, device));
}

Grid resident_grid(const ForwardPlan& plan, const ForwardProblem& p) {
  SharedLayout layout;
  return grid_of_teams(plan, resident_shared_bytes(p, *plan.resident, layout));
}

}  // namespace cbam::cuda
