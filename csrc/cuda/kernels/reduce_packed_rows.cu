// Reduction along short rows that follow each other without a gap: the pool over space where
// channels come first and a channel is no whole number of vectors.
//
//   mean[r] = sum_c x[r][c] / cols      max[r] = max_c x[r][c]
//
// grid    samples * tiles blocks of 256 threads; a block brings `tile` rows, which are one piece of
//         memory, to shared memory and adds them up there, `lanes` threads a row
// shared  tile rows
// bytes   reads x once; writes 2 * acc (and 4 with argmax) a row
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/dependent_launch.cuh"
#include "../primitives/reduce.cuh"
#include "../primitives/vector_io.cuh"
#include "blocks.cuh"
#include "kernels.h"

namespace cbam::cuda {
namespace {

// `count` elements, from a multiple of 16 bytes on.
template <class T>
__device__ __forceinline__ void stage_rows(const T* from, int count, T* to) {
  constexpr int kCount = kVector<T>;
  const int vectors = count / kCount, rest = vectors * kCount + threadIdx.x;
  if (rest < count) to[rest] = from[rest];
  for_batches<8>(
      threadIdx.x, vectors, kThreads, [&](int v) { return load<kCount>(from + v * kCount); },
      [&](int v, const Raw<T, kCount>& raw) {
        *reinterpret_cast<uint4*>(to + v * kCount) = raw.words;
      });
}

// Every lanes-th element of a row.
template <bool kArgmax, class T>
__device__ __forceinline__ Extremes<acc_t<T>, kArgmax> gather_staged(const T* row, int cols,
                                                                     int lane, int lanes) {
  Extremes<acc_t<T>, kArgmax> e;
#pragma unroll 8
  for (int c = lane; c < cols; c += lanes) e.add(widen(row[c]), c);
  return e;
}

template <class T, bool kArgmax>
__global__ void __launch_bounds__(kThreads, 4) reduce_packed_rows_kernel(const Reduction r) {
  const ReductionGeometry& g = r.geometry;
  const ReductionBlock block(g);
  const int cols = r.x.cols;
  const int first_row = block.tile * g.tile, rows = min(g.tile, r.x.rows - first_row);
  SharedCarver carver(dynamic_shared_memory());
  const PackedRowShared<T> shared(carver, g);
  wait_for_previous_launch();
  stage_rows(static_cast<const T*>(r.x.data) + block.sample * r.x.sample_stride +
                 int64_t{first_row} * cols,
             rows * cols, shared.rows);
  __syncthreads();
  const int lane = threadIdx.x % g.lanes, rows_at_once = kThreads / g.lanes;
  for (int done = 0; done < rows; done += rows_at_once) {
    const int within = done + threadIdx.x / g.lanes;
    Extremes<acc_t<T>, kArgmax> e;
    if (within < rows) e = gather_staged<kArgmax>(shared.rows + within * cols, cols, lane, g.lanes);
    merge_lanes(e, g.lanes);
    if (lane == 0 && within < rows)
      write_part(r.out, block, r.x.rows, first_row + within, e, cols, 0);
  }
}

}  // namespace

void reduce_packed_rows(DType dtype, const Reduction& r, const Grid& grid, Stream stream) {
  with_storage(dtype, [&](auto storage) {
    with_bool(r.out.argmax != nullptr, [&](auto argmax) {
      using T = typename decltype(storage)::type;
      launch("reduce_packed_rows", reduce_packed_rows_kernel<T, argmax.value>, grid, stream, r);
    });
  });
}

}  // namespace cbam::cuda
