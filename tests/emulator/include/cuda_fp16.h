// IEEE half precision: storage, and conversions that round to the nearest, ties to even.
#pragma once

#include <cuda_runtime.h>

namespace emulator {

inline float float_of_half(unsigned short half) {
  const unsigned sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude < 0x400) {  // zero or subnormal: multiples of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  const unsigned exponent_offset = magnitude < 0x7c00 ? (127 - 15) << 23 : (255 - 31) << 23;
  return bits_of<float>(sign | ((magnitude << 13) + exponent_offset));
}

inline unsigned short half_of_float(float value) {
  const unsigned bits = bits_of<unsigned>(value);
  const unsigned sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned half;
  if (magnitude > 0x7f800000u) {
    half = 0x7fff;  // the one NaN that the hardware gives
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the sum with 0.5, whose last bit is 2^-24, rounds as the subnormal must.
    half = bits_of<unsigned>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    const unsigned rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    half = (rounded >> 13) - ((127 - 15) << 10);
  }
  return static_cast<unsigned short>(sign | half);
}

}  // namespace emulator

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline unsigned short __half_as_ushort(__half half) { return half.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half half) { return emulator::float_of_half(half.bits); }
inline __half __float2half_rn(float value) { return {emulator::half_of_float(value)}; }
inline __half __float2half(float value) { return __float2half_rn(value); }

inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
