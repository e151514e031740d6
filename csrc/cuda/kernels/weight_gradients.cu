// The gradients of the weights: sums over the batch of small vectors that the forward saved and the
// backward left. Plain fixed-order loops: the products are too small to be worth a library whose
// results depend on its version, and on flags that callers set. What is written is in the dtype of
// the weights, rounded once: a cast of each afterwards would take a launch.
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/numeric.cuh"
#include "backward.h"

namespace cbam::cuda {
namespace {

// a[k][first .. first + kOuterTile) for `count` values of k, parts added; zeros outside.
template <class A>
__device__ __forceinline__ void stage(const Vectors& from, int64_t first_k, int first, A* to) {
  for (int i = threadIdx.x; i < kOuterDepth * kOuterTile; i += kThreads) {
    const int64_t k = first_k + i / kOuterTile;
    const int column = first + i % kOuterTile;
    A value = A(0);
    if (k < from.count && column < from.length) {
      const A* at = static_cast<const A*>(from.values) + k * from.pitch + column;
      for (int part = 0; part < from.parts; ++part) value += at[int64_t{part} * from.length];
    }
    to[i] = value;
  }
}

//   out[i][j] = sum_k a[k][i] * b[k][j]      of two pairs of a and b
//
// grid    a block of 256 threads for each kOuterTile x kOuterTile outputs, four to a thread
//
// shared  kOuterDepth values of k for the tile's rows and columns
//
// bytes   reads a and b once for each tile that they touch, writes out once
template <class T>
__global__ void __launch_bounds__(kThreads) outer_sums_kernel(const OuterSums both) {
  using A = acc_t<T>;
  constexpr int kEach = kOuterTile * kOuterTile / kThreads, kRowStep = kThreads / kOuterTile;
  const auto blocks = static_cast<int>(outer_blocks(both.first.a.length, both.first.b.length));
  const bool second = static_cast<int>(blockIdx.x) >= blocks;
  const OuterSum p = second ? both.second : both.first;
  const int tiles = (p.b.length + kOuterTile - 1) / kOuterTile;
  const int block = blockIdx.x - (second ? blocks : 0);
  const int first_row = block / tiles * kOuterTile, first_col = block % tiles * kOuterTile;
  const int x = threadIdx.x % kOuterTile, y = threadIdx.x / kOuterTile;
  SharedCarver carver(dynamic_shared_memory());
  const OuterShared<A> shared(carver);
  A sum[kEach] = {};
  for (int64_t first_k = 0; first_k < p.a.count; first_k += kOuterDepth) {
    stage(p.a, first_k, first_row, shared.a);
    stage(p.b, first_k, first_col, shared.b);
    __syncthreads();
    for (int k = 0; k < kOuterDepth; ++k) {
      const A b = shared.b[k * kOuterTile + x];
#pragma unroll
      for (int e = 0; e < kEach; ++e) sum[e] += shared.a[k * kOuterTile + y + e * kRowStep] * b;
    }
    __syncthreads();
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int row = first_row + y + e * kRowStep, column = first_col + x;
    if (row < p.a.length && column < p.b.length)
      static_cast<T*>(p.out)[int64_t{row} * p.b.length + column] = narrow<T>(sum[e]);
  }
}

//   out[i] = scale * sum_k a[k][i]      of several a
//
// grid    a block of 256 threads for each 32 outputs, a warp for every eighth k
//
// shared  a sum for each thread
//
// bytes   reads a once, writes out once
template <class T>
__global__ void __launch_bounds__(kThreads) vector_sums_kernel(const VectorSums all) {
  using A = acc_t<T>;
  static_assert(kSummedTogether == 32, "one for each lane");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int block = blockIdx.x;
  VectorSum p = all.sum[0];
#pragma unroll
  for (int i = 1; i < kMostVectorSums; ++i) {
    const auto blocks = static_cast<int>(vector_blocks(p.a.length));
    if (block < blocks) break;
    block -= blocks;
    p = all.sum[i];
  }
  const int column = block * kSummedTogether + lane;
  SharedCarver carver(dynamic_shared_memory());
  const VectorSumsShared<A> shared(carver);
  A sum = A(0);
  if (column < p.a.length)
#pragma unroll 4
    for (int64_t k = warp; k < p.a.count; k += kThreads / 32)
      sum += static_cast<const A*>(p.a.values)[k * p.a.pitch + column];
  shared.sum[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || column >= p.a.length) return;
  A total = A(0);
  for (int w = 0; w < kThreads / 32; ++w) total += shared.sum[w * 32 + lane];
  static_cast<T*>(p.out)[column] = narrow<T>(static_cast<A>(p.scale) * total);
}

}  // namespace

void outer_sums(DType dtype, const OuterSums& p, const Grid& grid, Stream stream) {
  with_storage(dtype, [&](auto weight) {
    launch("outer_sums", outer_sums_kernel<typename decltype(weight)::type>, grid, stream, p);
  });
}

void vector_sums(DType dtype, const VectorSums& p, const Grid& grid, Stream stream) {
  with_storage(dtype, [&](auto weight) {
    launch("vector_sums", vector_sums_kernel<typename decltype(weight)::type>, grid, stream, p);
  });
}

}  // namespace cbam::cuda
