// Reduction along rows: the pool over space where channels come first (rows are channels), the pool
// over channels where they come last (rows are pixels, the factor is the channel gate).
//
//   mean[r] = sum_c x[r][c] * factor[c] / cols      max[r] = max_c x[r][c] * factor[c]
//
// grid    samples * splits * tiles blocks of 256 threads; a block takes `tile` rows of one sample
//         over `span` of their columns, `lanes` threads a row
// shared  the factor, span * acc; for rows that take the whole block 8 partial results
// bytes   reads x once, the factor once a block; writes 2 * acc (and 4 with argmax) a row and split
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/dependent_launch.cuh"
#include "blocks.cuh"
#include "gather_row.cuh"
#include "kernels.h"

namespace cbam::cuda {
namespace {

// Merges what all warps of the block hold of one row; warp 0 returns with the result.
template <class A, bool kArgmax>
__device__ __forceinline__ void merge_block(const RowShared<A>& shared, Extremes<A, kArgmax>& e) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  merge_lanes(e, 32);
  if (lane == 0) {
    shared.sum[warp] = e.sum;
    shared.max[warp] = e.max;
    if constexpr (kArgmax) shared.argmax[warp] = e.argmax;
  }
  __syncthreads();
  if (warp == 0) {
    e = {};
    if (lane < kThreads / 32) {
      e.sum = shared.sum[lane];
      e.max = shared.max[lane];
      if constexpr (kArgmax) e.argmax = shared.argmax[lane];
    }
    merge_lanes(e, 32);
  }
  __syncthreads();
}

template <class T, bool kScaled, bool kArgmax>
__global__ void __launch_bounds__(kThreads, 4) reduce_rows_kernel(const Reduction r) {
  using A = acc_t<T>;
  const ReductionGeometry& g = r.geometry;
  const int rows_at_once = kThreads / g.lanes;
  const ReductionBlock block(g);
  const int first_col = block.split * g.span;
  const int count = min(g.span, r.x.cols - first_col);
  const int first_row = block.tile * g.tile, rows = min(g.tile, r.x.rows - first_row);
  SharedCarver carver(dynamic_shared_memory());
  const RowShared<A> shared(carver, g, kScaled);
  wait_for_previous_launch();
  if constexpr (kScaled) {
    const A* factor = static_cast<const A*>(r.factor) + block.sample * r.x.cols + first_col;
    for (int c = threadIdx.x; c < count; c += kThreads) shared.factor[c] = factor[c];
    __syncthreads();
  }
  const int lane = threadIdx.x % g.lanes;
  for (int done = 0; done < rows; done += rows_at_once) {
    const int within = done + threadIdx.x / g.lanes, row = first_row + within;
    Extremes<A, kArgmax> e;
    if (within < rows) {
      const T* x = static_cast<const T*>(r.x.data) + block.sample * r.x.sample_stride +
                   row * r.x.row_stride + first_col;
      gather_row<kScaled>(
          x, count, first_col, shared.factor, lane, g.lanes,
          [](const T* at) { return load<kVector<T>>(at); }, e);
    }
    if (g.lanes <= 32)
      merge_lanes(e, g.lanes);
    else
      merge_block(shared, e);
    if (lane == 0 && within < rows) write_part(r.out, block, r.x.rows, row, e, r.x.cols, first_col);
  }
}

}  // namespace

void reduce_rows(DType dtype, const Reduction& r, const Grid& grid, Stream stream) {
  with_storage(dtype, [&](auto storage) {
    with_bool(r.factor != nullptr, [&](auto scaled) {
      with_bool(r.out.argmax != nullptr, [&](auto argmax) {
        using T = typename decltype(storage)::type;
        launch("reduce_rows", reduce_rows_kernel<T, scaled.value, argmax.value>, grid, stream, r);
      });
    });
  });
}

}  // namespace cbam::cuda
