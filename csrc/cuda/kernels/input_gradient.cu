// The last pass of the backward, over dout alone:
//
//   dx[c][s] = (dout[c][s] * spatial_gate[s] + d_mean[s] + d_max[s] where c is s's maximum)
//              * channel_gate[c] + d_avg[c] + d_top[c] where s is c's maximum
//
// d_mean and d_avg are already divided by the channels and the pixels.
//
// grid    samples * splits * tiles blocks of 256 threads; a block takes `tile` columns, `span` rows
//
// shared  what belongs to its rows and columns, 3 * acc + 4 for each
//
// bytes   reads dout once, writes dx once; 3 * acc + 4 for each row and column of a block
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "tile_sums.cuh"

namespace cbam::cuda {
namespace {

// As StagedTerms, in global memory.
template <class A>
struct Terms {
  const A* gate;
  const A* first;
  const A* second;
  const int32_t* index;
};

template <class A>
__device__ __forceinline__ Terms<A> pixel_terms(const InputGradient& p, int64_t n, int64_t pixels) {
  const A* d_maps = static_cast<const A*>(p.d_maps) + n * 2 * pixels;
  return {static_cast<const A*>(p.spatial_gate) + n * pixels, d_maps, d_maps + pixels,
          p.channel_argmax + n * pixels};
}

template <class A>
__device__ __forceinline__ Terms<A> channel_terms(const InputGradient& p, int64_t n,
                                                  int64_t channels) {
  const A* d_pooled = static_cast<const A*>(p.d_pooled) + n * 2 * channels;
  return {static_cast<const A*>(p.channel_gate) + n * channels, d_pooled, d_pooled + channels,
          p.pixel_argmax + n * channels};
}

template <class A>
__device__ __forceinline__ void stage(const Terms<A>& from, int first, int count,
                                      const StagedTerms<A>& to) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    to.gate[i] = from.gate[first + i];
    to.first[i] = from.first[first + i];
    to.second[i] = from.second[first + i];
    to.index[i] = from.index[first + i];
  }
}

// What belongs to the columns of one vector, in registers; what is added at the maximum alone is
// read from shared memory when it comes up.
template <int kCount, bool kPacked, class A>
struct ColumnTerms : VectorColumns<kPacked> {
  A gate[kCount], first[kCount];
  int index[kCount];
  const A* second;

  // `start` counts from the tile's first column.
  __device__ __forceinline__ ColumnTerms(const StagedTerms<A>& terms, int start, int cols)
      : VectorColumns<kPacked>(start, cols, kCount), second(terms.second) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int column = this->column(i);
      gate[i] = terms.gate[column];
      first[i] = terms.first[column];
      index[i] = terms.index[column];
    }
  }
};

// One element: `of_maps` and `of_pools` are what reaches it through the maps and the pools.
template <class A>
__device__ __forceinline__ A input_gradient_of(A dout, A spatial_gate, A of_maps, A channel_gate,
                                               A of_pools) {
  return (dout * spatial_gate + of_maps) * channel_gate + of_pools;
}

template <class T, Access kAccess, bool kChannelsFirst>
__global__ void __launch_bounds__(kThreads, 2) input_gradient_kernel(const InputGradient p) {
  using A = acc_t<T>;
  constexpr int kCount = kAccess == Access::kScalar ? 1 : kVector<T>;
  constexpr bool kPacked = kAccess == Access::kPacked;
  const TileGeometry& g = p.geometry;
  const TileBlock block(g, p.dout);
  const auto pixels = pixel_terms<A>(p, block.sample, kChannelsFirst ? p.dout.cols : p.dout.rows);
  const auto channels =
      channel_terms<A>(p, block.sample, kChannelsFirst ? p.dout.rows : p.dout.cols);
  SharedCarver carver(dynamic_shared_memory());
  const InputGradientShared<A> shared(carver, g);
  const StagedTerms<A>& rows = shared.rows;
  stage(kChannelsFirst ? channels : pixels, block.first_row, block.rows, rows);
  stage(kChannelsFirst ? pixels : channels, block.first_col, block.cols, shared.columns);
  __syncthreads();
  const int threads_below = kThreads / g.threads_along;
  const int side = threadIdx.x % g.threads_along, below = threadIdx.x / g.threads_along;
  const int vectors = kPacked ? g.row_group * block.cols / kCount : block.cols / kCount;
  if (below >= threads_below) return;
  const T* dout = static_cast<const T*>(p.dout.data) + block.sample * p.dout.sample_stride;
  T* dx = static_cast<T*>(p.dx) + block.sample * p.dx_sample_stride;
  for (int v = side; v < vectors; v += g.threads_along) {
    const ColumnTerms<kCount, kPacked, A> own(shared.columns, v * kCount, block.cols);
    const int start = block.first_col + v * kCount;
    for_batches<2>(  // what belongs to the columns leaves no registers for more
        below * g.row_group, block.rows, threads_below * g.row_group,
        [&](int row) {
          return load<kCount>(dout + (block.first_row + row) * p.dout.row_stride + start);
        },
        [&](int row, const Raw<T, kCount>& raw) {
          auto pack = widen(raw);
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const int r = row + own.row_of(i), c = own.column(i);
            const A at_row = rows.index[r] == block.first_col + c ? rows.second[r] : A(0);
            const A at_column = own.index[i] == block.first_row + r ? own.second[c] : A(0);
            pack.value[i] =
                kChannelsFirst
                    ? input_gradient_of(pack.value[i], own.gate[i], own.first[i] + at_column,
                                        rows.gate[r], rows.first[r] + at_row)
                    : input_gradient_of(pack.value[i], rows.gate[r], rows.first[r] + at_row,
                                        own.gate[i], own.first[i] + at_column);
          }
          store(dx + (block.first_row + row) * p.dx_row_stride + start, pack);
        });
  }
}

}  // namespace

void input_gradient(DType dtype, const InputGradient& p, const Grid& grid, Stream stream) {
  with_layout(dtype, p.geometry.access, p.channels_first,
              [&](auto storage, auto access, auto first) {
                using T = typename decltype(storage)::type;
                launch("input_gradient", input_gradient_kernel<T, access.value, first.value>, grid,
                       stream, p);
              });
}

}  // namespace cbam::cuda
