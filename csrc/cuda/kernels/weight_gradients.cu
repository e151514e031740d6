// The gradients of the weights: sums over the batch of small vectors that the forward saved and the
// backward left. Plain fixed-order loops: the products are too small to be worth a library whose
// results depend on its version, and on flags that callers set. What is written is in the dtype of
// the weights, rounded once: a cast of each afterwards would take a launch.
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/dependent_launch.cuh"
#include "../primitives/reduce.cuh"
#include "../primitives/vector_io.cuh"
#include "backward.h"

namespace cbam::cuda {
namespace {

// Where a block's outputs stand in those of its product.
template <int kTile>
struct OuterTile {
  int row, column;

  __device__ __forceinline__ OuterTile(const OuterSum& p, int block) {
    const int tiles = (p.b.length + kTile - 1) / kTile;
    row = block / tiles * kTile;
    column = block % tiles * kTile;
  }
};

// Elements of a, or of b, that a thread stages at a time.
constexpr int kStagedEach = kOuterStaged / kThreads;

// What this thread stages of the vectors from number `first_k` on: element `column` of every
// `step`-th, its parts added; 0 outside. All loads are under way at once.
template <class A>
__device__ __forceinline__ void read_each(const Vectors& from, int64_t first_k, int column,
                                          int step, A (&value)[kStagedEach]) {
  const A* at = static_cast<const A*>(from.values) + first_k * from.pitch + column;
  const auto left = column < from.length ? from.count - first_k : 0;
#pragma unroll
  for (int e = 0; e < kStagedEach; ++e)
    value[e] = e * step < left ? at[e * step * from.pitch] : A(0);
  if (from.parts == 1) return;
  A more[kStagedEach];
  at += from.length;
#pragma unroll
  for (int e = 0; e < kStagedEach; ++e)
    more[e] = e * step < left ? at[e * step * from.pitch] : A(0);
#pragma unroll
  for (int e = 0; e < kStagedEach; ++e) value[e] += more[e];
}

// What a block's tile takes of a and b, from number `first_k` on, into shared memory.
template <int kTile, class A>
__device__ __forceinline__ void stage(const OuterSum& p, int64_t first_k,
                                      const OuterTile<kTile>& tile, const OuterShared<A>& shared) {
  constexpr int kStep = kThreads / kTile;
  const int within = threadIdx.x % kTile;
  first_k += threadIdx.x / kTile;
  A a[kStagedEach], b[kStagedEach];
  read_each(p.a, first_k, tile.row + within, kStep, a);
  read_each(p.b, first_k, tile.column + within, kStep, b);
#pragma unroll
  for (int e = 0; e < kStagedEach; ++e) {
    shared.a[threadIdx.x + e * kThreads] = a[e];
    shared.b[threadIdx.x + e * kThreads] = b[e];
  }
}

// Blocks of a multiprocessor, by their registers.
template <class A, int kTile>
constexpr int kOuterBlocks = sizeof(A) == 8        ? 1
                             : kTile == kSmallTile ? 3
                                                   : 2;

//   out[i][j] = sum_k a[k][i] * b[k][j]      of two pairs of a and b
//
// grid    a block of 256 threads for each kTile x kTile outputs; each warp has all of these, a
//         rectangle to a lane, of every eighth k
//
// shared  kOuterStaged elements of a and of b, and the warps' sums
//
// bytes   reads a and b once for each tile that they touch, writes out once
template <class T, int kTile>
__global__ void __launch_bounds__(kThreads, kOuterBlocks<acc_t<T>, kTile>)
    outer_sums_kernel(const OuterSums both) {
  using A = acc_t<T>;
  constexpr int kRows = kTile / 8, kCols = kTile / 4;  // of a lane, 8 x 4 of which make a tile
  constexpr int kDepth = kOuterStaged / kTile, kWarps = kThreads / 32;
  static_assert(kWarps == kOuterMerged, "a warp for each value that is merged");
  const auto blocks =
      static_cast<int>(outer_blocks(both.first.a.length, both.first.b.length, kTile));
  const bool second = static_cast<int>(blockIdx.x) >= blocks;
  const OuterSum p = second ? both.second : both.first;
  const OuterTile<kTile> tile(p, blockIdx.x - (second ? blocks : 0));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = lane / 4 * kRows, column = lane % 4 * kCols;
  SharedCarver carver(dynamic_shared_memory());
  const OuterShared<A> shared(carver);
  wait_for_previous_launch();
  A sum[kRows * kCols] = {};
  for (int64_t first_k = 0; first_k < p.a.count; first_k += kDepth) {
    stage(p, first_k, tile, shared);
    __syncthreads();
    const auto depth = static_cast<int>(min(int64_t{kDepth}, p.a.count - first_k));
#pragma unroll 4
    for (int k = warp; k < depth; k += kWarps) {
      A a[kRows], b[kCols];
      load_shared(shared.a + k * kTile + row, true, a);
      load_shared(shared.b + k * kTile + column, true, b);
#pragma unroll
      for (int i = 0; i < kRows * kCols; ++i) sum[i] += a[i / kCols] * b[i % kCols];
    }
    __syncthreads();
  }
#pragma unroll
  for (int first = 0; first < kRows * kCols; first += kOuterMerged) {
#pragma unroll
    for (int i = 0; i < kOuterMerged; ++i)
      shared.partial[(warp * kOuterMerged + i) * 32 + lane] = sum[first + i];
    __syncthreads();
    A total = A(0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += shared.partial[(w * kOuterMerged + warp) * 32 + lane];
    const int i = tile.row + row + (first + warp) / kCols;
    const int j = tile.column + column + (first + warp) % kCols;
    if (i < p.a.length && j < p.b.length)
      static_cast<T*>(p.out)[int64_t{i} * p.b.length + j] = narrow<T>(total);
    __syncthreads();
  }
}

//   out[i] = scale * sum_k a[k][i]      of several a
//
// grid    a block of kSumThreads threads for each kSummedTogether outputs, which are side by side;
//         threads below each other share the values of k
//
// shared  the warps' sums
//
// bytes   reads a once, writes out once
template <class T>
__global__ void __launch_bounds__(kSumThreads) vector_sums_kernel(const VectorSums all) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, side = threadIdx.x % kSummedTogether;
  int block = blockIdx.x;
  VectorSum p = all.sum[0];
#pragma unroll
  for (int i = 1; i < kMostVectorSums; ++i) {
    const auto blocks = static_cast<int>(vector_blocks(p.a.length));
    if (block < blocks) break;
    block -= blocks;
    p = all.sum[i];
  }
  const int column = block * kSummedTogether + side;
  SharedCarver carver(dynamic_shared_memory());
  const VectorSumsShared<A> shared(carver);
  wait_for_previous_launch();
  const A* values = static_cast<const A*>(p.a.values) + column;
  A sum[1] = {};
  if (column < p.a.length)
    for_batches<16>(
        threadIdx.x / kSummedTogether, static_cast<int>(p.a.count), kSumThreads / kSummedTogether,
        [&](int k) { return values[k * p.a.pitch]; }, [&](int, A value) { sum[0] += value; });
  sum_strided(sum, kSummedTogether);
  if (lane < kSummedTogether) shared.sum[warp * kSummedTogether + lane] = sum[0];
  __syncthreads();
  if (threadIdx.x >= kSummedTogether || column >= p.a.length) return;
  A total = A(0);
#pragma unroll
  for (int w = 0; w < kSumThreads / 32; ++w) total += shared.sum[w * kSummedTogether + side];
  const int64_t place = p.of.place(column, p.a.length / 2);
  static_cast<T*>(p.out)[place] = narrow<T>(static_cast<A>(p.scale) * total);
}

}  // namespace

void outer_sums(DType dtype, const OuterSums& p, const Grid& grid, Stream stream) {
  with_storage(dtype, [&](auto weight) {
    using T = typename decltype(weight)::type;
    if (p.tile == kSmallTile)
      launch("outer_sums", outer_sums_kernel<T, kSmallTile>, grid, stream, p);
    else
      launch("outer_sums", outer_sums_kernel<T, kLargeTile>, grid, stream, p);
  });
}

void vector_sums(DType dtype, const VectorSums& p, const Grid& grid, Stream stream) {
  with_storage(dtype, [&](auto weight) {
    launch("vector_sums", vector_sums_kernel<typename decltype(weight)::type>, grid, stream, p);
  });
}

}  // namespace cbam::cuda
