// Numbers on the device: storage types to and from what they are computed in, and the few functions
// that differ between float and double.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <type_traits>

#include "../../attention_math.h"

namespace cbam::cuda {

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(Half v) { return __half2float(__ushort_as_half(v.bits)); }
__device__ __forceinline__ float widen(BFloat16 v) {
  return __bfloat162float(__ushort_as_bfloat16(v.bits));
}

template <class T>
__device__ __forceinline__ T narrow(acc_t<T> v) {
  if constexpr (std::is_same_v<T, Half>)
    return {__half_as_ushort(__float2half_rn(v))};
  else if constexpr (std::is_same_v<T, BFloat16>)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
  else
    return v;
}

// Whether narrow<T> takes many instructions, and their registers: bfloat16 before 8.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T>
constexpr bool kNarrowsSlowly = std::is_same_v<T, BFloat16>;
#else
template <class T>
constexpr bool kNarrowsSlowly = false;
#endif

template <class A>
__device__ __forceinline__ A minus_infinity() {
  return static_cast<A>(-INFINITY);
}

// n / d for numbers from 0 to 2^20, given 1 / d: a division of integers takes some 20 instructions.
__device__ __forceinline__ int quotient(int n, float reciprocal) {
  return static_cast<int>((static_cast<float>(n) + 0.5f) * reciprocal);
}

// The larger of two, a number before a NaN.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// That of attention_math.h, by one instruction where there is one: a comparison and a choice need a
// predicate, of which walks over packed rows have none left.
__device__ __forceinline__ float at_least(float floor, float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float found;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(found) : "f"(v), "f"(floor));
  return found;
#else
  return cbam::at_least(floor, v);
#endif
}
__device__ __forceinline__ double at_least(double floor, double v) {
  return cbam::at_least(floor, v);
}

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }
__device__ __forceinline__ double sigmoid(double z) { return 1.0 / (1.0 + exp(-z)); }

}  // namespace cbam::cuda
