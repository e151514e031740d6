// The arithmetic of CBAM that the CPU and the CUDA backend share, for one element or one vector of
// them: gate and derivative, ReLU and derivative, the (sum, max, argmax) rules, dx.
#pragma once

#include <cstdint>

#include "inline.h"

namespace cbam {

// d/dz sigmoid(z), from the gate itself: a scalar A or a vector of them.
template <class A, class V>
CBAM_INLINE V sigmoid_derivative(V gate) {
  return gate * (A(1) - gate);
}

// The larger of v and a floor; NaN passes. Scalars or vectors.
template <class V>
CBAM_INLINE V at_least(V floor, V v) {
  return v < floor ? floor : v;
}

// As torch.relu, NaN included.
template <class V>
CBAM_INLINE V relu(V v) {
  return at_least(V{}, v);
}

// torch lets the gradient through where the output is NaN, too.
template <class A>
CBAM_INLINE bool relu_passes(A output) {
  return !(output <= A(0));
}

// dx, from what reaches it through the maps and through the pools: a scalar or a vector.
template <class V>
CBAM_INLINE V input_gradient_of(V dout, V spatial_gate, V of_maps, V channel_gate, V of_pools) {
  return (dout * spatial_gate + of_maps) * channel_gate + of_pools;
}

// Whether `v` takes the place of `best`: a NaN beats every number, the first of equals stays.
template <class A>
CBAM_INLINE auto takes_maximum(A v, A best) {
  return (!(v <= best)) & (best == best);
}

// Whether (v, i) comes before (best, j) where partial results meet in any order: the larger value
// wins, NaN above all, and of equals the smaller index.
template <class A>
CBAM_INLINE bool precedes(A v, int32_t i, A best, int32_t j) {
  const bool tie = (v == best) | ((v != v) & (best != best));
  return takes_maximum(v, best) | (tie & (i < j));
}

// Storage formats of 16 bits.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What values of a storage type are computed in.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

// A type as a value, for generic lambdas.
template <class T>
struct Type {
  using type = T;
};

}  // namespace cbam
