// A walk along a row that starts anywhere, with 16-byte loads wherever they are aligned.
#pragma once

#include "../primitives/reduce.cuh"
#include "../primitives/vector_io.cuh"

namespace cbam::cuda {

// Adds the elements of row[0 .. count) that this of `lanes` threads takes, times their factor: up
// to the first multiple of 16 bytes and behind the last one by one, between them vectors, which
// load(pointer) gives. `first` is the index of row[0].
template <bool kScaled, bool kArgmax, class T, class Load>
__device__ __forceinline__ void gather_row(const T* row, int count, int first,
                                           const acc_t<T>* factor, int lane, int lanes, Load load,
                                           Extremes<acc_t<T>, kArgmax>& e) {
  constexpr int kCount = kVector<T>;
  using A = acc_t<T>;
  const auto add = [&](A v, int c) { e.add(kScaled ? v * factor[c] : v, first + c); };
  const int to_boundary = elements_to_boundary(row);
  const int head = to_boundary < count ? to_boundary : count;
  const int vectors = (count - head) / kCount;
  if (lane < head) add(widen(row[lane]), lane);
  for_batches(
      lane, vectors, lanes, [&](int v) { return load(row + head + v * kCount); },
      [&](int v, const Raw<T, kCount>& raw) {
        const int c = head + v * kCount;
        auto pack = widen(raw);
        if constexpr (kScaled) {
          A own[kCount];
          load_shared(factor + c, head == 0, own);
#pragma unroll
          for (int i = 0; i < kCount; ++i) pack.value[i] *= own[i];
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) e.add(pack.value[i], first + c + i);
      });
  const int tail = head + vectors * kCount + lane;
  if (tail < count) add(widen(row[tail]), tail);
}

}  // namespace cbam::cuda
