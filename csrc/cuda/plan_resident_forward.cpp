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
// Two walks over an element in shared memory, by a multiprocessor; estimated.
constexpr double kElementSeconds = 22e-12;

class ForwardFitting : public Teams {
 public:
  using Geometry = ResidentForwardGeometry;
  static constexpr Measured kMeasured{6e-6, 2.2, 4.0, 1.6};

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

  // Of a visit of each of `teams` teams.
  double round_seconds(const Geometry& g, double teams) const {
    const double bytes = slice(g) * static_cast<double>(bytes_of(p_.dtype));
    const double memory =
        2 * bytes / rate(g, teams) + weight_seconds(g, rate(g, teams)) +
        merge_seconds(g, g.vectors(), rate(g, teams)) +
        exchange_seconds(g, exchanged_maps(g, p_, g.samples).read, rate(g, teams));
    const double barriers = g.split == Split::kPixels
                                ? 4
                                : 1.0 + 2.0 * static_cast<double>(ceil_div(s_.pixels(), g.band));
    const int64_t runs = ceil_div(g.boxes.pixels(), int64_t{kRun} * g.threads) * g.boxes_each;
    const double waits = barrier_seconds(g, barriers) + share_seconds(g) +
                         slice(g) * kElementSeconds + 0.75 * product_seconds(g, g.vectors()) +
                         2.0 * static_cast<double>(s_.taps() * runs) * kTapSeconds;
    return together(g, teams, memory, waits);
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
                                                    const DeviceLimits& device,
                                                    std::optional<Split> only) {
  if (const char* reason = why_not_held(p, device)) return {{}, 0, reason};
  if (!in_whole_vectors(p, p.strides, p.x) || !in_whole_vectors(p, p.out_strides, p.out))
    return {{}, 0, "rows of x or out are no whole vectors of 16 bytes, or have gaps"};
  return fastest(ForwardFitting(p, device), p.shape, device, only);
}

ResidentPlan<ResidentForwardGeometry> for_batch(const ResidentPlan<ResidentForwardGeometry>& plan,
                                                const ForwardProblem& p,
                                                const DeviceLimits& device) {
  return for_batch(plan, ForwardFitting(p, device), p.shape);
}

Grid resident_grid(const ForwardPlan& plan, const ForwardProblem& p) {
  SharedLayout layout;
  return grid_of_teams(plan, resident_shared_bytes(p, *plan.resident, layout));
}

}  // namespace cbam::cuda
