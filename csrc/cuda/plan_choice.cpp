#include "plan_choice.h"

#include <algorithm>
#include <cmath>

namespace cbam::cuda {
namespace {

// `unit` times the power of two that makes it next to `size`, by ratio.
int64_t next_to(int64_t size, int64_t unit) {
  const double ratio = static_cast<double>(std::max<int64_t>(size, 1)) / static_cast<double>(unit);
  const double nearest = static_cast<double>(unit) * std::exp2(std::round(std::log2(ratio)));
  return std::max<int64_t>(1, std::llround(nearest));
}

void round_sizes(ForwardProblem& p) {
  Shape& s = p.shape;
  s.samples = typical_batch(s.samples);
  s.channels = next_to(s.channels, 1);
  s.hidden = next_to(s.hidden, 1);
  for (int64_t* extent : {&s.depth, &s.height, &s.width}) *extent = next_to(*extent, 7);
  const int64_t pixels = s.pixels();
  const bool first = p.strides.channels_first();
  p.strides = {s.channels * pixels, first ? pixels : 1, first ? 1 : s.channels};
  p.out_strides = p.ending.strides = p.strides;
}

}  // namespace

int64_t typical_batch(int64_t samples) { return next_to(samples, 1); }

ForwardProblem typical(ForwardProblem p) {
  round_sizes(p);
  return p;
}

BackwardProblem typical(BackwardProblem p) {
  round_sizes(p);
  p.dout_strides = p.dx_strides = p.strides;
  return p;
}

}  // namespace cbam::cuda
