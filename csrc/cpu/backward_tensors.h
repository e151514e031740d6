// The tensors of the backward, sample by sample, each seen as a matrix of channels and pixels.
#pragma once

#include "../problem.h"
#include "rows.h"

namespace cbam::cpu {
namespace {

// Rows that are walked together. Channels share what is loaded for a pixel; pixels lie side by
// side, and memory is faster along one stream.
using Channels = Count<kRowsTogether>;
using Pixels = Count<1>;

template <class T>
struct BackwardTensors {
  using A = acc_t<T>;

  const BackwardProblem& p;
  bool channels_first = p.strides.channels_first();
  int64_t channels = p.shape.channels, pixels = p.shape.pixels();
  int64_t rows = channels_first ? channels : pixels, cols = channels_first ? pixels : channels;

  Matrix<const T> x(int64_t n) const {
    return sample_of(static_cast<const T*>(p.x), p.shape, p.strides, n);
  }
  Matrix<const T> dout(int64_t n) const {
    return sample_of(static_cast<const T*>(p.dout), p.shape, p.dout_strides, n);
  }
  Matrix<T> dx(int64_t n) const {
    return sample_of(static_cast<T*>(p.gradients.x), p.shape, p.dx_strides, n);
  }

  const A* channel_gate(int64_t n) const {
    return static_cast<const A*>(p.saved.channel_gate) + n * channels;
  }
  const A* spatial_gate(int64_t n) const {
    return static_cast<const A*>(p.saved.spatial_gate) + n * pixels;
  }
  const A* hidden(int64_t n) const {
    return static_cast<const A*>(p.saved.hidden) + n * 2 * p.shape.hidden;
  }
  const int32_t* pixel_argmax(int64_t n) const { return p.saved.pixel_argmax + n * channels; }
  const int32_t* channel_argmax(int64_t n) const { return p.saved.channel_argmax + n * pixels; }
};

}  // namespace
}  // namespace cbam::cpu
