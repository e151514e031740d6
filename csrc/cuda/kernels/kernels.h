// What each kernel of the streaming forward is handed, the shared memory it takes, and its
// launcher. Plain structs: the planner fills the geometry, forward.cu the pointers. No torch, no
// CUDA headers.
//
// Each sample of x is seen as a matrix whose columns lie side by side in memory: channels x pixels
// where channels come first, pixels x channels where they come last. Pooling over space walks along
// the rows of the one and down the columns of the other; pooling over channels the other way round.
#pragma once

#include <cstdint>

#include "../../attention_math.h"
#include "../../problem.h"
#include "../primitives/shared_storage.cuh"

namespace cbam::cuda {

// Bytes of a vector: one load or store of a thread.
constexpr int kVectorBytes = 16;
// Of a line of the caches.
constexpr int kLineBytes = 128;

// Threads of a block where the kernel's registers allow any number: 8 warps.
constexpr int kThreads = 256;

using Stream = void*;  // cudaStream_t

// A launch may use this much shared memory without asking for more.
constexpr int64_t kSharedWithoutOptIn = 48 * 1024;

// The first compute capability with clusters and bulk copies, with launches that overlap, and with
// asynchronous copies.
constexpr int kClusterCapability = 90, kOverlapCapability = 90, kAsyncCapability = 80;
// Blocks of a cluster that every device with clusters takes.
constexpr int kPortableCluster = 8;

// The grid of one launch.
struct Grid {
  int64_t blocks = 0;
  int threads = 0;
  int64_t shared_bytes = 0;
  int64_t shared_limit = kSharedWithoutOptIn;  // of a block of the device
  int cluster = 1;                             // blocks of a cluster
  bool cooperative = false;                    // all blocks run at once
  bool overlaps = false;                       // starts before the launch before it has ended
};

struct Matrix {
  const void* data;
  int64_t sample_stride, row_stride;  // in elements
  int rows, cols;
};

// What follows the block (problem.h). The last passes have a walk for each of these.
enum class Follows {
  kNothing,
  kRelu,
  kResidual,  // and perhaps a ReLU
};
// The same as a kernel is handed it: the residual as rows, like those of x's matrix.
struct EndingRows {
  const void* residual;  // or null
  int64_t sample_stride, row_stride;
  bool relu;
};

// How columns are read.
enum class Access {
  kScalar,  // one element at a time
  kVector,  // 16 bytes at a time: every row starts on a multiple of 16 bytes and ends on one
  kPacked,  // 16 bytes at a time over rows that follow each other without a gap: a vector may span
            // rows, but what it holds repeats every `row_group` rows
};

// What a reduction leaves: a mean and a maximum for each output (row or column), in `splits` parts.
// With one part this is the final result.
struct Parts {
  void* values;     // acc [samples, splits, 2, outputs]: the part's sum over the whole count; max
  int32_t* argmax;  // [samples, splits, outputs], or null
  int splits;
};

// Which part of the work a block of a reduction takes: `tile` outputs of one sample and `span` of
// the elements that go into them.
struct ReductionGeometry {
  bool along_rows;
  int tiles, tile;   // rows: rows of a block; columns: vectors side by side in a block
  int splits, span;  // elements of a row, or rows; a multiple of what one vector covers
  int lanes;         // rows: threads that share a row
  Access access;     // columns; rows: kPacked where a block takes them as one piece, else kVector
  int period;        // columns: vectors that cover row_group rows
  int row_group;     // columns: 1 unless access is kPacked
  bool reverse;      // last block first: starts with what the pass before left in the cache

  CBAM_INLINE_MEMBER int64_t blocks_per_sample() const { return int64_t{tiles} * splits; }
};

struct Reduction {
  Matrix x;
  const void* factor;  // acc: [samples, cols] along rows, [samples, rows] along columns; or null
  ReductionGeometry geometry;
  Parts out;
};

// reduce_rows.cu, reduce_packed_rows.cu, reduce_columns.cu
void reduce_rows(DType dtype, const Reduction& r, const Grid& grid, Stream stream);
void reduce_packed_rows(DType dtype, const Reduction& r, const Grid& grid, Stream stream);
void reduce_columns(DType dtype, const Reduction& r, const Grid& grid, Stream stream);

// Blocks of a reduction down columns that a multiprocessor runs at once, by their registers.
constexpr int kColumnBlocks = 3;

template <class A>
struct RowShared {
  A* factor;        // [span], or null
  A* sum;           // [warps]: where a row takes all of the block
  A* max;           // [warps]
  int32_t* argmax;  // [warps]

  CBAM_INLINE_MEMBER RowShared(SharedCarver& carver, const ReductionGeometry& g, bool scaled)
      : factor(scaled ? carver.array<A>(g.span, "factor") : nullptr),
        sum(carver.array<A>(kThreads / 32, "sum")),
        max(carver.array<A>(kThreads / 32, "max")),
        argmax(carver.array<int32_t>(kThreads / 32, "argmax")) {}
};

template <class T>
struct PackedRowShared {
  T* rows;  // [tile, cols]

  CBAM_INLINE_MEMBER PackedRowShared(SharedCarver& carver, const ReductionGeometry& g)
      : rows(carver.array<T>(int64_t{1} * g.tile * g.span, "rows")) {}
};

template <class A>
struct ColumnShared {
  A* factor;        // [span], or null
  A* sum;           // [threads below each other, elements of a vector, threads side by side + 1]
  A* max;           // the same
  int32_t* argmax;  // the same

  CBAM_INLINE_MEMBER ColumnShared(SharedCarver& carver, const ReductionGeometry& g, bool scaled,
                                  int elements)
      : factor(scaled ? carver.array<A>(g.span, "factor") : nullptr),
        sum(carver.array<A>(partials(g, elements), "sum")),
        max(carver.array<A>(partials(g, elements), "max")),
        argmax(carver.array<int32_t>(partials(g, elements), "argmax")) {}

 private:
  CBAM_INLINE_MEMBER static int partials(const ReductionGeometry& g, int elements) {
    return kThreads / g.tile * elements * (g.tile + 1);
  }
};

// Samples that share one walk over the MLP's weights; few where more would leave the device idle.
constexpr int kSamplesPerWalk = 8, kFewSamples = 2;
// Bytes of the vectors of a walk that a block stages at a time.
constexpr int kWalkBytes = 32 * 1024;

// How the work on the MLP's layers is cut. Samples of a block are kSamplesPerWalk or kFewSamples.
struct MlpGeometry {
  bool together;  // both layers in one launch, whose blocks take all hidden units and all channels
  int hidden_samples;
  int unit_warps;  // warps of a block that share the hidden units, 1 to 8; the others, its channels
  int gate_samples;
  bool vectors;  // every row of fc2_weight starts on a multiple of 16 bytes and ends on one
};

// channel_gate.cu: the shared MLP of both pooled vectors, in a launch for each layer or in one.
struct ChannelGate {
  int samples, channels, hidden_units;
  MlpGeometry geometry;
  DType dtype;  // of the weights
  const void* fc1_weight;
  const void* fc1_bias;
  const void* fc2_weight;
  const void* fc2_bias;
  Parts parts;      // of the pool over space
  void* pooled;     // acc [samples, 2, channels], or null where nothing reads the merged parts
  int32_t* argmax;  // [samples, channels], or null
  void* hidden;     // acc [samples, 2, hidden_units]: after the ReLU, of mean and of max
  void* gate;       // acc [samples, channels]
};

constexpr int kUnitsPerWarp = 4;  // hidden units of a warp in the first layer
constexpr int kUnitsTogether = kThreads / 32 * kUnitsPerWarp;  // of a block, at most
constexpr int kGateChannels = 128;  // channels, and threads, of a block in the second layer
constexpr int kUnitChunk = 128;     // hidden units staged at a time by what walks along them

void hidden_layer(const ChannelGate& p, const Grid& grid, Stream stream);
void gate_layer(const ChannelGate& p, const Grid& grid, Stream stream);
void both_layers(const ChannelGate& p, const Grid& grid, Stream stream);

template <class A, int kSamples>
struct HiddenShared {
  static constexpr int kVectors = 2 * kSamples;
  // Elements from one channel to the next: padded against bank conflicts.
  static constexpr int kPitch = kVectors + (kVectors > 4 ? kVectorBytes / int{sizeof(A)} : 0);
  static constexpr int kChunk = kWalkBytes / (kVectors * int{sizeof(A)});  // channels at a time
  static constexpr int kSums = kUnitsPerWarp * kVectors;                   // of a warp

  A* pooled;   // [kChunk, kPitch]
  A* bias;     // [warps, kUnitsPerWarp]
  A* partial;  // [warps, kSums]

  CBAM_INLINE_MEMBER explicit HiddenShared(SharedCarver& carver)
      : pooled(carver.array<A>(kChunk * kPitch, "pooled")),
        bias(carver.array<A>(kUnitsTogether, "bias")),
        partial(carver.array<A>(kThreads / 32 * kSums, "partial")) {}
};

template <class A, int kSamples>
struct GateShared {
  A* hidden;  // [kUnitChunk, kSamples]: of mean and max, added

  CBAM_INLINE_MEMBER explicit GateShared(SharedCarver& carver)
      : hidden(carver.array<A>(kUnitChunk * kSamples, "hidden")) {}
};

template <class A, int kSamples>
struct BothShared {
  HiddenShared<A, kSamples> first;
  A* hidden;  // [kUnitsTogether, samples]: the sum of both hidden vectors

  CBAM_INLINE_MEMBER explicit BothShared(SharedCarver& carver)
      : first(carver), hidden(carver.array<A>(kUnitsTogether * kSamples, "hidden")) {}
};

// The extents of an image and of the convolution's kernel: as in Shape, for index arithmetic in 32
// bits.
struct Space {
  int depth, height, width;
  int kernel_depth, kernel_height, kernel_width;

  CBAM_INLINE_MEMBER int pixels() const { return depth * height * width; }
  CBAM_INLINE_MEMBER int taps() const { return kernel_depth * kernel_height * kernel_width; }
};

CBAM_INLINE Space space_of(const Shape& s) {
  return {static_cast<int>(s.depth),         static_cast<int>(s.height),
          static_cast<int>(s.width),         static_cast<int>(s.kernel_depth),
          static_cast<int>(s.kernel_height), static_cast<int>(s.kernel_width)};
}

// A box of pixels: where it begins, and its extents.
struct PixelBox {
  int z, y, x;
  int depth, height, width;

  CBAM_INLINE_MEMBER int pixels() const { return depth * height * width; }
  // The number in the image of the box's pixel at this place.
  CBAM_INLINE_MEMBER int pixel(const Space& s, int from_z, int from_y, int from_x) const {
    return ((z + from_z) * s.height + y + from_y) * s.width + x + from_x;
  }
};

// The smallest around so many pixels that follow each other.
CBAM_INLINE PixelBox box_around(const Space& s, int first, int count) {
  const int plane = s.height * s.width, last = first + count - 1;
  const int z = first / plane, depth = last / plane - z + 1;
  if (depth > 1) return {z, 0, 0, depth, s.height, s.width};
  const int y = first % plane / s.width, height = last % plane / s.width - y + 1;
  if (height > 1) return {z, y, 0, 1, height, s.width};
  return {z, y, first % s.width, 1, 1, count};
}

// Neighbours that a thread of the convolution computes together.
constexpr int kRun = 4;

// Length of a staged row of a map: whole runs and the halo.
CBAM_INLINE int staged_width(int width, int kernel_width) {
  return (width + kRun - 1) / kRun * kRun + kernel_width - 1;
}

// How the pixels of an image are cut into boxes, each of which a block stages with a halo.
struct BoxGeometry {
  int box_depth, box_height, box_width;
  int boxes_depth, boxes_height, boxes_width;

  CBAM_INLINE_MEMBER int pixels() const { return box_depth * box_height * box_width; }
  CBAM_INLINE_MEMBER int64_t boxes() const {
    return int64_t{boxes_depth} * boxes_height * boxes_width;
  }
  // Elements of one staged map.
  CBAM_INLINE_MEMBER int64_t staged(const Space& s) const {
    return int64_t{1} * (box_depth + s.kernel_depth - 1) * (box_height + s.kernel_height - 1) *
           staged_width(box_width, s.kernel_width);
  }
};

// Which box of pixels and which channels a block of the last pass takes.
struct ScaleGeometry : BoxGeometry {
  int chunks, chunk;  // channels of a block
  Access access;
  int period, row_group;  // as in ReductionGeometry; kPacked only
  int threads_along;      // threads side by side along a group of rows; kPacked only
};

// spatial_gate.cu: sigmoid(conv(maps) + bias), and out = x * channel_gate * spatial_gate; or one
// half of it, spatial_logits or scale.
struct SpatialGate {
  Matrix x;
  void* out;
  int64_t out_sample_stride, out_row_stride;
  EndingRows ending;
  bool channels_first;
  int channels;
  Space space;
  ScaleGeometry geometry;
  Parts maps;
  const void* channel_gate;  // acc [samples, channels]
  DType weight_dtype;
  ConvWeight conv_weight;
  const void* conv_bias;  // [1] or null
  const void* logits;     // acc [samples, pixels], of scale
  void* saved_gate;       // acc [samples, pixels], or the logits of spatial_logits; this and the
                          // following null in inference
  void* saved_maps;       // x's dtype [samples, 2, pixels]
  int32_t* saved_argmax;  // [samples, pixels]; null where maps.argmax is that already
};

// Blocks of the last pass that a multiprocessor runs at once, by their registers.
constexpr int kScaleBlocks = 3;

void spatial_gate(DType dtype, const SpatialGate& p, const Grid& grid, Stream stream);
void spatial_logits(DType dtype, const SpatialGate& p, const Grid& grid, Stream stream);
void scale(DType dtype, const SpatialGate& p, const Grid& grid, Stream stream);

template <class A>
struct ScaleShared {
  A* maps;     // [2, box with its halo, rows padded]
  A* weight;   // [2, taps], and the bias
  A* spatial;  // [pixels of the box]
  A* channel;  // [chunk]
  int* pixel;  // [pixels of the box]: their number in the image

  CBAM_INLINE_MEMBER ScaleShared(SharedCarver& carver, const ScaleGeometry& g, const Space& space)
      : maps(carver.array<A>(2 * g.staged(space), "maps")),
        weight(carver.array<A>(int64_t{2} * space.taps() + 1, "weight")),
        spatial(carver.array<A>(g.pixels(), "spatial")),
        channel(carver.array<A>(g.chunk, "channel")),
        pixel(carver.array<int>(g.pixels(), "pixel")) {}
};

}  // namespace cbam::cuda
