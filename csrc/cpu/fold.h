// Reductions across lanes, in a fixed order: halves onto halves.
#pragma once

#include <utility>

#include "simd.h"

namespace cbam::cpu {
namespace {

template <int... i>
using Places = std::integer_sequence<int, i...>;

// Lanes kPlaces of a and b, b's counted on from a's.
template <class E, class V, int... kPlaces>
CBAM_INLINE V shuffle(V a, V b, Places<kPlaces...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kPlaces...);
#else
  using Integers = decltype(a < b);
  return __builtin_shuffle(a, b, Integers{kPlaces...});
#endif
}

// Lanes stand in parts of kPart that belong together. Of two vectors, the lower or the upper halves
// of all parts; of one, the other half of each part; and the first lane of each part.
template <int kPart, bool kUpper, int... i>
constexpr auto halves(Places<i...>) {
  constexpr int kHalf = kPart / 2;
  return Places<(i / kHalf * kPart + i % kHalf + kUpper * kHalf)...>{};
}
template <int kPart, int... i>
constexpr auto other_halves(Places<i...>) {
  return Places<(i ^ kPart / 2)...>{};
}
template <int kPart, int... i>
constexpr auto first_lanes(Places<i...>) {
  return Places<(i * kPart % sizeof...(i))...>{};
}

// Each kPart lanes of the vectors to one, these side by side.
template <class E, int kPart, int kVectors, class V, class Operation>
CBAM_INLINE V fold_parts(const V (&v)[kVectors], Operation operation) {
  constexpr auto kAll = std::make_integer_sequence<int, sizeof(V) / sizeof(E)>{};
  if constexpr (kVectors > 1) {
    V folded[kVectors / 2];
    for (int i = 0; i < kVectors / 2; ++i)
      folded[i] = operation(shuffle<E>(v[2 * i], v[2 * i + 1], halves<kPart, false>(kAll)),
                            shuffle<E>(v[2 * i], v[2 * i + 1], halves<kPart, true>(kAll)));
    return fold_parts<E, kPart / 2>(folded, operation);
  } else {
    static_assert(kPart <= 16, "a vector has 16 lanes at most");
    V folded = v[0];
    if constexpr (kPart >= 16)
      folded = operation(folded, shuffle<E>(folded, folded, other_halves<16>(kAll)));
    if constexpr (kPart >= 8)
      folded = operation(folded, shuffle<E>(folded, folded, other_halves<8>(kAll)));
    if constexpr (kPart >= 4)
      folded = operation(folded, shuffle<E>(folded, folded, other_halves<4>(kAll)));
    if constexpr (kPart >= 2)
      folded = operation(folded, shuffle<E>(folded, folded, other_halves<2>(kAll)));
    return shuffle<E>(folded, folded, first_lanes<kPart>(kAll));
  }
}

// to[i] = the lanes of v[i] folded to one. Vectors share instructions where they can: one by itself
// leaves most lanes idle. The pairs are those of one by itself.
template <class E, int kVectors, class V, class Operation>
CBAM_INLINE void fold_lanes(const V (&v)[kVectors], E* to, Operation operation) {
  constexpr int kCount = sizeof(V) / sizeof(E), kPower = kVectors & -kVectors;
  constexpr int kTogether = kPower < kCount ? kPower : kCount;
  for (int first = 0; first < kVectors; first += kTogether) {
    V some[kTogether];
    for (int i = 0; i < kTogether; ++i) some[i] = v[first + i];
    const V folded = fold_parts<E, kCount>(some, operation);
    __builtin_memcpy(to + first, &folded, kTogether * sizeof(E));
  }
}

template <class A, int kVectors>
CBAM_INLINE void sums_of_lanes(const vec_t<A> (&v)[kVectors], A* sums) {
  fold_lanes(v, sums, [](auto a, auto b) { return a + b; });
}
// NaN may get lost.
template <class A, int kVectors>
CBAM_INLINE void maxima_of_lanes(const vec_t<A> (&v)[kVectors], A* maxima) {
  fold_lanes(v, maxima, [](auto a, auto b) { return maximum<A>(b, a); });
}
template <class A, int kVectors>
CBAM_INLINE void minima_of_lanes(const ivec_t<A> (&v)[kVectors], index_t<A>* minima) {
  fold_lanes(v, minima, [](auto a, auto b) { return b < a ? b : a; });
}

}  // namespace
}  // namespace cbam::cpu
