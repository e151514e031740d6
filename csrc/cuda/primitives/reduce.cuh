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

// What the lane whose number differs in this bit has; all 32 lanes of the warp take part.
template <class A, bool kArgmax>
__device__ __forceinline__ Extremes<A, kArgmax> of_lane(const Extremes<A, kArgmax>& e,
                                                        int distance) {
  Extremes<A, kArgmax> other;
  other.sum = __shfl_xor_sync(0xffffffffu, e.sum, distance);
  other.max = __shfl_xor_sync(0xffffffffu, e.max, distance);
  if constexpr (kArgmax) other.argmax = __shfl_xor_sync(0xffffffffu, e.argmax, distance);
  return other;
}

// Merges over groups of `lanes` neighbours, a power of two; all 32 lanes of the warp take part.
template <class A, bool kArgmax>
__device__ __forceinline__ void merge_lanes(Extremes<A, kArgmax>& e, int lanes) {
#pragma unroll 1
  for (int distance = lanes / 2; distance > 0; distance /= 2) e.merge(of_lane(e, distance));
}

// Member by member: choosing between two arrays' elements would put them in memory.
template <class A, bool kArgmax>
__device__ __forceinline__ Extremes<A, kArgmax> either(bool first, const Extremes<A, kArgmax>& a,
                                                       const Extremes<A, kArgmax>& b) {
  Extremes<A, kArgmax> e;
  e.sum = first ? a.sum : b.sum;
  e.max = first ? a.max : b.max;
  if constexpr (kArgmax) e.argmax = first ? a.argmax : b.argmax;
  return e;
}

// Merges e[r] over groups of `lanes` neighbours, a power of two and at least kRows, for the lanes
// whose number is r and every kRows-th further: as in sums_of_warp, a lane gives half away in each
// step.
template <int kRows, class A, bool kArgmax>
__device__ __forceinline__ Extremes<A, kArgmax> merge_rows_of_lanes(
    const Extremes<A, kArgmax> (&e)[kRows], int lanes, int done = kRows) {
  if constexpr (kRows == 1) {
    Extremes<A, kArgmax> merged = e[0];
#pragma unroll 1
    for (int distance = lanes / 2; distance >= done; distance /= 2)
      merged.merge(of_lane(merged, distance));
    return merged;
  } else {
    constexpr int kHalf = kRows / 2;
    const bool upper = threadIdx.x & kHalf;
    Extremes<A, kArgmax> kept[kHalf];
#pragma unroll
    for (int r = 0; r < kHalf; ++r) {
      kept[r] = either(upper, e[r + kHalf], e[r]);
      kept[r].merge(of_lane(either(upper, e[r], e[r + kHalf]), kHalf));
    }
    return merge_rows_of_lanes(kept, lanes, done);
  }
}

// The sum over the warp of each lane's v[i] for lane i and every kCount-th: a lane gives away half
// of what it holds in each step, where summing one after another would take five steps for each.
template <int kCount, int kDone = 32 / kCount, class A>
__device__ __forceinline__ A sums_of_warp(const A (&v)[kCount]) {
  if constexpr (kCount == 1) {
    A sum = v[0];
#pragma unroll
    for (int distance = 32 / kDone; distance < 32; distance *= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    return sum;
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = threadIdx.x & kHalf;
    A kept[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const A given = __shfl_xor_sync(0xffffffffu, upper ? v[i] : v[i + kHalf], kHalf);
      kept[i] = (upper ? v[i + kHalf] : v[i]) + given;
    }
    return sums_of_warp<kHalf, kDone>(kept);
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
