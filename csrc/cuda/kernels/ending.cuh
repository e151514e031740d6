// What follows the block in the pass that writes out: out = relu(block + residual), or one of both.
// Each thread reads what it adds beside what it scales.
#pragma once

#include "../primitives/vector_io.cuh"
#include "kernels.h"

namespace cbam::cuda {

// The part of it that a block of threads sees: places count from element `first` of the residual.
template <class T, Follows kFollows>
struct EndingOf {
  static constexpr bool kAdds = kFollows == Follows::kResidual;
  struct Nothing {};
  template <int kCount>
  using Added = std::conditional_t<kAdds, Raw<T, kCount>, Nothing>;

  const T* residual;
  acc_t<T> floor;  // of out

  __device__ __forceinline__ EndingOf(const EndingRows& rows, int64_t first)
      : residual(kAdds ? static_cast<const T*>(rows.residual) + first : nullptr),
        floor(rows.relu ? acc_t<T>(0) : minus_infinity<acc_t<T>>()) {}

  template <int kCount>
  __device__ __forceinline__ Added<kCount> load(int64_t place) const {
    if constexpr (kAdds)
      return cuda::load<kCount>(residual + place);
    else
      return {};
  }
  template <int kCount>
  __device__ __forceinline__ void apply(const Added<kCount>& added, Pack<T, kCount>& pack) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kAdds) pack.value[i] += widen(added.element[i]);
      if constexpr (kFollows != Follows::kNothing) pack.value[i] = at_least(floor, pack.value[i]);
    }
  }
};

// Calls body(follows) with what follows as a constant.
template <class Body>
__device__ __forceinline__ void with_ending(const EndingRows& ending, Body body) {
  if (ending.residual)
    body(std::integral_constant<Follows, Follows::kResidual>{});
  else if (ending.relu)
    body(std::integral_constant<Follows, Follows::kRelu>{});
  else
    body(std::integral_constant<Follows, Follows::kNothing>{});
}

// What a thread has under way: a vector to scale, and what is added to it.
template <class Scaled, class Added>
struct UnderWay {
  Scaled scaled;
  Added added;
};
template <class Scaled, class Added>
UnderWay(Scaled, Added) -> UnderWay<Scaled, Added>;

// Vectors at a time, where nothing is added so many: each is two where something is.
template <Follows kFollows, int kMany>
constexpr int kAtATime = kFollows == Follows::kResidual ? (kMany + 1) / 2 : kMany;

}  // namespace cbam::cuda
