// The parts of the backward's first sums, each sum's added up, where they are what was asked for:
//
//   totals[n][i] = sum over parts p of parts[n][p][i]
//
// grid    a thread for each row and column of each sample, in blocks of 256
// shared  none
// bytes   reads every part once, writes acc for each row and column
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/dependent_launch.cuh"
#include "tile_sums.cuh"

namespace cbam::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) total_sums_kernel(const TotalSums p) {
  using A = acc_t<T>;
  wait_for_previous_launch();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, count = int64_t{p.rows} + p.cols;
  const int64_t sample = i / count, at = i % count;
  if (sample >= p.samples) return;
  const bool is_row = at < p.rows;
  const int64_t place = is_row ? at : at - p.rows, length = is_row ? p.rows : p.cols;
  A* totals = static_cast<A*>(is_row ? p.row_totals : p.col_totals);
  totals[sample * length + place] =
      total_of<A>(is_row ? p.row_parts : p.col_parts, sample, length, place);
}

}  // namespace

void total_sums(DType dtype, const TotalSums& p, const Grid& grid, Stream stream) {
  with_storage(dtype, [&](auto storage) {
    launch("total_sums", total_sums_kernel<typename decltype(storage)::type>, grid, stream, p);
  });
}

}  // namespace cbam::cuda
