// The geometry of the last pass: boxes of pixels and chunks of channels.
#include <algorithm>

#include "plan_parts.h"

namespace cbam::cuda {
namespace {

// Channels whose gates a block holds, at most.
constexpr int64_t kMostChannels = 4096;
// Vectors of a chunk of channels where channels come last: 128 bytes of every pixel.
constexpr int kChunkVectors = 8;

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
  const int64_t chunks = even_pieces(samples * g.boxes(),
                                     int64_t{kScaleBlocks} * device.multiprocessors, fewest, most);
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
  const Ending& e = p.ending;
  const auto added =
      e.residual ? ColumnAccess(View(p, e.strides, e.residual), vector).of_two_rows(vector) : in;
  const bool reads_x = p.part != Part::kLogits;  // else no channels are needed either
  const int64_t most_chunks =
      reads_x ? std::max<int64_t>(1, s.channels / pieces_of(p, samples).channels) : 1;
  ScaleGeometry g{};
  const bool alike = in.access == out.access && in.access == added.access;
  g.access = reads_x && alike ? in.access : Access::kScalar;
  g.chunk =
      reads_x ? static_cast<int>(std::min(s.channels, kMostChannels)) : 0;  // room for so many
  g.chunks = 1;
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
  if (!reads_x) return g;
  const bool packed = g.access == Access::kPacked;
  g.period = in.period;
  g.row_group = packed ? in.row_group : 1;
  if (packed && !first) {
    g.chunk = static_cast<int>(s.channels);
  } else {
    set_chunk(g, p, samples, map_splits, device);
  }
  if (packed) g.threads_along = threads_along(g.period);
  return g;
}

}  // namespace cbam::cuda
