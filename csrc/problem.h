// What every backend is handed: plain structs of sizes, strides and raw pointers.
// ops.cpp fills them after checking the arguments; kernels read nothing else.
#pragma once

#include <cstdint>

#include "inline.h"

namespace cbam {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };

CBAM_INLINE constexpr int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
// Of what a storage type is computed in.
constexpr int64_t bytes_of_accumulator(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

// x is [samples, channels, depth, height, width]; an absent dimension is an extent of 1.
struct Shape {
  int64_t samples;
  int64_t channels;
  int64_t hidden;
  int64_t depth, height, width;
  int64_t kernel_depth, kernel_height, kernel_width;

  CBAM_INLINE_MEMBER int64_t pixels() const { return depth * height * width; }
  CBAM_INLINE_MEMBER int64_t taps() const { return kernel_depth * kernel_height * kernel_width; }
};

// In elements. Pixels are numbered along width, then height, then depth, and every tensor of x's
// size either has pixel == 1 (channels first) or channel == 1 (channels last).
struct Strides {
  int64_t sample;
  int64_t channel;
  int64_t pixel;

  CBAM_INLINE_MEMBER bool channels_first() const { return pixel == 1; }
};

// Those of the convolution: [2, kernel_depth, kernel_height, kernel_width], or as channels_last has
// them, with the two maps' side by side.
struct ConvWeight {
  const void* data;
  bool maps_last;

  // Where number i of [2, taps] stands.
  CBAM_INLINE_MEMBER int64_t place(int64_t i, int64_t taps) const {
    return maps_last ? i % taps * 2 + i / taps : i;
  }
};

// `acc` below is double where x is double, else float.
struct Weights {
  DType dtype;             // acc or x's; of all of them
  const void* fc1_weight;  // [hidden, channels]
  const void* fc1_bias;    // [hidden] or null
  const void* fc2_weight;  // [channels, hidden]
  const void* fc2_bias;    // [channels] or null
  ConvWeight conv_weight;
  const void* conv_bias;  // [1] or null
};

// Written by the forward. The first three always, the others only when backward will follow.
struct Saved {
  void* channel_gate;     // acc [samples, channels]
  void* pooled;           // acc [samples, 2, channels]: mean, max over space
  void* hidden;           // acc [samples, 2, hidden]: after the ReLU, of mean and of max
  void* spatial_gate;     // acc [samples, pixels] or null
  void* maps;             // x's dtype [samples, 2, pixels]: mean, max over channels; or null
  int32_t* pixel_argmax;  // [samples, channels]: the pixel that holds a channel's maximum; or null
  int32_t* channel_argmax;  // [samples, pixels]: the channel that holds a pixel's maximum; or null
};

// What follows the block in the pass that writes out: relu(block + residual), or one of both.
struct Ending {
  const void* residual;  // x's dtype, or null
  Strides strides;       // of the residual; same kind as x's
  bool relu;
};

// What of a direction a call runs. Where the spatial gate's logits are normalised over the batch,
// the caller does that between two calls: forwards kLogits and kScale, backwards kScale and
// kLogits.
enum class Part {
  kAll,
  kLogits,  // forwards all but the sigmoid and the last pass; backwards from what reaches the
            // logits
  kScale,   // from the channel gate and the logits to the spatial gate and out; backwards what
            // reaches both gates through out
};

struct ForwardProblem {
  DType dtype;
  Shape shape;
  Strides strides;      // of x
  Strides out_strides;  // same kind as strides
  const void* x;
  void* out;        // null in kLogits
  Weights weights;  // null in kScale
  Saved saved;      // in kLogits the logits stand for the spatial gate; in kScale there are gates
                    // alone, of which forwards the channel's is read
  const void* logits;  // acc [samples, pixels] in kScale forwards, else null
  Part part;
  Ending ending;  // none in kLogits

  CBAM_INLINE_MEMBER bool training() const { return saved.spatial_gate != nullptr; }
};

// Each gradient is null where it was not asked for.
struct Gradients {
  void* x;           // x's dtype, dx_strides
  void* fc1_weight;  // dtype, shape and order of the weight; so are the following
  void* fc1_bias;
  void* fc2_weight;
  void* fc2_bias;
  void* conv_weight;
  void* conv_bias;
  void* channel_gate;  // acc [samples, channels]; this and the following in kScale, where they are
                       // all
  void* spatial_gate;  // acc [samples, pixels]

  CBAM_INLINE_MEMBER bool mlp() const { return fc1_weight || fc1_bias || fc2_weight || fc2_bias; }
  CBAM_INLINE_MEMBER bool conv() const { return conv_weight || conv_bias; }
};

// Extends the forward's problem: x, weights and saved are read; out, logits and ending are
// not used.
struct BackwardProblem : ForwardProblem {
  Strides dout_strides;        // same kind as strides
  Strides dx_strides;          // same kind as strides
  const void* dout;            // x's dtype
  const void* d_channel_gate;  // acc [samples, channels] or null: what else reached the gate; in
                               // kLogits all that did, but for what comes through the logits
  const void* d_spatial_gate;  // acc [samples, pixels] or null; in kLogits what reached the logits
  Gradients gradients;
};

}  // namespace cbam
