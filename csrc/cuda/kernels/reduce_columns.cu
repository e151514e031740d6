// Reduction down columns: the pool over channels where they come first (rows are channels, the
// factor is the channel gate), the pool over space where they come last (rows are pixels).
//
//   mean[c] = sum_r x[r][c] * factor[r] / rows      max[c] = max_r x[r][c] * factor[r]
//
// grid    samples * splits * tiles blocks of 256 threads: `tile` threads side by side, each with
//         the columns of one vector, the others below them; a block takes `span` rows
// shared  the factor, span * acc; a partial result for every element of every thread's vector
// bytes   reads x once, the factor once a block; writes 2 * acc (and 4 with argmax) a column and
//         split
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/dependent_launch.cuh"
#include "../primitives/reduce.cuh"
#include "../primitives/vector_io.cuh"
#include "blocks.cuh"
#include "kernels.h"

namespace cbam::cuda {
namespace {

// What this thread's vector `v` of each row group gathers over `rows` rows: its elements keep their
// columns, those of a packed vector's second row are one row further down.
template <Access kAccess, bool kScaled, int kCount, bool kArgmax, class T>
__device__ __forceinline__ void gather_columns(const Reduction& r, const T* x, int v, int first,
                                               int rows, int start, int step,
                                               const acc_t<T>* factor,
                                               Extremes<acc_t<T>, kArgmax> (&e)[kCount]) {
  constexpr bool kPacked = kAccess == Access::kPacked;
  const VectorOfTwoRows<kPacked> columns(v * kCount, r.x.cols, kCount);
  const T* next = x + (first + start) * r.x.row_stride + int64_t{v} * kCount;
  const int64_t stride = step * r.x.row_stride;
  for_batches(
      start, rows, step,
      [&](int) {
        const T* at = next;
        next += stride;
        return load<kCount>(at);
      },
      [&](int row, const Raw<T, kCount>& raw) {
        const auto pack = widen(raw);
        const acc_t<T> by_first = kScaled ? factor[row + columns.first_row] : acc_t<T>(1);
        const acc_t<T> by_last = kScaled ? factor[row + columns.last_row] : acc_t<T>(1);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          // The choice takes predicates, which with positions there are too few of.
          const acc_t<T> by = kPacked && kArgmax ? factor[row + columns.row_of(i)]
                                                 : columns.of_element(i, by_first, by_last);
          e[i].add(kScaled ? pack.value[i] * by : pack.value[i], first + row);
        }
      });
  if constexpr (kArgmax) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (e[i].argmax != e[i].kNone) e[i].argmax += columns.row_of(i);
  }
}

// Where the partial result of an element of a thread's vector stands: no two threads of a warp
// store to the same bank.
template <int kCount>
__device__ __forceinline__ int partial_index(const ReductionGeometry& g, int below, int element) {
  return (below * kCount + element % kCount) * (g.tile + 1) + element / kCount;
}

// Column `column` of the tile, merged over the threads below each other, and for packed rows over
// the vectors in which the column comes up.
template <int kCount, bool kArgmax, class A>
__device__ __forceinline__ Extremes<A, kArgmax> merge_column(const ColumnShared<A>& shared,
                                                             const ReductionGeometry& g, int cols,
                                                             int column, int threads_below) {
  Extremes<A, kArgmax> merged;
  for (int y = 0; y < threads_below; ++y)
    for (int k = 0; k < g.row_group; ++k) {
      const int at = partial_index<kCount>(g, y, k * cols + column);
      Extremes<A, kArgmax> e;
      e.sum = shared.sum[at];
      e.max = shared.max[at];
      if constexpr (kArgmax) e.argmax = shared.argmax[at];
      merged.merge(e);
    }
  return merged;
}

template <class T, Access kAccess, bool kScaled, bool kArgmax>
__global__ void __launch_bounds__(kThreads,
                                  kAccess == Access::kPacked && kArgmax ? 2 : kColumnBlocks)
    reduce_columns_kernel(const Reduction r) {
  using A = acc_t<T>;
  constexpr int kCount = kAccess == Access::kScalar ? 1 : kVector<T>;
  const ReductionGeometry& g = r.geometry;
  const ReductionBlock block(g);
  const int first = block.split * g.span, rows = min(g.span, r.x.rows - first);
  const int threads_below = kThreads / g.tile, elements = g.tile * kCount;
  SharedCarver carver(dynamic_shared_memory());
  const ColumnShared<A> shared(carver, g, kScaled, kCount);
  const T* sample = static_cast<const T*>(r.x.data) + block.sample * r.x.sample_stride;
  if constexpr (!kScaled) wait_for_previous_launch();  // x may be what that one writes
  if constexpr (kAccess != Access::kScalar) {
    const int vectors = min(g.tile, g.period - block.tile * g.tile);
    prefetch_rows(sample + first * r.x.row_stride + block.tile * elements,
                  g.row_group * r.x.row_stride, rows / g.row_group, vectors * kVectorBytes);
  }
  if constexpr (kScaled) {
    wait_for_previous_launch();
    const A* factor = static_cast<const A*>(r.factor) + block.sample * r.x.rows + first;
    for (int i = threadIdx.x; i < rows; i += kThreads) shared.factor[i] = factor[i];
    __syncthreads();
  }
  const int x = threadIdx.x % g.tile, y = threadIdx.x / g.tile;
  const int vector = block.tile * g.tile + x;
  if (y < threads_below) {
    Extremes<A, kArgmax> e[kCount];
    if (vector < g.period) {
      gather_columns<kAccess, kScaled>(r, sample, vector, first, rows, y * g.row_group,
                                       threads_below * g.row_group, shared.factor, e);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = partial_index<kCount>(g, y, x * kCount + i);
      shared.sum[at] = e[i].sum;
      shared.max[at] = e[i].max;
      if constexpr (kArgmax) shared.argmax[at] = e[i].argmax;
    }
  }
  __syncthreads();
  const int first_col = block.tile * elements, cols = min(elements, r.x.cols - first_col);
  for (int c = threadIdx.x; c < cols; c += kThreads)
    write_part(r.out, block, r.x.cols, first_col + c,
               merge_column<kCount, kArgmax>(shared, g, r.x.cols, c, threads_below), r.x.rows,
               first);
}

}  // namespace

void reduce_columns(DType dtype, const Reduction& r, const Grid& grid, Stream stream) {
  const bool scaled = r.factor != nullptr;  // then rows are channels
  with_layout(dtype, r.geometry.access, scaled, [&](auto storage, auto access, auto first) {
    with_bool(r.out.argmax != nullptr, [&](auto argmax) {
      using T = typename decltype(storage)::type;
      launch("reduce_columns", reduce_columns_kernel<T, access.value, first.value, argmax.value>,
             grid, stream, r);
    });
  });
}

}  // namespace cbam::cuda
