// Storage of 16 bits to float lanes and back, rounding to nearest even; NaN stays NaN.
#pragma once

#include "simd.h"

namespace cbam::cpu {
namespace {

typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));
#if defined(__AVX512F__)
typedef int16_t Words __attribute__((vector_size(kVectorBytes)));

// Both move words by one shuffle: word i to the upper half of lane i, and back.
CBAM_INLINE vec_t<float> widen(Bits16 bits, BFloat16) {
  const Words places = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                        0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  const __m512i words = _mm512_castsi256_si512(bit_cast<__m256i>(bits));
  return bit_cast<vec_t<float>>(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, bit_cast<__m512i>(places), words));
}
// What is NaN is not rounded, as that could carry into its sign. From arithmetic it has a bit set
// in the half that is kept.
CBAM_INLINE Bits16 narrow(vec_t<float> v, BFloat16) {
  const Words places = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i u = bit_cast<__m512i>(v);
  const __m512 f = bit_cast<__m512>(v);
  const __mmask16 number = _mm512_cmp_ps_mask(f, f, _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, u, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_mask_add_epi32(u, number, u, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
  return bit_cast<Bits16>(
      _mm512_castsi512_si256(_mm512_permutexvar_epi16(bit_cast<__m512i>(places), rounded)));
}
#else
#if defined(__AVX2__)
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
#endif

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

CBAM_INLINE float widen_one(Half h) {
#if defined(__F16C__)
  return _cvtsh_ss(h.bits);
#else
  return widen(Bits16{h.bits}, Half{})[0];
#endif
}
CBAM_INLINE float widen_one(BFloat16 b) { return bit_cast<float>(uint32_t{b.bits} << 16); }

}  // namespace
}  // namespace cbam::cpu
