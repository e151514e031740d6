// The part of CUDA that this project's kernels and launches use, for a plain C++17 compiler.
// __shared__ is left out: shared memory comes from SharedCarver. So are atomics on floating point,
// whose sums would depend on the order of threads: using one does not compile.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "emulator_device.h"
#include "emulator_host.h"
#include "emulator_vectors.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// Rewritten whenever another thread runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- barriers -----------------------------------------------------------------------------------

inline void __syncthreads(emulator::Place place = emulator::Place::here()) {
  emulator::block_barrier(emulator::Vote::kNone, false, place);
}
inline int __syncthreads_or(int predicate, emulator::Place place = emulator::Place::here()) {
  return emulator::block_barrier(emulator::Vote::kAny, predicate != 0, place);
}
inline int __syncthreads_and(int predicate, emulator::Place place = emulator::Place::here()) {
  return emulator::block_barrier(emulator::Vote::kAll, predicate != 0, place);
}
inline int __syncthreads_count(int predicate, emulator::Place place = emulator::Place::here()) {
  return emulator::block_barrier(emulator::Vote::kCount, predicate != 0, place);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       emulator::Place place = emulator::Place::here()) {
  emulator::warp_barrier(mask, place);
}

inline void __threadfence() { emulator::fence(); }
inline void __threadfence_block() { emulator::fence(); }

// ---- exchanges within a warp; none of them orders memory ----------------------------------------

namespace emulator {

template <class T>
inline T shuffle_from(unsigned mask, T value, int lane, Place place) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  const uint64_t received = warp_shuffle(mask, bits_of<uint64_t>(value), lane, place);
  return bits_of<T>(received);
}

// The first lane of this lane's group of `width`.
inline int group_start(int width) { return lane_number() & ~(width - 1); }

}  // namespace emulator

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
                     emulator::Place place = emulator::Place::here()) {
  const int lane = emulator::group_start(width) | (source & (width - 1));
  return emulator::shuffle_from(mask, value, lane, place);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                         emulator::Place place = emulator::Place::here()) {
  const int lane = emulator::lane_number() ^ lane_mask;
  const bool inside = lane < emulator::group_start(width) + width;
  return emulator::shuffle_from(mask, value, inside ? lane : emulator::lane_number(), place);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                          emulator::Place place = emulator::Place::here()) {
  const int lane = emulator::lane_number() + static_cast<int>(delta);
  const bool inside = lane < emulator::group_start(width) + width;
  return emulator::shuffle_from(mask, value, inside ? lane : emulator::lane_number(), place);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                        emulator::Place place = emulator::Place::here()) {
  const int lane = emulator::lane_number() - static_cast<int>(delta);
  const bool inside = lane >= emulator::group_start(width);
  return emulator::shuffle_from(mask, value, inside ? lane : emulator::lane_number(), place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulator::Place place = emulator::Place::here()) {
  return emulator::warp_ballot(mask, predicate != 0, place);
}
inline int __any_sync(unsigned mask, int predicate,
                      emulator::Place place = emulator::Place::here()) {
  return emulator::warp_ballot(mask, predicate != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      emulator::Place place = emulator::Place::here()) {
  return emulator::warp_ballot(mask, predicate == 0, place) == 0;
}

// ---- loads and stores with a cache hint ---------------------------------------------------------

template <class T>
__forceinline__ T __ldg(const T* p, emulator::Place place = emulator::Place::here()) {
  emulator::check_alignment(p, place);
  return *p;
}
template <class T>
__forceinline__ T __ldcs(const T* p, emulator::Place place = emulator::Place::here()) {
  emulator::check_alignment(p, place);
  return *p;
}
template <class T>
__forceinline__ T __ldcg(const T* p, emulator::Place place = emulator::Place::here()) {
  emulator::check_alignment(p, place);
  return *p;
}
template <class T>
__forceinline__ void __stcs(T* p, emulator::Same<T> value,
                            emulator::Place place = emulator::Place::here()) {
  emulator::check_alignment(p, place);
  *p = value;
}
template <class T>
__forceinline__ void __stcg(T* p, emulator::Same<T> value,
                            emulator::Place place = emulator::Place::here()) {
  emulator::check_alignment(p, place);
  *p = value;
}

// ---- atomics ------------------------------------------------------------------------------------

namespace emulator {

template <class T, class Update>
__forceinline__ T atomic_update(T* p, Update update, Place place) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                    std::is_same_v<T, unsigned long long>,
                "atomics on floating point are not allowed: the order of a sum would vary");
  const T before = bits_of<T>(begin_atomic(p, sizeof(T), place));
  end_atomic(p, sizeof(T), bits_of<uint64_t>(update(before)));
  return before;
}

}  // namespace emulator

template <class T>
__forceinline__ T atomicAdd(T* p, emulator::Same<T> value,
                            emulator::Place place = emulator::Place::here()) {
  return emulator::atomic_update(p, [=](T before) { return before + value; }, place);
}
template <class T>
__forceinline__ T atomicMax(T* p, emulator::Same<T> value,
                            emulator::Place place = emulator::Place::here()) {
  return emulator::atomic_update(
      p, [=](T before) { return before > value ? before : value; }, place);
}
template <class T>
__forceinline__ T atomicMin(T* p, emulator::Same<T> value,
                            emulator::Place place = emulator::Place::here()) {
  return emulator::atomic_update(
      p, [=](T before) { return before < value ? before : value; }, place);
}
template <class T>
__forceinline__ T atomicOr(T* p, emulator::Same<T> value,
                           emulator::Place place = emulator::Place::here()) {
  return emulator::atomic_update(p, [=](T before) { return before | value; }, place);
}
template <class T>
__forceinline__ T atomicExch(T* p, emulator::Same<T> value,
                             emulator::Place place = emulator::Place::here()) {
  return emulator::atomic_update(p, [=](T) { return value; }, place);
}
template <class T>
__forceinline__ T atomicCAS(T* p, emulator::Same<T> expected, emulator::Same<T> value,
                            emulator::Place place = emulator::Place::here()) {
  return emulator::atomic_update(
      p, [=](T before) { return before == expected ? value : before; }, place);
}

// ---- arithmetic ---------------------------------------------------------------------------------

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

inline int __float_as_int(float x) { return emulator::bits_of<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits_of<unsigned>(x); }
inline float __int_as_float(int x) { return emulator::bits_of<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits_of<float>(x); }
inline long long __double_as_longlong(double x) { return emulator::bits_of<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator::bits_of<double>(x); }

// By value and always inlined, so that the race build sees what is read in the kernel. Numbers win
// over NaN, as on the device.
template <class T>
__forceinline__ std::enable_if_t<std::is_integral_v<T>, T> max(T a, T b) {
  return a > b ? a : b;
}
template <class T>
__forceinline__ std::enable_if_t<std::is_integral_v<T>, T> min(T a, T b) {
  return a < b ? a : b;
}
__forceinline__ float max(float a, float b) { return std::fmax(a, b); }
__forceinline__ float min(float a, float b) { return std::fmin(a, b); }
__forceinline__ double max(double a, double b) { return std::fmax(a, b); }
__forceinline__ double min(double a, double b) { return std::fmin(a, b); }
