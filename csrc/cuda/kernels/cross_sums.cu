// The first pass of the backward: with p = dout * x,
//
//   rows[r] = sum_c p[r][c] * col_factor[c]       cols[c] = sum_r p[r][c] * row_factor[r]
//
// where the factors are the gates: one of the sums is the gradient of the spatial gate, the other
// the first term of the channel gate's.
//
// grid    samples * splits * tiles blocks of 256 threads; a block takes `tile` columns, `span` rows
//
// shared  `chunk` rows of products, the factors of its rows, a sum for each thread
//
// bytes   reads x and dout once, each factor once a block; writes acc for each row and tile, and
//         for each column and split
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "tile_sums.cuh"

namespace cbam::cuda {
namespace {

template <class T, int kCount>
struct RawPair {
  Raw<T, kCount> x, dout;
};

template <class T, Access kAccess>
__global__ void __launch_bounds__(kThreads, 2) cross_sums_kernel(const CrossSums p) {
  using A = acc_t<T>;
  constexpr int kCount = kAccess == Access::kScalar ? 1 : kVector<T>;
  const TileGeometry& g = p.geometry;
  const TileBlock block(g, p.x);
  SharedCarver carver(dynamic_shared_memory());
  const TileShared<A> shared(carver, g);
  const T* x = static_cast<const T*>(p.x.data) + block.sample * p.x.sample_stride +
               block.first_row * p.x.row_stride + block.first_col;
  const T* dout = static_cast<const T*>(p.dout.data) + block.sample * p.dout.sample_stride +
                  block.first_row * p.dout.row_stride + block.first_col;
  const A* row_factor =
      static_cast<const A*>(p.row_factor) + block.sample * p.x.rows + block.first_row;
  const A* col_factor =
      static_cast<const A*>(p.col_factor) + block.sample * p.x.cols + block.first_col;
  A* row_sums = static_cast<A*>(p.rows.values) +
                (block.sample * p.rows.parts + block.tile) * p.x.rows + block.first_row;
  A* col_sums = static_cast<A*>(p.cols.values) +
                (block.sample * p.cols.parts + block.split) * p.x.cols + block.first_col;
  // A lane's columns stay the same for all rows; the first warp alone reads them from memory.
  const TileColumn own(block.cols);
  A factor[kTileColumns / 32];
  for (int j = threadIdx.x; j < block.cols; j += kThreads) shared.column_sums[j] = col_factor[j];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kTileColumns / 32; ++k) {
    const int j = threadIdx.x % 32 + 32 * k;
    factor[k] = j < block.cols ? shared.column_sums[j] : A(0);
  }
  A column_sum = A(0);
  for (int done = 0; done < block.rows; done += g.chunk) {
    const int rows = min(g.chunk, block.rows - done);
    const TileLoop<kAccess, kCount> loop(g, rows, block.cols);
    const T* x_chunk = x + done * p.x.row_stride;
    const T* dout_chunk = dout + done * p.dout.row_stride;
    for_batches<2>(
        loop.first, loop.end, loop.step,
        [&](int i) {
          return RawPair<T, kCount>{load<kCount>(x_chunk + loop.element(i, p.x.row_stride)),
                                    load<kCount>(dout_chunk + loop.element(i, p.dout.row_stride))};
        },
        [&](int i, const RawPair<T, kCount>& raw) {
          auto product = widen(raw.x);
          const auto dout_values = widen(raw.dout);
#pragma unroll
          for (int k = 0; k < kCount; ++k) product.value[k] *= dout_values.value[k];
          store_shared(shared.staged + loop.staged(i, block.cols), product.value);
        });
    for (int r = threadIdx.x; r < rows; r += kThreads) shared.row_factor[r] = row_factor[done + r];
    __syncthreads();
    sum_rows(
        shared.staged, rows, block.cols, [&](int, int k) { return factor[k]; },
        [&](int row, A sum) { row_sums[done + row] = sum; });
    sum_column(
        shared.staged, rows, block.cols, own, [&](int row) { return shared.row_factor[row]; },
        column_sum);
    __syncthreads();
  }
  write_columns(shared.column_sums, own, column_sum, col_sums);
}

}  // namespace

void cross_sums(DType dtype, const CrossSums& p, const Grid& grid, Stream stream) {
  const bool either = true;  // the layout changes nothing here
  with_layout(dtype, p.geometry.access, either, [&](auto storage, auto access, auto) {
    using T = typename decltype(storage)::type;
    launch("cross_sums", cross_sums_kernel<T, access.value>, grid, stream, p);
  });
}

}  // namespace cbam::cuda
