// Sum, maximum and the position of the maximum, gathered by a thread and merged between threads.
// The order of every sum is fixed by the plan, so by sizes, layout and device.
#pragma once

#include <climits>

#include "numeric.cuh"

namespace cbam::cuda {

// Without kArgmax a NaN shows in the sum alone, which is enough: whatever reads the maximum reads
// the sum as well.
template <class A, bool kArgmax>
struct Extremes {
  static constexpr int32_t kNone = INT_MAX;

  A sum = A(0);
  A max = minus_infinity<A>();
  int32_t argmax = kNone;

  // Values of one thread come with growing indices.
  __device__ __forceinline__ void add(A v, int32_t index) {
    sum += v;
    if constexpr (kArgmax) {
      const bool wins = takes_maximum(v, max);
      max = wins ? v : max;
      argmax = wins ? index : argmax;
    } else {
      max = larger(v, max);
    }
  }

  __device__ __forceinline__ void merge(const Extremes& other) {
    sum += other.sum;
    if constexpr (kArgmax) {
      const bool wins = precedes(other.max, other.argmax, max, argmax);
      max = wins ? other.max : max;
      argmax = wins ? other.argmax : argmax;
    } else {
      max = larger(other.max, max);
    }
  }

  // Where nothing exceeded minus infinity, the first of all is the maximum.
  __device__ __forceinline__ int32_t argmax_or(int32_t first) const {
    return argmax == kNone ? first : argmax;
  }
};

// Merges over groups of `lanes` neighbours, a power of two; all 32 lanes of the warp take part.
template <class A, bool kArgmax>
__device__ __forceinline__ void merge_lanes(Extremes<A, kArgmax>& e, int lanes) {
#pragma unroll 1
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    Extremes<A, kArgmax> other;
    other.sum = __shfl_xor_sync(0xffffffffu, e.sum, distance);
    other.max = __shfl_xor_sync(0xffffffffu, e.max, distance);
    if constexpr (kArgmax) other.argmax = __shfl_xor_sync(0xffffffffu, e.argmax, distance);
    e.merge(other);
  }
}

// The sum over the warp of each lane's v[i], 32 of them, for lane i: a lane gives away half of what
// it holds in each of five steps, where summing one after another would take five steps for each.
template <int kCount, class A>
__device__ __forceinline__ A sums_of_warp(const A (&v)[kCount]) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = threadIdx.x & kHalf;
    A kept[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const A given = __shfl_xor_sync(0xffffffffu, upper ? v[i] : v[i + kHalf], kHalf);
      kept[i] = (upper ? v[i + kHalf] : v[i]) + given;
    }
    return sums_of_warp(kept);
  }
}

// Each of v over the lanes that are a multiple of `stride` apart, a power of two; all 32 lanes of
// the warp take part.
template <int kCount, class A>
__device__ __forceinline__ void sum_strided(A (&v)[kCount], int stride) {
#pragma unroll 1
  for (int distance = stride; distance < 32; distance *= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], distance);
}

// Each of v over groups of `lanes` neighbours, a power of two; all 32 lanes of the warp take part.
template <int kCount, class A>
__device__ __forceinline__ void sum_lanes(A (&v)[kCount], int lanes) {
#pragma unroll 1
  for (int distance = lanes / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], distance);
}

template <class A>
__device__ __forceinline__ A sum_of_warp(A v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    v += __shfl_xor_sync(0xffffffffu, v, distance);
  return v;
}

}  // namespace cbam::cuda
