// One register's worth of float or double, written with the compilers' vector extension so that one
// source serves every CPU target. Included only by files that are compiled once per target; all of
// it has internal linkage, and nothing here may come from the standard library's templates.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../attention_math.h"

namespace cbam::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

// Lanes of A, the integers of the same width (also the type of comparisons), and their number.
template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t ivec __attribute__((vector_size(kVectorBytes)));
  using index = int32_t;
  static constexpr int count = kVectorBytes / 4;
};
template <>
struct Lanes<double> {
  typedef double vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t ivec __attribute__((vector_size(kVectorBytes)));
  using index = int64_t;
  static constexpr int count = kVectorBytes / 8;
};
template <class A>
using vec_t = typename Lanes<A>::vec;
template <class A>
using ivec_t = typename Lanes<A>::ivec;
template <class A>
using index_t = typename Lanes<A>::index;
template <class A>
constexpr int kLanes = Lanes<A>::count;

// n and what is missing to whole vectors.
template <class A>
CBAM_INLINE int64_t in_whole_vectors(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

template <class A>
CBAM_INLINE vec_t<A> splat(A v) {
  return vec_t<A>{} + v;
}

template <class A>
CBAM_INLINE A minus_infinity() {
  return -static_cast<A>(__builtin_inff());
}

// More than any position.
template <class A>
CBAM_INLINE ivec_t<A> largest_index() {
  return ivec_t<A>{} + static_cast<index_t<A>>(INT32_MAX);
}

// 0, 1, 2, ... in the integers of A's width.
template <class A>
CBAM_INLINE ivec_t<A> iota() {
  ivec_t<A> v{};
  for (int i = 0; i < kLanes<A>; ++i) v[i] = i;
  return v;
}

// v, kept in a register: compilers read memory anew for each use of what was loaded, and reading is
// what walks over x wait for.
template <class V>
CBAM_INLINE V in_register(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#endif
  return v;
}

// v where the mask is set, 0 elsewhere.
template <class A>
CBAM_INLINE vec_t<A> where(ivec_t<A> mask, vec_t<A> v) {
  return mask ? v : vec_t<A>{};
}

template <class To, class From>
CBAM_INLINE To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To r;
  __builtin_memcpy(&r, &v, sizeof r);
  return r;
}

// NaN may get lost; callers look at the sum.
template <class A>
CBAM_INLINE vec_t<A> maximum(vec_t<A> a, vec_t<A> b) {
  return a > b ? a : b;
}

// e^v to about one unit in the last place: v = n ln2 + r, Taylor series in r, |r| <= ln2 / 2.
template <class A>
CBAM_INLINE vec_t<A> exp(vec_t<A> v) {
  constexpr bool kSingle = sizeof(A) == 4;
  constexpr A kLog2e = A(1.44269504088896340736);
  constexpr A kLn2High = kSingle ? A(0.693145751953125) : A(6.93147180369123816490e-01);
  constexpr A kLn2Low = kSingle ? A(1.42860682030941723212e-6) : A(1.90821492927058770002e-10);
  constexpr A kHighest = kSingle ? A(88.7) : A(709.7), kLowest = kSingle ? A(-87.3) : A(-708.3);
  constexpr A kRound = kSingle ? A(0x1.8p23) : A(0x1.8p52);  // adding it leaves an integer
  constexpr int kMantissa = kSingle ? 23 : 52, kTerms = kSingle ? 7 : 13;
  constexpr A kInverseFactorial[] = {A(1),
                                     A(1),
                                     A(1.0 / 2),
                                     A(1.0 / 6),
                                     A(1.0 / 24),
                                     A(1.0 / 120),
                                     A(1.0 / 720),
                                     A(1.0 / 5040),
                                     A(1.0 / 40320),
                                     A(1.0 / 362880),
                                     A(1.0 / 3628800),
                                     A(1.0 / 39916800),
                                     A(1.0 / 479001600),
                                     A(1.0 / 6227020800.0)};

  vec_t<A> x = v > kHighest ? splat(kHighest) : v;
  x = x < kLowest ? splat(kLowest) : x;
  vec_t<A> shifted = x * kLog2e + kRound;
  vec_t<A> n = shifted - kRound;
  vec_t<A> r = (x - n * kLn2High) - n * kLn2Low;
  vec_t<A> p = splat(kInverseFactorial[kTerms]);
  for (int k = kTerms - 1; k >= 0; --k) p = p * r + kInverseFactorial[k];
  // 2^n in two factors, since n = 128 (or 1024) alone has no exponent field.
  ivec_t<A> e = bit_cast<ivec_t<A>>(shifted) - bit_cast<ivec_t<A>>(splat(kRound));
  ivec_t<A> half = e >> 1, one = bit_cast<ivec_t<A>>(splat(A(1)));
  p = p * bit_cast<vec_t<A>>(one + (half << kMantissa));
  p = p * bit_cast<vec_t<A>>(one + ((e - half) << kMantissa));
  p = v > kHighest ? splat(A(__builtin_inff())) : p;
  p = v < kLowest ? splat(A(0)) : p;
  return v == v ? p : v;
}

template <class A>
CBAM_INLINE vec_t<A> sigmoid(vec_t<A> z) {
  return A(1) / (A(1) + exp<A>(-z));
}

}  // namespace
}  // namespace cbam::cpu
