// Which part of the work a block or a thread takes, and where a reduction's block leaves its
// result.
#pragma once

#include "../primitives/reduce.cuh"
#include "../primitives/vector_io.cuh"
#include "kernels.h"

namespace cbam::cuda {

// This block's number, counted from the end where a pass runs backwards.
__device__ __forceinline__ int block_number(bool reverse) {
  return static_cast<int>(reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// What a block asks for before it needs it: of all blocks of an H100 12 MB, about 3 us of reading.
constexpr int kBytesAhead = 32 * 1024;

// Asks for the first of so many rows of x, `bytes` of each, so that the memory is busy while the
// block prepares. Rows start and end on multiples of 16 bytes.
template <class T>
__device__ __forceinline__ void prefetch_rows(const T* first, int64_t stride, int rows, int bytes) {
  const int row = threadIdx.x;
  if (row < rows && row * bytes < kBytesAhead) prefetch(first + row * stride, bytes);
}

// A box of pixels, cut at the edges of the image, and how a map of it is staged: with a halo, rows
// padded to whole runs. `number` counts boxes first, then samples.
struct Box : PixelBox {
  int64_t sample;
  int staged_height, staged_row, staged;  // elements: of a column, of a row, of all

  __device__ __forceinline__ Box(const BoxGeometry& g, const Space& s, int number) {
    x = number % g.boxes_width * g.box_width;
    number /= g.boxes_width;
    y = number % g.boxes_height * g.box_height;
    number /= g.boxes_height;
    z = number % g.boxes_depth * g.box_depth;
    sample = number / g.boxes_depth;
    depth = min(g.box_depth, s.depth - z);
    height = min(g.box_height, s.height - y);
    width = min(g.box_width, s.width - x);
    set_staged(s);
  }
  // Of a single sample.
  __device__ __forceinline__ Box(const Space& s, const PixelBox& box) : PixelBox(box), sample(0) {
    set_staged(s);
  }
  // Where a map is staged for a place that counts from the halo's first.
  __device__ __forceinline__ int at(int from_z, int from_y, int from_x) const {
    return (from_z * staged_height + from_y) * staged_row + from_x;
  }

 private:
  __device__ __forceinline__ void set_staged(const Space& s) {
    staged_height = height + s.kernel_height - 1;
    staged_row = staged_width(width, s.kernel_width);
    staged = staged_row * staged_height * (depth + s.kernel_depth - 1);
  }
};

// What is staged at a place: the number of the pixel in the image, -1 outside of image and halo;
// whether it belongs to the box itself, and its number there.
struct StagedPixel {
  int pixel;
  bool inside;
  int place;

  // Its place counts from the halo's first.
  __device__ __forceinline__ StagedPixel(const Box& box, const Space& s, int x, int y, int z) {
    const int halo_x = s.kernel_width / 2;
    const int bx = x - halo_x, by = y - s.kernel_height / 2, bz = z - s.kernel_depth / 2;
    const int px = box.x + bx, py = box.y + by, pz = box.z + bz;
    const bool exists = pz >= 0 && pz < s.depth && py >= 0 && py < s.height && px >= 0 &&
                        px < s.width && bx < box.width + halo_x;
    pixel = exists ? (pz * s.height + py) * s.width + px : -1;
    inside = exists && bz >= 0 && bz < box.depth && by >= 0 && by < box.height && bx >= 0 &&
             bx < box.width;
    place = (bz * box.height + by) * box.width + bx;
  }
};

// Every `step`th place of a box of this width and height, counted along rows, from `start` on:
// without a division for each.
class Places {
 public:
  int x, y, z;

  __device__ __forceinline__ Places(int width, int height, int start, int step)
      : x(start % width),
        y(start / width % height),
        z(start / width / height),
        width_(width),
        height_(height),
        step_x_(step % width),
        step_y_(step / width % height),
        step_z_(step / width / height) {}
  __device__ __forceinline__ void next() {
    x += step_x_;
    y += step_y_;
    z += step_z_;
    if (x >= width_) {
      x -= width_;
      ++y;
    }
    if (y >= height_) {
      y -= height_;
      ++z;
    }
  }

 private:
  int width_, height_, step_x_, step_y_, step_z_;
};

// put(i, StagedPixel) for every index i of what is staged of the box and its halo.
template <class Put>
__device__ __forceinline__ void for_staged_pixels(const Box& box, const Space& s, Put put) {
  Places place(box.staged_row, box.staged_height, threadIdx.x, blockDim.x);
  for (int i = threadIdx.x; i < box.staged; i += blockDim.x, place.next())
    put(i, StagedPixel(box, s, place.x, place.y, place.z));
}

// One of the weights, which are stored as x is or in what x is computed in.
template <class T>
__device__ __forceinline__ acc_t<T> weight_at(const void* weights, DType dtype, int64_t i) {
  const bool wide = dtype == DType::kFloat32 || dtype == DType::kFloat64;
  return wide ? static_cast<const acc_t<T>*>(weights)[i]
              : acc_t<T>(widen(static_cast<const T*>(weights)[i]));
}

// The columns of one vector of a row group that starts with element `first`: column(i), in the row
// row_of(i) further down. Without kPacked they follow each other in one row.
template <bool kPacked>
struct VectorColumns {
  int first, cols;
  unsigned rows = 0;  // four bits for each element

  __device__ __forceinline__ VectorColumns(int first_, int cols_, int count)
      : first(first_), cols(cols_) {
    if constexpr (kPacked)
      for (int i = 0; i < count; ++i) rows |= static_cast<unsigned>((first + i) / cols) << (4 * i);
  }
  __device__ __forceinline__ int row_of(int i) const {
    return kPacked ? static_cast<int>(rows >> (4 * i) & 15) : 0;
  }
  __device__ __forceinline__ int column(int i) const { return first + i - row_of(i) * cols; }
};

// The same where rows are long enough for a vector of `count` elements to touch two at most.
template <bool kPacked>
struct VectorOfTwoRows {
  int first, cols;
  int first_row = 0, last_row = 0;
  int in_first_row = 0;  // elements

  __device__ __forceinline__ VectorOfTwoRows(int first_, int cols_, int count)
      : first(first_), cols(cols_) {
    if constexpr (kPacked) {
      first_row = first / cols;
      in_first_row = (first_row + 1) * cols - first;
      last_row = in_first_row < count ? first_row + 1 : first_row;
    }
  }
  // What belongs to element i, of what belongs to its two rows.
  template <class V>
  __device__ __forceinline__ V of_element(int i, V of_first, V of_last) const {
    return !kPacked || i < in_first_row ? of_first : of_last;
  }
  __device__ __forceinline__ int row_of(int i) const { return of_element(i, first_row, last_row); }
  __device__ __forceinline__ int column(int i) const { return first + i - row_of(i) * cols; }
};

struct ReductionBlock {
  int64_t sample;
  int split, tile;

  __device__ __forceinline__ explicit ReductionBlock(const ReductionGeometry& g) {
    const int number = block_number(g.reverse), per_sample = g.tiles * g.splits;
    const int within = number % per_sample;
    sample = number / per_sample;
    split = within / g.tiles;
    tile = within % g.tiles;
  }
};

// `count` is the number of elements that all parts of an output have together, `first` the index of
// this part's first.
template <class A, bool kArgmax>
__device__ __forceinline__ void write_part(const Parts& out, const ReductionBlock& block,
                                           int outputs, int output, const Extremes<A, kArgmax>& e,
                                           int count, int first) {
  const int64_t part = block.sample * out.splits + block.split;
  A* values = static_cast<A*>(out.values) + part * 2 * outputs + output;
  values[0] = e.sum / static_cast<A>(count);
  values[outputs] = e.max;
  if constexpr (kArgmax) out.argmax[part * outputs + output] = e.argmax_or(first);
}

// One part of an output; argmax stays kNone without kArgmax.
template <bool kArgmax, class A>
__device__ __forceinline__ Extremes<A, kArgmax> read_part(const Parts& parts, int64_t sample,
                                                          int split, int outputs, int output) {
  const int64_t part = sample * parts.splits + split;
  const A* values = static_cast<const A*>(parts.values) + part * 2 * outputs + output;
  Extremes<A, kArgmax> e;
  e.sum = values[0];
  e.max = values[outputs];
  if constexpr (kArgmax) e.argmax = parts.argmax[part * outputs + output];
  return e;
}

// All parts of one output, merged in their order; kBatch of them are under way at a time.
template <bool kArgmax, class A, int kBatch = 1>
__device__ __forceinline__ Extremes<A, kArgmax> merge_parts(const Parts& parts, int64_t sample,
                                                            int outputs, int output) {
  const auto read = [&](int split) {
    return read_part<kArgmax, A>(parts, sample, split, outputs, output);
  };
  auto merged = read(0);  // a single part as it is, NaN and all
  for_batches<kBatch>(1, parts.splits, 1, read,
                      [&](int, const Extremes<A, kArgmax>& part) { merged.merge(part); });
  return merged;
}

}  // namespace cbam::cuda
