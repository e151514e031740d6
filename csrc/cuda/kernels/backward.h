// What each kernel of the streaming backward, and those that sum over the batch after either
// strategy, is handed, the shared memory it takes, and its launcher; as kernels.h for the forward.
// With p = dout * x, for every sample:
//
//   d_spatial[s]  = sum_c p * channel_gate[c]     q[c] = sum_s p * spatial_gate[s]       tile sums
//   dz            = d_spatial * spatial_gate * (1 - spatial_gate)
//   d_mean, d_max = convolution transposed (dz), d_mean over channels                    stencil
//   d_channel[c]  = q[c] + sum_s x * (d_mean[s] + d_max[s] where c is s's maximum)       map terms
//   dm            = d_channel * channel_gate * (1 - channel_gate), through the MLP: d_avg, d_top
//   dx            = (dout * spatial_gate + d_mean + d_max where c is s's maximum) * channel_gate
//                   + d_avg / S + d_top where s is c's maximum                           last pass
#pragma once

#include "kernels.h"

namespace cbam::cuda {

// Which part of a sample's matrix a block takes: `tile` columns of `span` rows.
struct TileGeometry {
  Access access;
  int row_group;  // rows that a vector's place repeats after; 1 unless access is kPacked
  int tiles, tile;
  int splits, span;
  int chunk;          // sums: rows of a warp whose parts stand in shared memory at a time
  int row_lanes_log;  // sums: the logarithm of the lanes that add the parts of one row
  int warp_parts;     // sums: values of a warp in shared memory, parts of rows or sums of columns
  int threads_along;  // last pass: threads side by side along a row of the tile
  bool reverse;

  CBAM_INLINE_MEMBER int64_t blocks_per_sample() const { return int64_t{tiles} * splits; }
  // Elements of a row group of the tile.
  CBAM_INLINE_MEMBER int group_columns() const { return row_group * tile; }
};

// Columns of a tile of sums, at most: a lane keeps what belongs to its columns in registers.
constexpr int kTileColumns = 256;
// The same for channels that are columns of the map terms, which have no more than their sums:
// every tile reads what belongs to all pixels again.
constexpr int kTermChannels = 512;
// Vectors of a lane where rows are packed, and so of a row group, at most.
constexpr int kPackedVectors = 2, kMostPackedVectors = 32 * kPackedVectors;
// Rows whose parts a warp holds at a time, one part from each lane, padded against bank conflicts;
// or groups of packed rows, two parts from each vector.
constexpr int kPartRows = 12, kPartPitch = 33, kPartGroups = 6;

template <class A>
struct CrossShared {
  A* row_factor;  // [span]
  A* col_factor;  // [columns of a row group]
  A* parts;       // [warps, warp_parts]

  CBAM_INLINE_MEMBER CrossShared(SharedCarver& carver, const TileGeometry& g)
      : row_factor(carver.array<A>(g.span, "row_factor")),
        col_factor(carver.array<A>(g.group_columns(), "col_factor")),
        parts(carver.array<A>(kThreads / 32 * g.warp_parts, "parts")) {}
};

// What map terms hold for pixels: what all channels get, what the channel of the maximum gets
// instead, and its number.
template <class A>
struct TermsShared {
  A* mean;           // [columns of a row group, or span]: pixels
  A* both;           // the same
  int32_t* channel;  // the same
  A* parts;          // [warps, warp_parts]

  CBAM_INLINE_MEMBER TermsShared(SharedCarver& carver, const TileGeometry& g, bool channels_first)
      : TermsShared(carver, g, int64_t{channels_first ? g.group_columns() : g.span}) {}

 private:
  CBAM_INLINE_MEMBER TermsShared(SharedCarver& carver, const TileGeometry& g, int64_t pixels)
      : mean(carver.array<A>(pixels, "mean")),
        both(carver.array<A>(pixels, "both")),
        channel(carver.array<int32_t>(pixels, "channel")),
        parts(carver.array<A>(kThreads / 32 * g.warp_parts, "parts")) {}
};

// Sums in parts, to be added in their order: acc [samples, parts, count].
struct Sums {
  void* values;
  int parts;
};

// cross_sums.cu: both sums of p in one reading of x and dout.
struct CrossSums {
  Matrix x, dout;
  const void* row_factor;  // acc [samples, rows]
  const void* col_factor;  // acc [samples, cols]
  TileGeometry geometry;
  Sums rows, cols;  // rows: geometry.tiles parts; cols: geometry.splits parts
};
void cross_sums(DType dtype, const CrossSums& p, const Grid& grid, Stream stream);

// total_sums.cu: the parts of both, added up.
struct TotalSums {
  int64_t samples;
  int rows, cols;
  Sums row_parts, col_parts;
  void* row_totals;  // acc [samples, rows]
  void* col_totals;  // acc [samples, cols]
};
void total_sums(DType dtype, const TotalSums& p, const Grid& grid, Stream stream);

// map_terms.cu: sum_s x * (d_mean[s] + d_max[s] where c is s's maximum).
struct MapTerms {
  Matrix x;
  bool channels_first;
  const void* d_maps;             // acc [samples, 2, pixels]
  const int32_t* channel_argmax;  // [samples, pixels]
  TileGeometry geometry;
  Sums channels;  // tiles parts where channels come first, else splits
};
void map_terms(DType dtype, const MapTerms& p, const Grid& grid, Stream stream);

// stencil.cu: from the sums for the spatial gate to the gradients of the maps and of the
// convolution.
struct Stencil {
  int channels;
  Space space;
  BoxGeometry geometry;
  Sums d_spatial;
  const void* d_spatial_gate;  // acc [samples, pixels], or null: what else reached the gate
  const void* spatial_gate;    // acc [samples, pixels], or null: d is that of the logits
  const void* maps;            // x's dtype [samples, 2, pixels]
  DType weight_dtype;
  ConvWeight conv_weight;
  void* d_maps;  // acc [samples, 2, pixels]: d_mean / channels, d_max
  void* d_conv;  // acc [samples * boxes, 2 * taps + 1], the bias last; or null
};
void stencil(DType dtype, const Stencil& p, const Grid& grid, Stream stream);

// Taps in a row of the convolution's kernel whose gradients a warp sums together: a value of dz is
// read once for them, in both maps.
constexpr int kTapsTogether = 4;

// Elements that dz of a box and its halo takes, with what is read behind it.
CBAM_INLINE int64_t staged_dz(const BoxGeometry& g, const Space& space) {
  return g.staged(space) + kTapsTogether - 1;
}

template <class A>
struct StencilShared {
  A* dz;      // [box with its halo, rows padded]
  A* weight;  // [2, taps]
  A* maps;    // [2, pixels of the box], in the place of the weights, where their gradients are
              // asked for

  CBAM_INLINE_MEMBER StencilShared(SharedCarver& carver, const BoxGeometry& g, const Space& space,
                                   bool conv)
      : dz(carver.array<A>(staged_dz(g, space), "dz")),
        weight(carver.array<A>(values(g, space, conv), "weight or maps")),
        maps(weight) {}

 private:
  CBAM_INLINE_MEMBER static int64_t values(const BoxGeometry& g, const Space& space, bool conv) {
    const int64_t weights = int64_t{2} * space.taps(), maps = conv ? 2 * g.pixels() : 0;
    return weights > maps ? weights : maps;
  }
};

// channel_gate_backward.cu: the MLP backwards, in a launch for each layer or in one.
struct MlpBackwardGeometry {
  bool together;     // as in MlpGeometry
  int gate_samples;  // of a block: kSamplesPerWalk or kFewSamples
  int units_along;   // threads side by side over hidden units, a power of two up to 32
  int hidden_samples;
};
struct ChannelGateBackward {
  int samples, channels, hidden_units;
  int64_t pixels;
  MlpBackwardGeometry geometry;
  DType dtype;  // of the weights
  const void* fc1_weight;
  const void* fc2_weight;
  Sums cross, terms;           // the parts of d_channel
  const void* d_channel_gate;  // acc [samples, channels], or null: what else reached the gate
  const void* channel_gate;    // acc [samples, channels]
  const void* hidden;          // acc [samples, 2, hidden_units]
  void* dm;                    // acc [samples, channels]
  void* d_hidden;  // acc [samples, 2, hidden_units]: before the ReLU, of mean and of max
  void* d_pooled;  // acc [samples, 2, channels]: d_avg / pixels, d_top
};
// Hidden units of a thread in the second layer's backward, `units_along` apart.
constexpr int kBackwardUnits = 2;
// Threads of a block there: doubles take twice the shared memory.
template <class A>
constexpr int kGateBackwardThreads = sizeof(A) == 8 ? 256 : 512;
// Threads of a block in the first layer's, and the channels of each.
constexpr int kHiddenBackwardThreads = 128;
CBAM_INLINE constexpr int backward_channels(int samples) { return samples == kFewSamples ? 1 : 2; }

void gate_layer_backward(const ChannelGateBackward& p, const Grid& grid, Stream stream);
void hidden_layer_backward(const ChannelGateBackward& p, const Grid& grid, Stream stream);
void both_layers_backward(const ChannelGateBackward& p, const Grid& grid, Stream stream);

template <class A, int kSamples>
struct GateBackwardShared {
  static constexpr int kChunk = kWalkBytes / (kSamples * int{sizeof(A)});  // channels at a time
  static_assert(kSamples * kChunk >= kGateBackwardThreads<A> / 32 * kSamples * kBackwardUnits * 32);

  A* dm;  // [kChunk, kSamples]; behind the walk the warps' sums, [warps, kSamples, units]

  CBAM_INLINE_MEMBER explicit GateBackwardShared(SharedCarver& carver)
      : dm(carver.array<A>(kChunk * kSamples, "dm")) {}
};

template <class A, int kSamples>
struct HiddenBackwardShared {
  A* d_hidden;  // [kUnitChunk, 2 * kSamples]

  CBAM_INLINE_MEMBER explicit HiddenBackwardShared(SharedCarver& carver)
      : d_hidden(carver.array<A>(kUnitChunk * 2 * kSamples, "d_hidden")) {}
};

template <class A, int kSamples>
struct BothBackwardShared {
  GateBackwardShared<A, kSamples> second;
  A* d_hidden;  // [kUnitsTogether, samples, mean and maximum]

  CBAM_INLINE_MEMBER explicit BothBackwardShared(SharedCarver& carver)
      : second(carver), d_hidden(carver.array<A>(kUnitsTogether * 2 * kSamples, "d_hidden")) {}
};

// input_gradient.cu: the last pass, dout -> dx.
struct InputGradient {
  Matrix dout;
  void* dx;
  int64_t dx_sample_stride, dx_row_stride;
  bool channels_first;
  const void* spatial_gate;       // acc [samples, pixels]
  const void* d_maps;             // acc [samples, 2, pixels]
  const int32_t* channel_argmax;  // [samples, pixels]
  const void* channel_gate;       // acc [samples, channels]
  const void* d_pooled;           // acc [samples, 2, channels]
  const int32_t* pixel_argmax;    // [samples, channels]
  TileGeometry geometry;
};
void input_gradient(DType dtype, const InputGradient& p, const Grid& grid, Stream stream);

// What belongs to pixels or channels: a gate, what is added to every element, what is added where
// the other one's index is `index`. Four arrays behind each other, so that one address is enough.
template <class A>
class StagedTerms {
 public:
  template <class Carver>
  CBAM_INLINE_MEMBER StagedTerms(Carver& carver, int64_t count)
      : pitch_(static_cast<int>((count + kTogether - 1) / kTogether * kTogether)),
        values_(carver.template array<A>(4 * int64_t{pitch_}, "terms")) {}

  CBAM_INLINE_MEMBER A* gate() const { return values_; }
  CBAM_INLINE_MEMBER A* first() const { return values_ + pitch_; }
  CBAM_INLINE_MEMBER A* second() const { return values_ + 2 * pitch_; }
  CBAM_INLINE_MEMBER int32_t* index() const {
    return reinterpret_cast<int32_t*>(values_ + 3 * pitch_);
  }
  // The same from number `skipped` on; for A of 4 bytes.
  CBAM_INLINE_MEMBER StagedTerms from(int64_t skipped) const {
    static_assert(sizeof(A) == sizeof(int32_t));
    StagedTerms rest = *this;
    rest.values_ += skipped;
    return rest;
  }

 private:
  static constexpr int kTogether = kVectorBytes / static_cast<int>(sizeof(A));

  int pitch_;
  A* values_;
};

// The same of one row of the last pass, in one piece.
template <class A>
struct alignas(16) RowTerms {
  A gate, first, second;
  int32_t index;
};

template <class A>
struct InputGradientShared {
  RowTerms<A>* rows;       // [span]
  StagedTerms<A> columns;  // [tile]

  CBAM_INLINE_MEMBER InputGradientShared(SharedCarver& carver, const TileGeometry& g)
      : rows(carver.array<RowTerms<A>>(g.span, "rows")), columns(carver, g.tile) {}
};

// weight_gradients.cu: sums over the batch.
struct Vectors {
  const void* values;  // acc [count, parts, length]; the parts of a vector are added
  int64_t pitch;       // elements from one vector to the next
  int64_t count;
  int parts, length;  // 1 or 2 parts
};
// Those that nobody asked for are vectors of length 0.
struct OuterSum {
  Vectors a, b;  // as many of each
  void* out;     // the weights' dtype [a.length, b.length]
};
struct OuterSums {
  int tile;  // rows, and columns, of a block's outputs: kSmallTile or kLargeTile
  OuterSum first, second;
};
struct VectorSum {
  Vectors a;  // of one part
  double scale;
  void* out;      // the weights' dtype [length]
  ConvWeight of;  // whose gradient it is, if of a weight of the convolution: the order of `out`
};
constexpr int kMostVectorSums = 4;
struct VectorSums {
  VectorSum sum[kMostVectorSums];
};
constexpr int kSmallTile = 16, kLargeTile = 32;
constexpr int kOuterStaged = 2048;  // elements of a, and of b, that a block stages at a time
constexpr int kOuterMerged = 8;     // outputs of a thread that the warps of a block add together
constexpr int kSumThreads = 512;    // of a block of vector_sums
constexpr int kSummedTogether = 8;  // elements of its vectors that a block of vector_sums sums
constexpr int64_t kMostSummed = (int64_t{1} << 31) - (1 << 16);  // they are counted in 32 bits

// Blocks of each.
CBAM_INLINE int64_t outer_blocks(int64_t rows, int64_t cols, int tile) {
  return (rows + tile - 1) / tile * ((cols + tile - 1) / tile);
}
CBAM_INLINE int64_t vector_blocks(int64_t length) {
  return (length + kSummedTogether - 1) / kSummedTogether;
}

// `dtype` is that of the weights; the vectors are in its accumulator, which is x's too.
void outer_sums(DType dtype, const OuterSums& p, const Grid& grid, Stream stream);
void vector_sums(DType dtype, const VectorSums& p, const Grid& grid, Stream stream);

template <class A>
struct OuterShared {
  A* a;        // [kOuterStaged / tile, tile]
  A* b;        // the same
  A* partial;  // [warps, kOuterMerged, 32]

  CBAM_INLINE_MEMBER explicit OuterShared(SharedCarver& carver)
      : a(carver.array<A>(kOuterStaged, "a")),
        b(carver.array<A>(kOuterStaged, "b")),
        partial(carver.array<A>(kThreads * kOuterMerged, "partial")) {}
};

template <class A>
struct VectorSumsShared {
  A* sum;  // [warps, kSummedTogether]

  CBAM_INLINE_MEMBER explicit VectorSumsShared(SharedCarver& carver)
      : sum(carver.array<A>(kSumThreads / 32 * kSummedTogether, "sum")) {}
};

}  // namespace cbam::cuda
