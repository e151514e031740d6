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

// Half and bfloat16 bits to float lanes and back, rounding to nearest even; NaN stays NaN.
#if defined(__AVX2__) && !defined(__AVX512F__)
// Both halves of a register get all eight elements, and each shuffles its four to where they
// belong.
CBAM_INLINE vec_t<float> widen(Bits16 bits, BFloat16) {
  const __m256i both = _mm256_broadcastsi128_si256(bit_cast<__m128i>(bits));
  const __m256i places =
      _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                       -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return bit_cast<vec_t<float>>(_mm256_shuffle_epi8(both, places));
}
CBAM_INLINE Bits16 low_halves(Bits32 v) {
  const __m256i all = bit_cast<__m256i>(v);
  return bit_cast<Bits16>(
      _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}
#else
CBAM_INLINE vec_t<float> widen(Bits16 bits, BFloat16) {
  return bit_cast<vec_t<float>>(__builtin_convertvector(bits, Bits32) << 16);
}
CBAM_INLINE Bits16 low_halves(Bits32 v) { return __builtin_convertvector(v, Bits16); }
#endif

CBAM_INLINE Bits16 narrow(vec_t<float> v, BFloat16) {
  const Bits32 u = bit_cast<Bits32>(v);
  const Bits32 rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return low_halves((rounded | bit_cast<Bits32>(v != v)) >> 16);
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
  for (int64_t i = 0; i < n; ++i) __builtin_memcpy(buffer + i, p + i, sizeof(T));
  return load(buffer);
}

// Positions, in integers of A's width.
template <class A>
CBAM_INLINE ivec_t<A> load_indices(const int32_t* p) {
  typedef int32_t Narrow __attribute__((vector_size(kLanes<A> * 4)));
  Narrow v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, ivec_t<A>);
}

template <class T>
CBAM_INLINE void store_first(T* p, vec_t<acc_t<T>> v, int64_t n) {
  T buffer[kLanes<acc_t<T>>];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) __builtin_memcpy(p + i, buffer + i, sizeof(T));
}

// Runs body(j, lanes) over 0 .. n in steps of a vector; `lanes` loads and stores whole vectors, and
// at the end just what is left.
template <class A>
struct AllLanes {
  template <class T>
  CBAM_INLINE_MEMBER vec_t<A> load(const T* p) const {
    return cpu::load(p);
  }
  CBAM_INLINE_MEMBER ivec_t<A> indices(const int32_t* p) const { return load_indices<A>(p); }
  template <class T>
  CBAM_INLINE_MEMBER void store(T* p, vec_t<A> v) const {
    cpu::store(p, v);
  }
  // v, and `other` in lanes where nothing was loaded.
  CBAM_INLINE_MEMBER vec_t<A> or_else(vec_t<A> v, vec_t<A>) const { return v; }
  // Lanes before the first element.
  CBAM_INLINE_MEMBER int64_t skipped() const { return 0; }
};
template <class A>
struct FirstLanes {
  int64_t n;
  template <class T>
  CBAM_INLINE_MEMBER vec_t<A> load(const T* p) const {
    return load_first(p, n);
  }
  CBAM_INLINE_MEMBER ivec_t<A> indices(const int32_t* p) const {
    int32_t buffer[kLanes<A>] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return load_indices<A>(buffer);
  }
  template <class T>
  CBAM_INLINE_MEMBER void store(T* p, vec_t<A> v) const {
    store_first(p, v, n);
  }
  CBAM_INLINE_MEMBER vec_t<A> or_else(vec_t<A> v, vec_t<A> other) const {
    return iota<A>() < static_cast<index_t<A>>(n) ? v : other;
  }
  CBAM_INLINE_MEMBER int64_t skipped() const { return 0; }
};
template <class A, class Body>
CBAM_INLINE void for_vectors(int64_t n, Body body) {
  int64_t j = 0;
  for (; j + kLanes<A> <= n; j += kLanes<A>) body(j, AllLanes<A>{});
  if (j < n) body(j, FirstLanes<A>{n - j});
}

// Elements p[0] .. p[n) in the last lanes of the vector that ends with them, the others 0: a whole
// vector is faster to load than a few elements.
template <class A>
struct LastLanes {
  int64_t before;  // lanes that hold nothing

  CBAM_INLINE_MEMBER explicit LastLanes(int64_t n) : before(kLanes<A> - n) {}
  template <class T>
  CBAM_INLINE_MEMBER vec_t<A> load(const T* p) const {
    return or_else(cpu::load(p - before), vec_t<A>{});
  }
  // The other lanes read as what stands there.
  CBAM_INLINE_MEMBER ivec_t<A> indices(const int32_t* p) const {
    return load_indices<A>(p - before);
  }
  // What the other lanes stand for is written again as it is.
  template <class T>
  CBAM_INLINE_MEMBER void store(T* p, vec_t<A> v) const {
    cpu::store(p - before, or_else(v, cpu::load(p - before)));
  }
  CBAM_INLINE_MEMBER vec_t<A> or_else(vec_t<A> v, vec_t<A> other) const {
    return iota<A>() >= static_cast<index_t<A>>(before) ? v : other;
  }
  CBAM_INLINE_MEMBER int64_t skipped() const { return before; }
};
// As for_vectors, over begin .. n of rows that begin at 0. A store may write again what stands
// before its place.
template <class A, class Body>
CBAM_INLINE void for_row_vectors(int64_t begin, int64_t n, Body body) {
  int64_t j = begin;
  for (; j + kLanes<A> <= n; j += kLanes<A>) body(j, AllLanes<A>{});
  if (j == n) return;
  if (n >= kLanes<A>)
    body(j, LastLanes<A>(n - j));
  else
    body(j, FirstLanes<A>{n - j});
}

// For a body that may see elements twice, as it stores what does not depend on what was there: the
// last vector ends with the row.
template <class A, class Body>
CBAM_INLINE void for_vectors_again(int64_t n, Body body) {
  if (n < kLanes<A>) return body(int64_t{0}, FirstLanes<A>{n});
  for (int64_t j = 0; j + kLanes<A> <= n; j += kLanes<A>) body(j, AllLanes<A>{});
  if (n % kLanes<A>) body(n - kLanes<A>, AllLanes<A>{});
}

// Stores a vector past the caches, for what is larger than they are: `p` on a multiple of its size.
// Other threads see it after finish_streams().
template <class T>
CBAM_INLINE void stream(T* p, vec_t<acc_t<T>> v) {
  constexpr int kBytes = kLanes<acc_t<T>> * sizeof(T);
  T stored[kLanes<acc_t<T>>];
  store(stored, v);
#if defined(__AVX512F__)
  if constexpr (kBytes == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_loadu_si512(stored));
#endif
#if defined(__AVX2__)
  if constexpr (kBytes == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored)));
#endif
#if defined(__SSE2__)
  if constexpr (kBytes == 16)
    return _mm_stream_si128(reinterpret_cast<__m128i*>(p),
                            _mm_loadu_si128(reinterpret_cast<const __m128i*>(stored)));
#endif
  std::memcpy(p, stored, kBytes);
}
CBAM_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
template <class A>
struct StreamedLanes : AllLanes<A> {
  template <class T>
  CBAM_INLINE_MEMBER void store(T* p, vec_t<A> v) const {
    stream(p, v);
  }
};
// for_vectors_again of rows that hold whole vectors.
template <class A, class Body>
CBAM_INLINE void for_streamed_vectors(int64_t n, Body body) {
  for (int64_t j = 0; j < n; j += kLanes<A>) body(j, StreamedLanes<A>{});
}

// For results of columns that are moved to their places at the end: body(slot, j, lanes) makes the
// vector of results `slot` from the columns j and after.
template <class A, class Body>
CBAM_INLINE void for_slots(int64_t n, Body body) {
  if (n < kLanes<A>) return body(int64_t{0}, int64_t{0}, FirstLanes<A>{n});
  int64_t j = 0;
  for (; j + kLanes<A> <= n; j += kLanes<A>) body(j, j, AllLanes<A>{});
  if (j < n) body(j, n - kLanes<A>, AllLanes<A>{});
}
template <class A, class E>
CBAM_INLINE void settle_slots(E* results, int64_t n) {
  const int64_t last = n % kLanes<A>;
  if (n > kLanes<A> && last)
    __builtin_memmove(results + n - last, results + n - last + kLanes<A> - last, last * sizeof(E));
}

CBAM_INLINE float widen_one(Half h) {
#if defined(__F16C__)
  return _cvtsh_ss(h.bits);
#else
  return widen(Bits16{h.bits}, Half{})[0];
#endif
}
CBAM_INLINE float widen_one(BFloat16 b) { return bit_cast<float>(uint32_t{b.bits} << 16); }

template <class T>
CBAM_INLINE acc_t<T> load_one(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return widen_one(*p);
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

// Calls body(Count<n>{}) for a run-time n in 1 .. kMost.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <int kMost, class Body>
CBAM_INLINE void for_count(int64_t n, Body body) {
  if (n == kMost) return body(Count<kMost>{});
  if constexpr (kMost > 1) for_count<kMost - 1>(n, body);
}

// Calls body(Count<kRows>{}, r) for rows [begin, end), kRows at a time, and Count<1>{} for what is
// left.
template <int kRows, class Body>
CBAM_INLINE void for_rows(int64_t begin, int64_t end, Body body) {
  int64_t r = begin;
  for (; r + kRows <= end; r += kRows) body(Count<kRows>{}, r);
  for (; r < end; ++r) body(Count<1>{}, r);
}

// What belongs to rows that are walked together. A copy: what is read through a pointer is read
// again after every store.
template <int kRows, class E>
struct OfRows {
  E of[kRows];

  CBAM_INLINE_MEMBER explicit OfRows(const E* first) { __builtin_memcpy(of, first, sizeof of); }
  CBAM_INLINE_MEMBER E operator[](int i) const { return of[i]; }
};

// Reductions across lanes, in a fixed order: halves onto halves.
template <class A, int kCount>
struct Part {
  typedef A vec __attribute__((vector_size(kCount * sizeof(A))));
};
template <class A, int kCount, class V, class Operation>
CBAM_INLINE A fold_lanes(V v, Operation operation) {
  if constexpr (kCount == 2) {
    return operation(v[0], v[1]);
  } else {
    typename Part<A, kCount / 2>::vec low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return fold_lanes<A, kCount / 2>(operation(low, high), operation);
  }
}
template <class A>
CBAM_INLINE A sum_of_lanes(vec_t<A> v) {
  return fold_lanes<A, kLanes<A>>(v, [](auto a, auto b) { return a + b; });
}

// NaN may get lost; callers look at the sum.
template <class A>
CBAM_INLINE vec_t<A> maximum(vec_t<A> a, vec_t<A> b) {
  return a > b ? a : b;
}

template <class A>
CBAM_INLINE A max_of_lanes(vec_t<A> v) {
  return fold_lanes<A, kLanes<A>>(v, [](auto a, auto b) { return b > a ? b : a; });
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
