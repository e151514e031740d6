// Vectors of elements in memory: loads and stores, of a whole vector or of what is left at the end
// of a row, and walks over rows.
#pragma once

#include "convert.h"

namespace cbam::cpu {
namespace {

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

// Copies bytes past the caches, for what is larger than they are: `to` on a multiple of kBytes.
// Other threads see them after finish_streams().
template <int kBytes>
CBAM_INLINE void stream(void* to, const void* from) {
#if defined(__AVX512F__)
  if constexpr (kBytes == 64)
    return _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#endif
#if defined(__AVX2__)
  if constexpr (kBytes == 32)
    return _mm256_stream_si256(static_cast<__m256i*>(to),
                               _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#endif
#if defined(__SSE2__)
  if constexpr (kBytes == 16)
    return _mm_stream_si128(static_cast<__m128i*>(to),
                            _mm_loadu_si128(static_cast<const __m128i*>(from)));
#endif
  std::memcpy(to, from, kBytes);
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
    T stored[kLanes<A>];
    cpu::store(stored, v);
    stream<sizeof stored>(p, stored);
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

template <class T>
CBAM_INLINE acc_t<T> load_one(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return widen_one(*p);
  } else {
    return *p;
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

  OfRows() = default;
  CBAM_INLINE_MEMBER explicit OfRows(const E* first) { __builtin_memcpy(of, first, sizeof of); }
  CBAM_INLINE_MEMBER E operator[](int i) const { return of[i]; }
};

}  // namespace
}  // namespace cbam::cpu
