// Loads and stores of several neighbours at once: 16 bytes where the plan found them aligned, one
// element where not.
#pragma once

#include <cuda_runtime.h>

#include "numeric.cuh"

namespace cbam::cuda {

constexpr int kVectorBytes = 16;

// Elements in a vector of T.
template <class T>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int kCount>
struct Pack {
  acc_t<T> value[kCount];
};

template <class T>
union RawVector {
  uint4 words;
  T element[kVector<T>];
};

// `kCount` elements of global memory that no thread writes during the launch.
template <int kCount, class T>
__device__ __forceinline__ Pack<T, kCount> load(const T* p) {
  Pack<T, kCount> pack;
  if constexpr (kCount == 1) {
    pack.value[0] = widen(*p);
  } else {
    static_assert(kCount == kVector<T>);
    RawVector<T> raw;
    raw.words = __ldg(reinterpret_cast<const uint4*>(p));
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.value[i] = widen(raw.element[i]);
  }
  return pack;
}

// Marked as the first to leave the cache: nothing here reads what was written.
template <class T, int kCount>
__device__ __forceinline__ void store(T* p, const Pack<T, kCount>& pack) {
  if constexpr (kCount == 1) {
    *p = narrow<T>(pack.value[0]);
  } else {
    static_assert(kCount == kVector<T>);
    RawVector<T> raw;
#pragma unroll
    for (int i = 0; i < kCount; ++i) raw.element[i] = narrow<T>(pack.value[i]);
    __stcs(reinterpret_cast<uint4*>(p), raw.words);
  }
}

// Elements before the first address that is a multiple of 16.
template <class T>
__device__ __forceinline__ int elements_to_boundary(const T* p) {
  const unsigned past = static_cast<unsigned>(reinterpret_cast<uintptr_t>(p)) % kVectorBytes;
  return static_cast<int>((kVectorBytes - past) % kVectorBytes / sizeof(T));
}

}  // namespace cbam::cuda
