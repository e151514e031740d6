// The second pass of the backward, over x alone: what reaches the channel gate through the maps,
//
//   channels[c] = sum_s x[c][s] * (d_mean[s] + d_max[s] where c is the channel of s's maximum)
//
// d_mean here is the gradient of the mean map divided by the number of channels.
//
// grid    samples * splits * tiles blocks of 256 threads; a block takes `tile` columns, `span` rows
//
// shared  `chunk` rows of x, what belongs to its pixels
//
// bytes   reads x once, 2 * acc + 4 for each pixel of a block; writes acc for each channel and part
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "tile_sums.cuh"

namespace cbam::cuda {
namespace {

// Brings x's chunk of rows to shared memory.
template <Access kAccess, int kCount, class T, class A>
__device__ __forceinline__ void stage_chunk(const TileGeometry& g, const T* x, int64_t row_stride,
                                            int rows, int cols, A* staged) {
  const TileLoop<kAccess, kCount> loop(g, rows, cols);
  for_batches(
      loop.first, loop.end, loop.step,
      [&](int i) { return load<kCount>(x + loop.element(i, row_stride)); },
      [&](int i, const Raw<T, kCount>& raw) {
        store_shared(staged + loop.staged(i, cols), widen(raw).value);
      });
}

// What this block's pixels contribute with.
template <class A>
struct PixelTerms {
  const A* mean;
  const A* max;
  const int32_t* channel;

  __device__ __forceinline__ PixelTerms(const MapTerms& p, int64_t sample, int first) {
    const int64_t pixels = p.channels_first ? p.x.cols : p.x.rows;
    mean = static_cast<const A*>(p.d_maps) + sample * 2 * pixels + first;
    max = mean + pixels;
    channel = p.channel_argmax + sample * pixels + first;
  }
};

// Channels are rows: a lane keeps what belongs to its pixels in registers.
template <Access kAccess, int kCount, class T, class A>
__device__ __forceinline__ void sum_channel_rows(const MapTerms& p, const TileBlock& block,
                                                 const T* x, const TileShared<A>& shared) {
  const TileGeometry& g = p.geometry;
  const PixelTerms<A> terms(p, block.sample, block.first_col);
  A* sums = static_cast<A*>(p.channels.values) +
            (block.sample * p.channels.parts + block.tile) * p.x.rows + block.first_row;
  A mean[kTileColumns / 32], max[kTileColumns / 32];
  int channel[kTileColumns / 32];
  // Through shared memory, so that each pixel's terms are read once a block.
  const auto spread = [&](auto* from, auto* staged, auto& to) {
    for (int j = threadIdx.x; j < block.cols; j += kThreads) staged[j] = from[j];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTileColumns / 32; ++k) {
      const int j = threadIdx.x % 32 + 32 * k;
      to[k] = j < block.cols ? staged[j] : 0;
    }
    __syncthreads();
  };
  spread(terms.mean, shared.column_sums, mean);
  spread(terms.max, shared.column_sums, max);
  spread(terms.channel, shared.column_index, channel);
  for (int done = 0; done < block.rows; done += g.chunk) {
    const int rows = min(g.chunk, block.rows - done);
    stage_chunk<kAccess, kCount>(g, x + done * p.x.row_stride, p.x.row_stride, rows, block.cols,
                                 shared.staged);
    __syncthreads();
    sum_rows(
        shared.staged, rows, block.cols,
        [&](int row, int k) {
          return channel[k] == block.first_row + done + row ? mean[k] + max[k] : mean[k];
        },
        [&](int row, A sum) { sums[done + row] = sum; });
    __syncthreads();
  }
}

// Channels are columns, up to two to a thread: what belongs to the pixels comes with their rows.
template <Access kAccess, int kCount, class T, class A>
__device__ __forceinline__ void sum_channel_columns(const MapTerms& p, const TileBlock& block,
                                                    const T* x, const TileShared<A>& shared) {
  const TileGeometry& g = p.geometry;
  const PixelTerms<A> terms(p, block.sample, block.first_row);
  const TileColumn own[] = {TileColumn(block.cols), TileColumn(block.cols, kThreads)};
  A sum[2] = {};
  for (int done = 0; done < block.rows; done += g.chunk) {
    const int rows = min(g.chunk, block.rows - done);
    stage_chunk<kAccess, kCount>(g, x + done * p.x.row_stride, p.x.row_stride, rows, block.cols,
                                 shared.staged);
    for (int r = threadIdx.x; r < rows; r += kThreads) {
      shared.row_factor[r] = terms.mean[done + r];
      shared.row_extra[r] = terms.max[done + r];
      shared.row_index[r] = terms.channel[done + r];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i)
      sum_column(
          shared.staged, rows, block.cols, own[i],
          [&](int row) {
            const bool is_max = shared.row_index[row] == block.first_col + own[i].column;
            return is_max ? shared.row_factor[row] + shared.row_extra[row] : shared.row_factor[row];
          },
          sum[i]);
    __syncthreads();
  }
  A* sums = static_cast<A*>(p.channels.values) +
            (block.sample * p.channels.parts + block.split) * p.x.cols + block.first_col;
  write_columns(shared.column_sums, own[0], sum[0], sums);
  if (block.cols <= kThreads) return;
  // Each thread had a column of its own, and reads nothing that others overwrite now.
  write_columns(shared.column_sums, own[1], sum[1], sums);
}

template <class T, Access kAccess, bool kChannelsFirst>
__global__ void __launch_bounds__(kThreads, 2) map_terms_kernel(const MapTerms p) {
  constexpr int kCount = kAccess == Access::kScalar ? 1 : kVector<T>;
  const TileBlock block(p.geometry, p.x);
  SharedCarver carver(dynamic_shared_memory());
  const TileShared<acc_t<T>> shared(carver, p.geometry);
  const T* x = static_cast<const T*>(p.x.data) + block.sample * p.x.sample_stride +
               block.first_row * p.x.row_stride + block.first_col;
  if constexpr (kChannelsFirst)
    sum_channel_rows<kAccess, kCount>(p, block, x, shared);
  else
    sum_channel_columns<kAccess, kCount>(p, block, x, shared);
}

}  // namespace

void map_terms(DType dtype, const MapTerms& p, const Grid& grid, Stream stream) {
  with_layout(
      dtype, p.geometry.access, p.channels_first, [&](auto storage, auto access, auto first) {
        using T = typename decltype(storage)::type;
        launch("map_terms", map_terms_kernel<T, access.value, first.value>, grid, stream, p);
      });
}

}  // namespace cbam::cuda
