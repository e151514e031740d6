// What the planner's files share: how the kernels see a tensor, how its columns can be read, and
// how many blocks fill a device.
#pragma once

#include <cstdint>

#include "plan.h"

namespace cbam::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int elements_per_vector(DType dtype) {
  return static_cast<int>(kVectorBytes / bytes_of(dtype));
}

// One tensor of x's size: channels x pixels where x's channels come first, else pixels x channels.
struct View {
  int64_t rows, cols, row_stride, sample_stride;
  bool aligned;  // every sample starts on a multiple of 16 bytes

  View(const ForwardProblem& p, const Strides& strides, const void* data);
};

struct ColumnAccess {
  Access access = Access::kScalar;
  int period, row_group = 1;

  ColumnAccess(const View& view, int vector);
};

// How small the pieces of a launch may get where there are few blocks. Every piece has a price:
// parts are written and merged, and each block reads the gates or maps of its piece again.
struct Pieces {
  int64_t shortest_part;  // rows of a part of a reduction down columns
  int rows_per_factor;    // rows of a block that share one reading of the factor
  int64_t channels;       // of a block in the last pass
  double map_share;       // bytes of maps that the last pass reads, beside x's
};

// Bounds that keep what is no pass over x small; where x itself is so small that a pass over it
// takes no longer than a launch, filling the device comes first.
const Pieces& pieces_of(const ForwardProblem& p, int64_t samples);

// Blocks of kThreads that fill a quarter of the device's threads: with four loads of 16 bytes in
// flight for each, 32 KB a multiprocessor of an H100, where 23 KB saturate its memory.
int64_t wanted_blocks(const DeviceLimits& device);

// What a kernel's arrays take of shared memory.
template <class Shared, class... Arguments>
int64_t shared_bytes(const Arguments&... arguments) {
  SharedCarver carver(nullptr);
  Shared(carver, arguments...);
  return static_cast<int64_t>(carver.bytes());
}

// plan_last_pass.cpp
ScaleGeometry plan_last_pass(const ForwardProblem& p, int64_t samples, int map_splits,
                             const DeviceLimits& device);

}  // namespace cbam::cuda
