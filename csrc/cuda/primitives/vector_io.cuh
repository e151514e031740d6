// Loads and stores of several neighbours at once: 16 bytes where the plan found them aligned, one
// element where not.
#pragma once

#include <cuda_runtime.h>

#include "../kernels/kernels.h"
#include "numeric.cuh"

#if defined(CBAM_EMULATED)
#include "emulator_device.h"
#endif

namespace cbam::cuda {

// Elements in a vector of T.
template <class T>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int kCount>
struct Pack {
  acc_t<T> value[kCount];
};

// `kCount` elements as they came from memory: loads can be under way before any is looked at.
template <class T, int kCount>
union Raw {
  std::conditional_t<kCount == kVector<T>, uint4, uint2> words;
  T element[kCount];
  static_assert(sizeof words == sizeof element);
};
template <class T>
union Raw<T, 1> {
  T element[1];
};

// From global memory that no thread writes during the launch.
template <int kCount, class T>
__device__ __forceinline__ Raw<T, kCount> load(const T* p) {
  Raw<T, kCount> raw;
  if constexpr (kCount == 1) {
    raw.element[0] = *p;
  } else {
    static_assert(kCount == kVector<T>);
    raw.words = __ldg(reinterpret_cast<const uint4*>(p));
  }
  return raw;
}

// From shared memory, on a multiple of what they take together: a vector, or half of one.
template <int kCount, class T>
__device__ __forceinline__ Raw<T, kCount> load_staged(const T* p) {
  Raw<T, kCount> raw;
  if constexpr (kCount == 1)
    raw.element[0] = *p;
  else
    raw.words = *reinterpret_cast<const decltype(raw.words)*>(p);
  return raw;
}

template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> widen(const Raw<T, kCount>& raw) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.value[i] = widen(raw.element[i]);
  return pack;
}

// The whole batches of for_batches; returns where the rest begins.
template <int kBatch, class Load, class Body>
__device__ __forceinline__ int for_whole_batches(int first, int end, int step, Load load,
                                                 Body body) {
  int index = first;
#pragma unroll 1  // the batch is what registers allow
  for (; index + (kBatch - 1) * step < end; index += kBatch * step) {
    decltype(load(0)) loaded[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) loaded[b] = load(index + b * step);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) body(index + b * step, loaded[b]);
  }
  return index;
}

// And the rest, of less than a batch.
template <int kBatch, class Load, class Body>
__device__ __forceinline__ void for_rest(int index, int end, int step, Load load, Body body) {
  if constexpr (kBatch > 1) {
    // Without a value where nothing is loaded they would take registers throughout the kernel.
    decltype(load(0)) rest[kBatch - 1] = {};
#pragma unroll
    for (int b = 0; b < kBatch - 1; ++b)
      if (index + b * step < end) rest[b] = load(index + b * step);
#pragma unroll
    for (int b = 0; b < kBatch - 1; ++b)
      if (index + b * step < end) body(index + b * step, rest[b]);
  }
}

// Calls body(index, load(index)) for index = first, first + step, ... below `end`. kBatch loads are
// under way before the first is used; the condition of the loop alone stands between them, or the
// compiler would wait for one after the other.
template <int kBatch = 4, class Load, class Body>
__device__ __forceinline__ void for_batches(int first, int end, int step, Load load, Body body) {
  for_rest<kBatch>(for_whole_batches<kBatch>(first, end, step, load, body), end, step, load, body);
}

// The same where there is seldom a rest, whose conditions take time also where there is none.
template <int kBatch, class Load, class Body>
__device__ __forceinline__ void for_mostly_whole_batches(int first, int end, int step, Load load,
                                                         Body body) {
  const int rest = for_whole_batches<kBatch>(first, end, step, load, body);
  if (rest < end) for_rest<kBatch>(rest, end, step, load, body);
}

// Brings a line of global memory to the second-level cache.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* p) {
#if !defined(CBAM_EMULATED)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
#endif
}

// The same for so many bytes, a multiple of 16 from a multiple of 16 on, from compute
// capability 9.0 on.
#if defined(CBAM_EMULATED)
__device__ __forceinline__ void prefetch(const void* p, int bytes,
                                         emulator::Place place = emulator::Place::here()) {
  emulator::prefetch(p, static_cast<unsigned>(bytes), place);
}
#else
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* p,
                                         [[maybe_unused]] int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(p)),
               "r"(bytes));
#endif
}
#endif

// Marked as the first to leave the cache: nothing here reads what was written.
template <class T, int kCount>
__device__ __forceinline__ void store(T* p, const Pack<T, kCount>& pack) {
  if constexpr (kCount == 1) {
    *p = narrow<T>(pack.value[0]);
  } else {
    static_assert(kCount == kVector<T>);
    Raw<T, kCount> raw;
#pragma unroll
    for (int i = 0; i < kCount; ++i) raw.element[i] = narrow<T>(pack.value[i]);
    __stcs(reinterpret_cast<uint4*>(p), raw.words);
  }
}

// kCount neighbours in shared memory; `aligned` where they start on a multiple of 16 bytes, or of
// what they take together.
template <int kCount, class A>
__device__ __forceinline__ void load_shared(const A* p, bool aligned, A (&value)[kCount]) {
  constexpr int kVectors = kVectorBytes / static_cast<int>(sizeof(A));
  constexpr int kEach = kCount == 2 && kVectors == 4 ? 2 : kVectors;
  if (kCount % kEach == 0 && aligned) {
#pragma unroll
    for (int i = 0; i < kCount; i += kEach) {
      Raw<A, kEach> raw;
      raw.words = *reinterpret_cast<const decltype(raw.words)*>(p + i);
#pragma unroll
      for (int k = 0; k < kEach; ++k) value[i + k] = raw.element[k];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = p[i];
  }
}

// kCount neighbours to shared memory, on a multiple of what they take together.
template <int kCount, class A>
__device__ __forceinline__ void store_shared(A* p, const A (&value)[kCount]) {
  constexpr int kVectors = kVectorBytes / static_cast<int>(sizeof(A));
  constexpr int kEach = kCount == 2 && kVectors == 4 ? 2 : kVectors;
  if constexpr (kCount % kEach == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += kEach) {
      Raw<A, kEach> raw;
#pragma unroll
      for (int k = 0; k < kEach; ++k) raw.element[k] = value[i + k];
      *reinterpret_cast<decltype(raw.words)*>(p + i) = raw.words;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) p[i] = value[i];
  }
}

// Elements before the first address that is a multiple of 16.
template <class T>
__device__ __forceinline__ int elements_to_boundary(const T* p) {
  const unsigned past = static_cast<unsigned>(reinterpret_cast<uintptr_t>(p)) % kVectorBytes;
  return static_cast<int>((kVectorBytes - past) % kVectorBytes / sizeof(T));
}

}  // namespace cbam::cuda
