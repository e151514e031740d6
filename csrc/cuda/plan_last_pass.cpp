// The geometry of the last pass: boxes of pixels and chunks of channels.
#include <algorithm>

#include "plan_parts.h"

namespace cbam::cuda {
namespace {

// Channels whose gates a block holds, at most.
constexpr int64_t kMostChannels = 4096;
// Vectors of a chunk of channels where channels come last: 128 bytes of every pixel.
constexpr int kChunkVectors = 8;

// A last wave of blocks that is so full costs nothing that smaller blocks would save.
constexpr double kFullWave = 0.9;

// The fewest chunks of every box that fill the device evenly: `boxes` blocks each, in whole waves of
// as many as run at once, or nearly; where none do, those that come the closest.
int64_t even_chunks(int64_t boxes, const DeviceLimits& device, int64_t fewest, int64_t most) {
  const int64_t at_once = int64_t{kScaleBlocks} * device.multiprocessors;
  int64_t best = fewest;
  double best_share = 0;
  for (int64_t chunks = fewest; chunks <= most && best_share < kFullWave; ++chunks) {
    const int64_t blocks = boxes * chunks;
    const double share =
        static_cast<double>(blocks) / static_cast<double>(ceil_div(blocks, at_once) * at_once);
    if (share <= best_share) continue;
    best = chunks;
    best_share = share;
  }
  return best;
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
  const int64_t chunks = even_chunks(samples * g.boxes(), device, fewest, most);
  const int64_t multiple = p.strides.channels_first() ? g.row_group
                           : g.access == Access::kVector
                               ? kChunkVectors * elements_per_vector(p.dtype)
                               : 1;
  const int64_t chunk = ceil_div(ceil_div(s.channels, chunks), multiple) * multiple;
  g.chunk = static_cast<int>(std::min(chunk, s.channels));
  g.chunks = static_cast<int>(ceil_div(s.channels, g.chunk));
}

}  // namespace

ScaleGeometry plan_last_pass(const ForwardProblem& p, int64_t samples, int map_splits,
                             const DeviceLimits& device) {
  const Shape& s = p.shape;
  const int vector = elements_per_vector(p.dtype);
  const bool first = p.strides.channels_first();
  const auto in = ColumnAccess(View(p, p.strides, p.x), vector).of_two_rows(vector);
  const auto out = ColumnAccess(View(p, p.out_strides, p.out), vector).of_two_rows(vector);
  const int64_t most_chunks = std::max<int64_t>(1, s.channels / pieces_of(p, samples).channels);
  ScaleGeometry g{};
  g.access = in.access == out.access ? in.access : Access::kScalar;
  g.chunk = static_cast<int>(std::min(s.channels, kMostChannels));  // what room they may need
  const auto shared_bytes_of = [&](const BoxGeometry& box) {
    ScaleGeometry with_box = g;
    static_cast<BoxGeometry&>(with_box) = box;
    return p.dtype == DType::kFloat64 ? shared_bytes<ScaleShared<double>>(with_box, space_of(s))
                                      : shared_bytes<ScaleShared<float>>(with_box, space_of(s));
  };
  const BoxSearch boxes{p, device, samples * most_chunks, shared_bytes_of};
  auto box = boxes.find(g.access);
  if (!box && g.access != Access::kScalar) {
    g.access = Access::kScalar;  // the boxes whose vectors lie in one piece are all too large
    box = boxes.find(g.access);
  }
  if (!box) throw boxes.no_box();
  static_cast<BoxGeometry&>(g) = *box;
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
