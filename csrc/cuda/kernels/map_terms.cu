// The second pass of the backward, over x alone: what reaches the channel gate through the maps,
//
//   channels[c] = sum_s x[c][s] * (d_mean[s] + d_max[s] where c is the channel of s's maximum)
//
// d_mean here is the gradient of the mean map divided by the number of channels.
//
// grid    samples * splits * tiles blocks of 256 threads; a block takes `tile` columns, `span`
// rows,
//         each warp a run of these
// shared  what belongs to its pixels; the parts of `chunk` rows, or the columns, of a warp
// bytes   reads x once, 2 * acc + 4 for each pixel of a block; writes acc for each channel and part
#include "../dispatch.cuh"
#include "../launch.cuh"
#include "../primitives/dependent_launch.cuh"
#include "tile_sums.cuh"

namespace cbam::cuda {
namespace {

template <class Lane>
struct LoadedRow {
  typename Lane::Loaded x[Lane::kVectors];
};

// What belongs to the block's pixels, read once a block; `groups` times, each of which counts
// channels from a row of its own.
template <class A>
__device__ __forceinline__ void stage_pixel_terms(const MapTerms& p, int64_t sample, int first,
                                                  int pixels, int groups, int first_channel,
                                                  const TermsShared<A>& shared) {
  const int64_t all = p.channels_first ? p.x.cols : p.x.rows;
  const A* mean = static_cast<const A*>(p.d_maps) + sample * 2 * all + first;
  const int32_t* channel = p.channel_argmax + sample * all + first;
  for (int s = threadIdx.x; s < pixels; s += kThreads) {
    const A own = mean[s], both = own + mean[all + s];
    const int32_t from_first = channel[s] - first_channel;
    for (int k = 0; k < groups; ++k) {
      shared.mean[k * pixels + s] = own;
      shared.both[k * pixels + s] = both;
      shared.channel[k * pixels + s] = from_first - k;
    }
  }
  __syncthreads();
}

// Channels are rows: a lane keeps what belongs to its pixels in registers.
template <class T, Access kAccess, class A>
__device__ __forceinline__ void sum_channel_rows(const MapTerms& p, const TileBlock& block,
                                                 const T* x, const TermsShared<A>& shared) {
  using Lane = LaneVectors<T, kAccess>;
  using Row = LoadedRow<Lane>;
  constexpr int kBatch = Lane::kRowsUnderWay;
  const TileGeometry& g = p.geometry;
  stage_pixel_terms(p, block.sample, block.first_col, block.cols, g.row_group, block.first_row,
                    shared);
  A* sums = static_cast<A*>(p.channels.values) +
            (block.sample * p.channels.parts + block.tile) * p.x.rows + block.first_row;
  A* parts = shared.parts + threadIdx.x / 32 * g.warp_parts;
  const Lane lane(g, block.cols);
  A mean[Lane::kVectors][Lane::kCount], both[Lane::kVectors][Lane::kCount];
  int32_t channel[Lane::kVectors][Lane::kCount];
  lane.of_columns(shared.mean, mean);
  lane.of_columns(shared.both, both);
  lane.of_columns(shared.channel, channel);
  const WarpRows own(g, block.rows, kBatch);
  const int row_group = Lane::kPacked ? g.row_group : 1;
  for (int done = own.first; done < own.end; done += g.chunk) {
    const int end = min(done + g.chunk, own.end);
    for_rows<kBatch>(
        lane.has(0) ? (end - done) / row_group : 0,
        [&](int group) {
          Row row;
          lane.load_row(x + (done + group * row_group) * p.x.row_stride, row.x);
          return row;
        },
        [&](int group, const Row& row) {
          const int number = done + group * row_group;
          RowParts<Lane, A> of_row;
#pragma unroll
          for (int j = 0; j < Lane::kVectors; ++j) {
            if (j > 0 && !lane.has(j)) break;
            const auto values = widen(row.x[j]);
#pragma unroll
            for (int i = 0; i < Lane::kCount; ++i)
              of_row.add(lane, j, i, values.value[i],
                         channel[j][i] == number ? both[j][i] : mean[j][i]);
          }
          of_row.put(lane, parts, group);
        });
    sum_parts<Lane>(g, parts, end - done, block.cols,
                    [&](int row, A total) { sums[done + row] = total; });
  }
}

// Channels are columns: what belongs to a pixel comes with its row.
template <class T, Access kAccess, class A>
__device__ __forceinline__ void sum_channel_columns(const MapTerms& p, const TileBlock& block,
                                                    const T* x, const TermsShared<A>& shared) {
  using Lane = LaneVectors<T, kAccess, kTermChannels>;
  using Row = LoadedRow<Lane>;
  constexpr int kBatch = Lane::kVectors < 12 ? 12 / Lane::kVectors : 1;
  const TileGeometry& g = p.geometry;
  stage_pixel_terms(p, block.sample, block.first_row, block.rows, 1, block.first_col, shared);
  const Lane lane(g, block.cols);
  A sum[Lane::kVectors][Lane::kCount] = {};
  const WarpRows own(g, block.rows, kBatch);
  for_rows<kBatch>(
      lane.has(0) ? own.end - own.first : 0,
      [&](int number) {
        Row row;
        lane.load_row(x + (own.first + number) * p.x.row_stride, row.x);
        return row;
      },
      [&](int number, const Row& row) {
        const int at = own.first + number;
        const A mean = shared.mean[at], both = shared.both[at];
        const int32_t channel = shared.channel[at];
#pragma unroll
        for (int j = 0; j < Lane::kVectors; ++j) {
          if (j > 0 && !lane.has(j)) break;
          const auto values = widen(row.x[j]);
#pragma unroll
          for (int i = 0; i < Lane::kCount; ++i)
            sum[j][i] += values.value[i] * (channel == lane.element(j) + i ? both : mean);
        }
      });
  A* sums = static_cast<A*>(p.channels.values) +
            (block.sample * p.channels.parts + block.split) * p.x.cols + block.first_col;
  write_columns(g, lane, block.cols, sum, shared.parts, sums);
}

template <class T, Access kAccess, bool kChannelsFirst>
__global__ void __launch_bounds__(
    kThreads, LaneVectors<T, kAccess, kChannelsFirst ? kTileColumns : kTermChannels>::kBlocks)
    map_terms_kernel(const MapTerms p) {
  const TileBlock block(p.geometry, p.x);
  SharedCarver carver(dynamic_shared_memory());
  const TermsShared<acc_t<T>> shared(carver, p.geometry, kChannelsFirst);
  const T* x = static_cast<const T*>(p.x.data) + block.sample * p.x.sample_stride +
               block.first_row * p.x.row_stride + block.first_col;
  prefetch_tile<kAccess>(p.geometry, block, x, p.x.row_stride);
  wait_for_previous_launch();
  if constexpr (kChannelsFirst)
    sum_channel_rows<T, kAccess>(p, block, x, shared);
  else
    sum_channel_columns<T, kAccess>(p, block, x, shared);
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
