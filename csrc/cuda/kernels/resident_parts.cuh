// Sums of which several threads have a part each.
#pragma once

#include "resident.h"

namespace cbam::cuda {

// The `count` sums that stand side by side have `parts` parts: a thread that works has part `part`
// of number `side`, of each of kSums such rows of sums. put(row, number, sum of the parts in their
// order); all may be read when this returns. `aside` is [kMostAside, threads].
template <int kSums, class A, class Put>
__device__ __forceinline__ void add_parts(const A (&sum)[kSums], bool works, int part, int parts,
                                          int side, int count, A* aside, Put put) {
  constexpr int kAside = kSums < kMostAside ? kSums : kMostAside;
  const int threads = static_cast<int>(blockDim.x);
#pragma unroll
  for (int done = 0; done < kSums; done += kAside) {
    if (works)
#pragma unroll
      for (int v = 0; v < kAside; ++v) aside[v * threads + part * count + side] = sum[done + v];
    __syncthreads();
    for (int i = threadIdx.x; i < kAside * count; i += threads) {
      const int v = i / count, number = i % count;
      A total = A(0);
#pragma unroll 4
      for (int of = 0; of < parts; ++of) total += aside[v * threads + of * count + number];
      put(done + v, number, total);
    }
    __syncthreads();
  }
}

}  // namespace cbam::cuda
