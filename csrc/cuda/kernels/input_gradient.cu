// The last pass of the backward, over dout alone; the formula
// stands in input_gradient.cuh.
//
// grid    samples * splits * tiles blocks of 256 threads; a block takes `tile` columns, `span` rows
//
// shared  what belongs to its rows and columns, 3 * acc + 4 for each
//
// bytes   reads dout once, writes dx once; 3 * acc + 4 for each row and column of a block
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "input_gradient.cuh"
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
    to.gate()[i] = from.gate[first + i];
    to.first()[i] = from.first[first + i];
    to.second()[i] = from.second[first + i];
    to.index()[i] = from.index[first + i];
  }
}

template <class T, Access kAccess, bool kChannelsFirst>
__global__ void __launch_bounds__(kThreads, 2) input_gradient_kernel(const InputGradient p) {
  using A = acc_t<T>;
  const TileGeometry& g = p.geometry;
  const TileBlock block(g, p.dout);
  const auto pixels = pixel_terms<A>(p, block.sample, kChannelsFirst ? p.dout.cols : p.dout.rows);
  const auto channels =
      channel_terms<A>(p, block.sample, kChannelsFirst ? p.dout.rows : p.dout.cols);
  SharedCarver carver(dynamic_shared_memory());
  const InputGradientShared<A> shared(carver, g);
  stage(kChannelsFirst ? channels : pixels, block.first_row, block.rows, shared.rows);
  stage(kChannelsFirst ? pixels : channels, block.first_col, block.cols, shared.columns);
  __syncthreads();
  const T* dout = static_cast<const T*>(p.dout.data) + block.sample * p.dout.sample_stride +
                  block.first_row * p.dout.row_stride + block.first_col;
  T* dx = static_cast<T*>(p.dx) + block.sample * p.dx_sample_stride +
          block.first_row * p.dx_row_stride + block.first_col;
  InputGradientThread<T, kAccess, kChannelsFirst> thread(
      {shared.rows, shared.columns, block.first_row, block.first_col, block.cols, g.row_group,
       g.threads_along});
  constexpr int kBatch = 2;  // what belongs to the columns leaves no registers for more
  thread.template write<kBatch>(
      0, block.rows,
      [&](int row, int col) { return load<thread.kCount>(dout + row * p.dout.row_stride + col); },
      dx, p.dx_row_stride);
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
