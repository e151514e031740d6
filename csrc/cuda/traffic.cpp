#include "traffic.h"

#include <algorithm>

#include "plan_parts.h"

namespace cbam::cuda {
namespace {

struct Sizes {
  int64_t samples, channels, pixels, hidden;
  int64_t x, acc, weight, index;  // bytes: of all of x; of an element

  Sizes(const ForwardProblem& p, int64_t n)
      : samples(n),
        channels(p.shape.channels),
        pixels(p.shape.pixels()),
        hidden(p.shape.hidden),
        x(n * p.shape.channels * p.shape.pixels() * bytes_of(p.dtype)),
        acc(bytes_of_accumulator(p.dtype)),
        weight(bytes_of(p.weights.dtype)),
        index(p.training() ? 4 : 0) {}

  // Weights of a layer of the MLP, and its bias, read once for so many samples.
  int64_t walked(int together, int64_t bias) const {
    return ceil_div(samples, together) * weight * (hidden * channels + bias);
  }
};

Traffic of_reduction(const ReductionGeometry& g, const Sizes& n, int64_t outputs, bool scaled) {
  Traffic t;
  t.x_read = n.x;
  t.small_written = n.samples * g.splits * outputs * (2 * n.acc + n.index);
  if (scaled) t.small_read = n.samples * g.tiles * n.channels * n.acc;
  return t;
}

Traffic of_hidden(const ForwardPlan& plan, const ForwardProblem& p, const Sizes& n) {
  const int64_t tiles = hidden_tiles(plan.mlp, p.shape);
  const bool saves = plan.pool.splits > 1 && p.training();
  Traffic t;
  t.weights_read = n.walked(plan.mlp.hidden_samples, p.weights.fc1_bias ? n.hidden : 0);
  t.small_read =
      n.samples * n.channels * plan.pool.splits * (tiles * 2 * n.acc + (saves ? n.index : 0));
  t.small_written = n.samples * 2 * n.hidden * n.acc;
  if (saves) t.small_written += n.samples * n.channels * (2 * n.acc + n.index);
  return t;
}

Traffic of_gate(const ForwardPlan& plan, const ForwardProblem& p, const Sizes& n) {
  Traffic t;
  t.weights_read = n.walked(plan.mlp.gate_samples, p.weights.fc2_bias ? n.channels : 0);
  if (!plan.mlp.together) t.small_read = gate_tiles(p.shape) * n.samples * 2 * n.hidden * n.acc;
  t.small_written = n.samples * n.channels * n.acc;
  return t;
}

// Of one stage that does what two do.
Traffic both(Traffic one, const Traffic& other) {
  one += other;
  return one;
}

Traffic of_scale(const ForwardPlan& plan, const ForwardProblem& p, const Sizes& n) {
  const ScaleGeometry& g = plan.scale;
  const Shape& s = p.shape;
  const int64_t boxes = n.samples * g.boxes();
  const bool merges_argmax = plan.maps.splits > 1;
  const int64_t maps = read_by_boxes(g, s);
  Traffic t;
  t.x_read = n.x;
  if (p.ending.residual) t.residual_read = n.x;
  t.out_written = n.x;
  t.small_read = boxes * g.chunks * n.weight * (2 * s.taps() + (p.weights.conv_bias ? 1 : 0)) +
                 boxes * n.channels * n.acc +
                 n.samples * g.chunks * maps * plan.maps.splits * 2 * n.acc;
  if (p.training()) {
    t.small_written = n.samples * n.pixels * (n.acc + 2 * bytes_of(p.dtype));
    if (merges_argmax) {
      t.small_read += n.samples * n.pixels * plan.maps.splits * n.index;
      t.small_written += n.samples * n.pixels * n.index;
    }
  }
  return t;
}

// What a pass over tiles reads beside x: `per_row` bytes for each row and `per_col` for each column
// of every block.
int64_t beside_tiles(const TileGeometry& g, int64_t samples, int64_t rows, int64_t cols,
                     int64_t per_row, int64_t per_col) {
  return samples * (rows * per_row * g.tiles + cols * per_col * g.splits);
}

Traffic of_cross(const BackwardPlan& plan, const BackwardProblem& p, const Sizes& n) {
  const bool first = p.strides.channels_first();
  const int64_t rows = first ? n.channels : n.pixels, cols = first ? n.pixels : n.channels;
  Traffic t;
  t.x_read = 2 * n.x;
  t.small_read = beside_tiles(plan.cross, n.samples, rows, cols, n.acc, n.acc);
  t.small_written = t.small_read;  // a sum for every factor
  return t;
}

Traffic of_stencil(const BackwardPlan& plan, const BackwardProblem& p, const Sizes& n) {
  const BoxGeometry& g = plan.stencil;
  const Shape& s = p.shape;
  const int64_t parts = p.strides.channels_first() ? plan.cross.splits : plan.cross.tiles;
  const int64_t staged = read_by_boxes(g, s);
  const int64_t boxes = n.samples * g.boxes();
  const bool conv = p.gradients.conv();
  Traffic t;
  t.small_read = n.samples * staged * n.acc * (parts + 1 + (p.d_spatial_gate ? 1 : 0)) +
                 (conv ? n.samples * n.pixels * 2 * bytes_of(p.dtype) : 0) +
                 boxes * 2 * s.taps() * n.weight;
  t.small_written =
      n.samples * 2 * n.pixels * n.acc + (conv ? boxes * (2 * s.taps() + 1) * n.acc : 0);
  return t;
}

Traffic of_terms(const BackwardPlan& plan, const BackwardProblem& p, const Sizes& n) {
  const bool first = p.strides.channels_first();
  const TileGeometry& g = plan.terms;
  Traffic t;
  t.x_read = n.x;
  t.small_read = n.samples * n.pixels * (2 * n.acc + 4) * (first ? g.splits : g.tiles);
  t.small_written = n.samples * n.channels * n.acc * (first ? g.tiles : g.splits);
  return t;
}

Traffic of_gate_backward(const BackwardPlan& plan, const BackwardProblem& p, const Sizes& n) {
  const bool first = p.strides.channels_first();
  const int64_t parts =
      first ? plan.cross.tiles + plan.terms.tiles : plan.cross.splits + plan.terms.splits;
  const int64_t tiles = gate_tiles(plan.mlp, p.shape);
  Traffic t;
  t.weights_read = n.walked(plan.mlp.gate_samples, 0);
  t.small_read = n.samples * n.acc *
                 (tiles * n.channels * (parts + 1 + (p.d_channel_gate ? 1 : 0)) + 2 * n.hidden);
  t.small_written = n.samples * n.acc * (n.channels + 2 * n.hidden);
  return t;
}

Traffic of_hidden_backward(const BackwardPlan& plan, const BackwardProblem& p, const Sizes& n) {
  Traffic t;
  t.weights_read = n.walked(plan.mlp.hidden_samples, 0);
  if (!plan.mlp.together)
    t.small_read = n.samples * hidden_tiles(plan.mlp, p.shape) * 2 * n.hidden * n.acc;
  t.small_written = n.samples * 2 * n.channels * n.acc;
  return t;
}

Traffic of_input(const BackwardPlan& plan, const BackwardProblem& p, const Sizes& n) {
  const bool first = p.strides.channels_first();
  const int64_t rows = first ? n.channels : n.pixels, cols = first ? n.pixels : n.channels;
  const int64_t each = 3 * n.acc + 4;
  Traffic t;
  t.x_read = n.x;
  t.out_written = n.x;
  t.small_read = beside_tiles(plan.input, n.samples, rows, cols, each, each);
  return t;
}

// Of `rows` x `cols` outputs, summed over so many vectors of each.
Traffic of_outer(const void* gradient, int64_t rows, int64_t cols, int64_t row_vectors,
                 int64_t col_vectors, int tile, const Sizes& n) {
  Traffic t;
  if (!gradient) return t;
  t.sums_read = n.acc * (rows * row_vectors * ceil_div(cols, tile) +
                         cols * col_vectors * ceil_div(rows, tile));
  t.sums_written = rows * cols * n.weight;
  return t;
}

Traffic of_sum(const void* gradient, int64_t length, int64_t vectors, const Sizes& n) {
  Traffic t;
  if (!gradient) return t;
  t.sums_read = length * vectors * n.acc;
  t.sums_written = length * n.weight;
  return t;
}

Traffic of_weights(const BackwardPlan& plan, const BackwardProblem& p, const Sizes& n) {
  const Gradients& g = p.gradients;
  const int64_t shares = n.samples * plan.conv_shares();
  const int tile = weight_grids(plan, p).tile;
  Traffic t = of_outer(g.fc1_weight, n.hidden, n.channels, 2 * n.samples, 2 * n.samples, tile, n);
  t += of_outer(g.fc2_weight, n.channels, n.hidden, n.samples, 2 * n.samples, tile, n);
  t += of_sum(g.fc1_bias, n.hidden, 2 * n.samples, n);
  t += of_sum(g.fc2_bias, n.channels, n.samples, n);
  t += of_sum(g.conv_weight, 2 * p.shape.taps(), shares, n);
  t += of_sum(g.conv_bias, 1, shares, n);
  return t;
}

// Where a team that is no cluster counts its blocks: it is set to zero.
constexpr int64_t kCountBytes = 4;

// How often the weights of the MLP are read: by every visit, or by every team where they stay.
int64_t readings(const ResidentGeometry& g, int64_t visits) {
  return g.weight_bytes ? std::min(visits, g.teams) : visits;
}

// Blocks that merge the sums of a hidden unit.
int64_t merging(const ResidentGeometry& g) { return g.shares_units ? 1 : g.team; }

// What the blocks of a team that is no cluster tell each other.
Traffic of_exchange(const ResidentForwardGeometry& g, const ForwardProblem& p, const Sizes& n) {
  const int64_t visits = ceil_div(n.samples, g.samples);
  const Exchanged units = exchanged_units(g, p.shape, 2, 1, visits, visits * g.mlp_samples());
  const Exchanged maps = exchanged_maps(g, p, n.samples);
  Traffic t;
  t.small_written = g.teams * kCountBytes + units.written + maps.written;
  t.small_read = units.read + maps.read;
  return t;
}

Traffic of_resident(const ForwardPlan& plan, const ForwardProblem& p, const Sizes& n) {
  const ResidentForwardGeometry& g = *plan.resident;
  const int64_t visits = ceil_div(n.samples, g.samples);
  Traffic t;
  if (n.samples == 0) return t;
  if (!g.cluster) t = of_exchange(g, p, n);
  t.x_read = t.out_written = n.x;
  if (p.ending.residual) t.residual_read = n.x;
  t.weights_read =
      n.weight * (readings(g, visits) * 2 * n.hidden * n.channels +
                  (p.weights.fc1_bias ? visits * n.hidden * merging(g) * g.mlp_samples() : 0) +
                  (p.weights.fc2_bias ? n.samples * n.channels : 0));
  t.small_read +=
      g.teams * g.team * n.weight * (2 * p.shape.taps() + (p.weights.conv_bias ? 1 : 0));
  if (p.training())
    t.small_written += n.samples * (n.channels * (3 * n.acc + 4) + 2 * n.hidden * n.acc +
                                    n.pixels * (n.acc + 4 + 2 * bytes_of(p.dtype)));
  return t;
}

// The same backwards.
Traffic of_exchange(const ResidentBackwardGeometry& g, const BackwardProblem& p, const Sizes& n) {
  const int64_t visits = ceil_div(n.samples, g.samples);
  const Exchanged units = exchanged_units(g, p.shape, 1, 2, visits, n.samples);
  const Exchanged pixels = exchanged_pixels(g, p.shape, n.samples);
  Traffic t;
  t.small_written = g.teams * kCountBytes + units.written + pixels.written;
  t.small_read = units.read + pixels.read;
  return t;
}

Traffic of_resident(const BackwardPlan& plan, const BackwardProblem& p, const Sizes& n) {
  const ResidentBackwardGeometry& g = *plan.resident;
  const int64_t visits = ceil_div(n.samples, g.samples);
  const bool by_pixels = g.split == Split::kPixels;
  // Blocks that stage what belongs to a channel; and pixels whose gates are staged.
  const int64_t blocks = by_pixels ? g.team : 1;
  const int64_t gates = n.samples * (by_pixels ? n.pixels : read_by_team(g, p.shape));
  const bool conv = p.gradients.conv(), mlp = p.gradients.mlp();
  Traffic t;
  if (n.samples == 0) return t;
  if (!g.cluster) t = of_exchange(g, p, n);
  t.x_read = (g.holds_x() ? 2 : 3) * n.x;
  if (p.gradients.x) t.out_written = n.x;
  t.weights_read = readings(g, visits) * n.weight * 2 * n.hidden * n.channels;
  t.small_read += g.teams * g.team * 2 * p.shape.taps() * n.weight +
                  n.samples * n.channels * (blocks * (n.acc + 4) + (p.d_channel_gate ? n.acc : 0)) +
                  n.samples * merging(g) * 2 * n.hidden * n.acc +
                  gates * (n.acc + (p.d_spatial_gate ? n.acc : 0)) +
                  n.samples * n.pixels * (4 + (conv ? 2 * bytes_of(p.dtype) : 0));
  if (mlp) t.small_written += n.samples * (n.channels + 2 * n.hidden) * n.acc;
  if (conv) t.small_written += n.samples * g.conv_shares() * (2 * p.shape.taps() + 1) * n.acc;
  return t;
}

template <class Plan, class Problem>
Traffic of_all_groups(const Plan& plan, const Problem& p) {
  Traffic full, rest;
  for (const Stage& stage : stages(plan, p, plan.group.samples)) full += stage.traffic;
  for (const Stage& stage : stages(plan, p, p.shape.samples % plan.group.samples))
    rest += stage.traffic;
  const int64_t groups = p.shape.samples / plan.group.samples;
  Traffic t = rest;
  t.x_read += groups * full.x_read;
  t.residual_read += groups * full.residual_read;
  t.out_written += groups * full.out_written;
  t.weights_read += groups * full.weights_read;
  t.small_read += groups * full.small_read;
  t.small_written += groups * full.small_written;
  return t;
}

}  // namespace

Traffic& Traffic::operator+=(const Traffic& other) {
  x_read += other.x_read;
  residual_read += other.residual_read;
  out_written += other.out_written;
  weights_read += other.weights_read;
  small_read += other.small_read;
  small_written += other.small_written;
  sums_read += other.sums_read;
  sums_written += other.sums_written;
  return *this;
}

std::vector<Stage> stages(const ForwardPlan& plan, const ForwardProblem& p, int64_t samples) {
  const Sizes n(p, samples);
  if (plan.resident) return {{"resident", resident_grid(plan, p), of_resident(plan, p, n)}};
  const ForwardGrids g = grids(plan, p, samples);
  std::vector<Stage> launched = {
      {"channel pool", g.pool, of_reduction(plan.pool, n, n.channels, false)}};
  const Traffic hidden = of_hidden(plan, p, n), gate = of_gate(plan, p, n);
  if (plan.mlp.together) {
    launched.push_back({"both layers", g.hidden, both(hidden, gate)});
  } else {
    launched.push_back({"hidden layer", g.hidden, hidden});
    launched.push_back({"channel gate", g.gate, gate});
  }
  launched.push_back({"spatial pool", g.maps, of_reduction(plan.maps, n, n.pixels, true)});
  launched.push_back({"spatial gate, scale", g.scale, of_scale(plan, p, n)});
  return launched;
}

std::vector<Stage> stages(const BackwardPlan& plan, const BackwardProblem& p, int64_t samples) {
  const Sizes n(p, samples);
  if (plan.resident) return {{"resident", resident_grid(plan, p), of_resident(plan, p, n)}};
  const BackwardGrids g = grids(plan, p, samples);
  std::vector<Stage> launched = {
      {"sums of dout * x", g.cross, of_cross(plan, p, n)},
      {"stencil", g.stencil, of_stencil(plan, p, n)},
  };
  if (!p.gradients.x && !p.gradients.mlp()) return launched;
  launched.push_back({"map terms", g.terms, of_terms(plan, p, n)});
  const Traffic gate = of_gate_backward(plan, p, n);
  if (takes_both_layers(plan, p)) {
    launched.push_back({"both layers", g.gate, both(gate, of_hidden_backward(plan, p, n))});
  } else {
    launched.push_back({"channel gate", g.gate, gate});
    if (!p.gradients.x) return launched;
    launched.push_back({"hidden layer", g.hidden, of_hidden_backward(plan, p, n)});
  }
  launched.push_back({"dx", g.input, of_input(plan, p, n)});
  return launched;
}

Traffic traffic(const ForwardPlan& plan, const ForwardProblem& p) { return of_all_groups(plan, p); }
Traffic traffic(const BackwardPlan& plan, const BackwardProblem& p) {
  Traffic total = of_all_groups(plan, p);
  total += of_weights(plan, p, Sizes(p, p.shape.samples));
  return total;
}

int64_t device_memory_bytes(const ForwardPlan& plan, const ForwardProblem& p) {
  const Traffic t = traffic(plan, p);
  return (plan.group.in_cache ? t.x_read / 3 : t.x_read) + t.residual_read + t.out_written;
}
int64_t device_memory_bytes(const BackwardPlan& plan, const BackwardProblem& p) {
  const Traffic t = traffic(plan, p);
  const int64_t once = p.shape.samples * p.shape.channels * p.shape.pixels() * bytes_of(p.dtype);
  return (plan.group.in_cache || plan.resident ? 2 * once : t.x_read) + t.out_written;
}

}  // namespace cbam::cuda
