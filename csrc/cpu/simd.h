// One register's worth of float or double, written with the compilers' vector extension so that one
// source serves every CPU target. Included only by files that are compiled once per target; all of
// it has internal linkage, and nothing here may come from the standard library's templates.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../attention_math.h"

namespace cbam::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
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

typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));

template <class A>
CBAM_INLINE vec_t<A> splat(A v) {
  return vec_t<A>{} + v;
}

template <class A>
CBAM_INLINE A minus_infinity() {
  return -static_cast<A>(__builtin_inff());
}

// 0, 1, 2, ... in the integers of A's width.
template <class A>
CBAM_INLINE ivec_t<A> iota() {
  ivec_t<A> v{};
  for (int i = 0; i < kLanes<A>; ++i) v[i] = i;
  return v;
}

template <class To, class From>
CBAM_INLINE To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To r;
  __builtin_memcpy(&r, &v, sizeof r);
  return r;
}

// Half and bfloat16 bits to float lanes and back, rounding to nearest even; NaN stays NaN.
CBAM_INLINE vec_t<float> widen(Bits16 bits, BFloat16) {
  return bit_cast<vec_t<float>>(__builtin_convertvector(bits, Bits32) << 16);
}

CBAM_INLINE Bits16 narrow(vec_t<float> v, BFloat16) {
  Bits32 u = bit_cast<Bits32>(v);
  Bits32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  Bits32 quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector(v != v ? quiet : rounded, Bits16);
}

#if defined(__AVX512F__)
CBAM_INLINE vec_t<float> widen(Bits16 bits, Half) {
  return bit_cast<vec_t<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
}
CBAM_INLINE Bits16 narrow(vec_t<float> v, Half) {
  return bit_cast<Bits16>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
CBAM_INLINE vec_t<float> widen(Bits16 bits, Half) {
  return bit_cast<vec_t<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
}
CBAM_INLINE Bits16 narrow(vec_t<float> v, Half) {
  return bit_cast<Bits16>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
// A multiplication by 2^112 moves the exponent from half's bias to float's, subnormals included.
CBAM_INLINE vec_t<float> widen(Bits16 bits, Half) {
  Bits32 u = __builtin_convertvector(bits, Bits32);
  Bits32 sign = (u & 0x8000u) << 16;
  Bits32 magnitude = u & 0x7fffu;
  Bits32 finite = bit_cast<Bits32>(bit_cast<vec_t<float>>(magnitude << 13) * 0x1p112f);
  Bits32 special = (magnitude << 13) | 0x7f800000u;
  return bit_cast<vec_t<float>>(sign | (magnitude >= 0x7c00u ? special : finite));
}
// Normal results round in the integer domain; adding 0.5 aligns subnormal ones to half's last bit.
CBAM_INLINE Bits16 narrow(vec_t<float> v, Half) {
  Bits32 u = bit_cast<Bits32>(v);
  Bits32 sign = (u >> 16) & 0x8000u;
  Bits32 magnitude = u & 0x7fffffffu;
  Bits32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  Bits32 subnormal = bit_cast<Bits32>(bit_cast<vec_t<float>>(magnitude) + 0.5f) - 0x3f000000u;
  Bits32 infinite = Bits32{} + 0x7c00u;
  Bits32 nan = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
  Bits32 r = magnitude < 0x38800000u ? subnormal : normal;
  r = magnitude >= 0x477ff000u ? infinite : r;
  r = magnitude > 0x7f800000u ? nan : r;
  return __builtin_convertvector(sign | r, Bits16);
}
#endif

// A full vector from or to memory of any alignment. Storage of 16 bits is widened to float.
template <class T>
CBAM_INLINE vec_t<acc_t<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    Bits16 bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return widen(bits, T{});
  } else {
    vec_t<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
}

template <class T>
CBAM_INLINE void store(T* p, vec_t<acc_t<T>> v) {
  if constexpr (sizeof(T) == 2) {
    Bits16 bits = narrow(v, T{});
    __builtin_memcpy(p, &bits, sizeof bits);
  } else {
    __builtin_memcpy(p, &v, sizeof v);
  }
}

// The first `n` < lanes elements; the other lanes read as 0 and are not written.
template <class T>
CBAM_INLINE vec_t<acc_t<T>> load_first(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return bit_cast<vec_t<float>>(_mm512_maskz_loadu_ps((1u << n) - 1, p));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const ivec_t<float> inside = iota<float>() < static_cast<int32_t>(n);
    return bit_cast<vec_t<float>>(_mm256_maskload_ps(p, bit_cast<__m256i>(inside)));
  }
#endif
  T buffer[kLanes<acc_t<T>>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
CBAM_INLINE void store_first(T* p, vec_t<acc_t<T>> v, int64_t n) {
  T buffer[kLanes<acc_t<T>>];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// Runs body(j, lanes) over 0 .. n in steps of a vector; `lanes` loads and stores whole vectors, and
// at the end just what is left.
struct AllLanes {
  template <class T>
  CBAM_INLINE_MEMBER vec_t<acc_t<T>> load(const T* p) const {
    return cpu::load(p);
  }
  template <class T>
  CBAM_INLINE_MEMBER void store(T* p, vec_t<acc_t<T>> v) const {
    cpu::store(p, v);
  }
};
struct FirstLanes {
  int64_t n;
  template <class T>
  CBAM_INLINE_MEMBER vec_t<acc_t<T>> load(const T* p) const {
    return load_first(p, n);
  }
  template <class T>
  CBAM_INLINE_MEMBER void store(T* p, vec_t<acc_t<T>> v) const {
    store_first(p, v, n);
  }
};
template <class A, class Body>
CBAM_INLINE void for_vectors(int64_t n, Body body) {
  int64_t j = 0;
  for (; j + kLanes<A> <= n; j += kLanes<A>) body(j, AllLanes{});
  if (j < n) body(j, FirstLanes{n - j});
}

template <class T>
CBAM_INLINE acc_t<T> load_one(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return load_first(p, 1)[0];
  } else {
    return *p;
  }
}

template <class T>
CBAM_INLINE void store_one(T* p, acc_t<T> v) {
  if constexpr (sizeof(T) == 2) {
    store_first(p, splat(v), 1);
  } else {
    *p = v;
  }
}

// Reductions across lanes, in a fixed order.
template <class A>
CBAM_INLINE A sum_of_lanes(vec_t<A> v) {
  A lane[kLanes<A>];
  __builtin_memcpy(lane, &v, sizeof v);
  for (int width = kLanes<A> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// NaN may get lost; callers look at the sum.
template <class A>
CBAM_INLINE vec_t<A> maximum(vec_t<A> a, vec_t<A> b) {
  return a > b ? a : b;
}

template <class A>
CBAM_INLINE A max_of_lanes(vec_t<A> v) {
  A best = v[0];
  for (int i = 1; i < kLanes<A>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

template <class A>
CBAM_INLINE bool any(ivec_t<A> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bit_cast<__m512i>(mask), bit_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(bit_cast<__m256i>(mask), bit_cast<__m256i>(mask));
#else
  index_t<A> r = 0;
  for (int i = 0; i < kLanes<A>; ++i) r |= mask[i];
  return r != 0;
#endif
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
