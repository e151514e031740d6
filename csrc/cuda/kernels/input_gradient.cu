// The last pass of the backward, over dout alone.
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

// Indices count from the block's first column and first row.
template <class A>
__device__ __forceinline__ void stage(const TileBlock& block, const Terms<A>& rows,
                                      const Terms<A>& cols, const InputGradientShared<A>& to) {
  for (int r = threadIdx.x; r < block.rows; r += kThreads) {
    const int at = block.first_row + r;
    to.rows[r] = {rows.gate[at], rows.first[at], rows.second[at], rows.index[at] - block.first_col};
  }
  for (int c = threadIdx.x; c < block.cols; c += kThreads) {
    const int at = block.first_col + c;
    to.columns.gate()[c] = cols.gate[at];
    to.columns.first()[c] = cols.first[at];
    to.columns.second()[c] = cols.second[at];
    to.columns.index()[c] = cols.index[at] - block.first_row;
  }
  __syncthreads();
}

// What belongs to the columns of one vector, in registers for all rows; what is added at the
// maximum alone stays in shared memory. A vector of packed rows begins `ahead` rows below its group
// and may go on in the row after that, with element `split`.
template <int kCount, bool kPacked, class A>
struct OwnTerms {
  int start;  // its first column
  int ahead = 0, split = kCount;
  A gate[kCount], first[kCount];
  int index[kCount];  // of the group's first row where `second` is added
  const A* second;

  __device__ __forceinline__ OwnTerms(const StagedTerms<A>& terms, int element, int cols)
      : start(element) {
    if constexpr (kPacked) {
      ahead = element / cols;
      start -= ahead * cols;
      split = min(kCount, cols - start);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int column = i < split ? start + i : start + i - cols;
        gate[i] = terms.gate()[column];
        first[i] = terms.first()[column];
        index[i] = terms.index()[column] - ahead - (i < split ? 0 : 1);
      }
    } else {
      load_shared(terms.gate() + start, true, gate);
      load_shared(terms.first() + start, true, first);
      load_shared(terms.index() + start, true, index);
    }
    second = terms.second() + start;
  }
};

// dx of one vector at a time.
template <class T, Access kAccess, bool kChannelsFirst>
class VectorGradient {
 public:
  using A = acc_t<T>;
  static constexpr int kCount = kAccess == Access::kScalar ? 1 : kVector<T>;

  // `element` counts from the first of a group of rows.
  __device__ __forceinline__ VectorGradient(const InputGradientShared<A>& shared, int element,
                                            int cols)
      : rows_(shared.rows), cols_(cols), own_(shared.columns, element, cols) {}

  // In the group that begins with `row`.
  __device__ __forceinline__ Pack<T, kCount> of(int row, const Raw<T, kCount>& raw) const {
    const int begins = row + own_.ahead;
    const RowTerms<A> upper = rows_[begins];
    RowTerms<A> lower = upper;
    if (kPacked && own_.split < kCount) lower = rows_[begins + 1];
    auto pack = widen(raw);
    bool of_columns = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      of_columns = of_columns || own_.index[i] == row;
      const A gate = below(i) ? lower.gate : upper.gate,
              of_row = below(i) ? lower.first : upper.first;
      pack.value[i] =
          kChannelsFirst
              ? input_gradient_of(pack.value[i], own_.gate[i], own_.first[i], gate, of_row)
              : input_gradient_of(pack.value[i], gate, of_row, own_.gate[i], own_.first[i]);
    }
    if (of_columns) add_of_columns(row, upper.gate, lower.gate, pack);
    add_of_row(upper, upper.index - own_.start, 0, own_.split, pack);
    if constexpr (kPacked) add_of_row(lower, lower.index + own_.split, own_.split, kCount, pack);
    return pack;
  }

 private:
  static constexpr bool kPacked = kAccess == Access::kPacked;

  __device__ __forceinline__ bool below(int i) const { return kPacked && i >= own_.split; }

  // What columns have at their maximum alone; few have it in this row.
  __device__ __forceinline__ void add_of_columns(int row, A upper_gate, A lower_gate,
                                                 Pack<T, kCount>& pack) const {
    unsigned have = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) have |= own_.index[i] == row ? 1u << i : 0u;
    for (; have; have &= have - 1) {
      const int at = __ffs(static_cast<int>(have)) - 1;
      const A second = own_.second[below(at) ? at - cols_ : at];
      const A gate = below(at) ? lower_gate : upper_gate;
      add(at, kChannelsFirst ? second * gate : second, pack);
    }
  }
  // The same of a row, where its maximum is element `at` of the vector's [from, end).
  __device__ __forceinline__ void add_of_row(const RowTerms<A>& row, int at, int from, int end,
                                             Pack<T, kCount>& pack) const {
    if (at < from || at >= end) return;
    A gate = A(1);
    if constexpr (!kChannelsFirst)
#pragma unroll
      for (int i = 0; i < kCount; ++i) gate = i == at ? own_.gate[i] : gate;
    add(at, row.second * gate, pack);
  }
  __device__ __forceinline__ static void add(int at, A value, Pack<T, kCount>& pack) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.value[i] += i == at ? value : A(0);
  }

  const RowTerms<A>* rows_;
  const int cols_;
  const OwnTerms<kCount, kPacked, A> own_;
};

template <class T, Access kAccess, bool kChannelsFirst>
__global__ void __launch_bounds__(kThreads, 2) input_gradient_kernel(const InputGradient p) {
  using A = acc_t<T>;
  using Gradient = VectorGradient<T, kAccess, kChannelsFirst>;
  constexpr int kCount = Gradient::kCount;
  const TileGeometry& g = p.geometry;
  const TileBlock block(g, p.dout);
  const auto pixels = pixel_terms<A>(p, block.sample, kChannelsFirst ? p.dout.cols : p.dout.rows);
  const auto channels =
      channel_terms<A>(p, block.sample, kChannelsFirst ? p.dout.rows : p.dout.cols);
  SharedCarver carver(dynamic_shared_memory());
  const InputGradientShared<A> shared(carver, g);
  const T* dout = static_cast<const T*>(p.dout.data) + block.sample * p.dout.sample_stride +
                  block.first_row * p.dout.row_stride + block.first_col;
  if constexpr (kAccess != Access::kScalar)
    prefetch_rows(dout, g.row_group * p.dout.row_stride, block.rows / g.row_group,
                  g.row_group * block.cols * static_cast<int>(sizeof(T)));
  stage(block, kChannelsFirst ? channels : pixels, kChannelsFirst ? pixels : channels, shared);
  T* dx = static_cast<T*>(p.dx) + block.sample * p.dx_sample_stride +
          block.first_row * p.dx_row_stride + block.first_col;
  // Threads side by side keep the columns of their vectors, those below them take the rows, or
  // groups of packed ones, that follow.
  const int side = static_cast<int>(threadIdx.x) % g.threads_along,
            below = static_cast<int>(threadIdx.x) / g.threads_along,
            step = kThreads / g.threads_along, elements = g.row_group * block.cols;
  if (below >= step) return;
  for (int e = side * kCount; e < elements; e += g.threads_along * kCount) {
    const Gradient gradient(shared, e, block.cols);
    for_batches(
        below * g.row_group, block.rows, step * g.row_group,
        [&](int row) { return load<kCount>(dout + row * p.dout.row_stride + e); },
        [&](int row, const Raw<T, kCount>& raw) {
          store(dx + row * p.dx_row_stride + e, gradient.of(row, raw));
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
