// The first pass of the backward: with p = dout * x,
//
//   rows[r] = sum_c p[r][c] * col_factor[c]       cols[c] = sum_r p[r][c] * row_factor[r]
//
// where the factors are the gates: one of the sums is the gradient of the spatial gate, the other
// the first term of the channel gate's.
//
// grid    samples * splits * tiles blocks of 256 threads; a block takes `tile` columns, `span`
// rows,
//         each warp a run of these
// shared  the factors of its rows and columns; the parts of `chunk` rows, or the columns, of a warp
// bytes   reads x and dout once, each factor once a block; writes acc for each row and tile, and
//         for each column and split
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/dependent_launch.cuh"
#include "tile_sums.cuh"

namespace cbam::cuda {
namespace {

template <class T, Access kAccess>
struct RowOfBoth {
  using Lane = LaneVectors<T, kAccess>;
  typename Lane::Loaded x[Lane::kVectors], dout[Lane::kVectors];
};

// Both factors, read once a block; the columns' once for each row of a group.
template <class A>
__device__ __forceinline__ void stage_factors(const CrossSums& p, const TileBlock& block,
                                              const CrossShared<A>& shared) {
  const A* rows = static_cast<const A*>(p.row_factor) + block.sample * p.x.rows + block.first_row;
  const A* cols = static_cast<const A*>(p.col_factor) + block.sample * p.x.cols + block.first_col;
  for (int r = threadIdx.x; r < block.rows; r += kThreads) shared.row_factor[r] = rows[r];
  for (int c = threadIdx.x; c < block.cols; c += kThreads) {
    const A factor = cols[c];
    for (int k = 0; k < p.geometry.row_group; ++k) shared.col_factor[k * block.cols + c] = factor;
  }
  __syncthreads();
}

template <class T, Access kAccess>
__global__ void __launch_bounds__(kThreads, LaneVectors<T, kAccess>::kBlocks)
    cross_sums_kernel(const CrossSums p) {
  using A = acc_t<T>;
  using Lane = LaneVectors<T, kAccess>;
  constexpr int kBatch = Lane::kRowsOfTwo;
  const TileGeometry& g = p.geometry;
  const TileBlock block(g, p.x);
  SharedCarver carver(dynamic_shared_memory());
  const CrossShared<A> shared(carver, g);
  wait_for_previous_launch();
  stage_factors(p, block, shared);
  const T* x = static_cast<const T*>(p.x.data) + block.sample * p.x.sample_stride +
               block.first_row * p.x.row_stride + block.first_col;
  const T* dout = static_cast<const T*>(p.dout.data) + block.sample * p.dout.sample_stride +
                  block.first_row * p.dout.row_stride + block.first_col;
  A* row_sums = static_cast<A*>(p.rows.values) +
                (block.sample * p.rows.parts + block.tile) * p.x.rows + block.first_row;
  A* col_sums = static_cast<A*>(p.cols.values) +
                (block.sample * p.cols.parts + block.split) * p.x.cols + block.first_col;
  A* parts = shared.parts + threadIdx.x / 32 * g.warp_parts;
  const Lane lane(g, block.cols);
  A factor[Lane::kVectors][Lane::kCount], sum[Lane::kVectors][Lane::kCount] = {};
  lane.of_columns(shared.col_factor, factor);
  const WarpRows own(g, block.rows, kBatch);
  const int row_group = Lane::kPacked ? g.row_group : 1;
  for (int done = own.first; done < own.end; done += g.chunk) {
    const int end = min(done + g.chunk, own.end);
    for_rows<kBatch>(
        lane.has(0) ? (end - done) / row_group : 0,
        [&](int group) {
          const int row = done + group * row_group;
          RowOfBoth<T, kAccess> raw;
          lane.load_row(x + row * p.x.row_stride, raw.x);
          lane.load_row(dout + row * p.dout.row_stride, raw.dout);
          return raw;
        },
        [&](int group, const RowOfBoth<T, kAccess>& raw) {
          const int row = done + group * row_group;
          RowParts<Lane, A> of_row;
#pragma unroll
          for (int j = 0; j < Lane::kVectors; ++j) {
            if (j > 0 && !lane.has(j)) break;
            const auto x_values = widen(raw.x[j]), dout_values = widen(raw.dout[j]);
            A here = shared.row_factor[row], below = here;
            if constexpr (Lane::kPacked) {
              here = shared.row_factor[row + lane.row[j]];
              below = shared.row_factor[min(row + lane.row[j] + 1, block.rows - 1)];
            }
#pragma unroll
            for (int i = 0; i < Lane::kCount; ++i) {
              const A product = x_values.value[i] * dout_values.value[i];
              of_row.add(lane, j, i, product, factor[j][i]);
              sum[j][i] += product * (lane.below(j, i) ? below : here);
            }
          }
          of_row.put(lane, parts, group);
        });
    sum_parts<Lane>(g, parts, end - done, block.cols,
                    [&](int row, A total) { row_sums[done + row] = total; });
  }
  write_columns(g, lane, block.cols, sum, shared.parts, col_sums);
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
