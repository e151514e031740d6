// What the launches of forward.cu and backward.cu are handed is cut from: a problem's part that is
// some of its samples, a tensor as the kernels see it, and the parts of the scratch memory.
#pragma once

#include "kernels/resident.h"

namespace cbam::cuda {

// `count` elements of `size` bytes further on; null stays null.
inline void* further(void* pointer, int64_t count, int64_t size) {
  return pointer ? static_cast<char*>(pointer) + count * size : nullptr;
}
inline const void* further(const void* pointer, int64_t count, int64_t size) {
  return pointer ? static_cast<const char*>(pointer) + count * size : nullptr;
}
inline int32_t* further(int32_t* pointer, int64_t count) {
  return pointer ? pointer + count : nullptr;
}

// Moves what a forward has, to samples [first, first + count).
inline void select_samples(ForwardProblem& p, int64_t first, int64_t count) {
  const Shape& s = p.shape;
  const int64_t element = bytes_of(p.dtype), acc = bytes_of_accumulator(p.dtype);
  p.x = further(p.x, first * p.strides.sample, element);
  p.logits = further(p.logits, first * s.pixels(), acc);
  p.out = further(p.out, first * p.out_strides.sample, element);
  p.ending.residual = further(p.ending.residual, first * p.ending.strides.sample, element);
  p.saved.channel_gate = further(p.saved.channel_gate, first * s.channels, acc);
  p.saved.pooled = further(p.saved.pooled, first * 2 * s.channels, acc);
  p.saved.hidden = further(p.saved.hidden, first * 2 * s.hidden, acc);
  p.saved.spatial_gate = further(p.saved.spatial_gate, first * s.pixels(), acc);
  p.saved.maps = further(p.saved.maps, first * 2 * s.pixels(), element);
  p.saved.pixel_argmax = further(p.saved.pixel_argmax, first * s.channels);
  p.saved.channel_argmax = further(p.saved.channel_argmax, first * s.pixels());
  p.shape.samples = count;
}

inline void select_samples(BackwardProblem& p, int64_t first, int64_t count) {
  const Shape& s = p.shape;
  const int64_t element = bytes_of(p.dtype), acc = bytes_of_accumulator(p.dtype);
  p.dout = further(p.dout, first * p.dout_strides.sample, element);
  p.d_channel_gate = further(p.d_channel_gate, first * s.channels, acc);
  p.d_spatial_gate = further(p.d_spatial_gate, first * s.pixels(), acc);
  p.gradients.x = further(p.gradients.x, first * p.dx_strides.sample, element);
  p.gradients.channel_gate = further(p.gradients.channel_gate, first * s.channels, acc);
  p.gradients.spatial_gate = further(p.gradients.spatial_gate, first * s.pixels(), acc);
  select_samples(static_cast<ForwardProblem&>(p), first, count);
}

// A tensor of x's size as the kernels see it.
inline Matrix matrix_of(const ForwardProblem& p, const void* data, const Strides& strides) {
  const bool first = p.strides.channels_first();
  const int channels = static_cast<int>(p.shape.channels);
  const int pixels = static_cast<int>(p.shape.pixels());
  return {data, strides.sample, first ? strides.channel : strides.pixel, first ? channels : pixels,
          first ? pixels : channels};
}

inline EndingRows ending_of(const ForwardProblem& p) {
  const Ending& e = p.ending;
  return {e.residual, e.strides.sample,
          p.strides.channels_first() ? e.strides.channel : e.strides.pixel, e.relu};
}

// What a resident kernel is handed in both directions.
inline void set_resident(Resident& r, const ForwardProblem& p, void* exchange) {
  r.samples = p.shape.samples;
  r.channels = static_cast<int>(p.shape.channels);
  r.hidden = static_cast<int>(p.shape.hidden);
  r.space = space_of(p.shape);
  r.x = matrix_of(p, p.x, p.strides);
  r.weights = p.weights;
  r.saved = p.saved;
  r.exchange = static_cast<char*>(exchange);
}

// Hands out the parts of one block of scratch memory, one after another; null for a part of 0
// bytes.
class ScratchParts {
 public:
  explicit ScratchParts(void* memory) : at_(static_cast<char*>(memory)) {}

  void* take(int64_t bytes) {
    char* taken = bytes ? at_ : nullptr;
    at_ += bytes;
    return taken;
  }

 private:
  char* at_;
};

}  // namespace cbam::cuda
