// Which part of the work a block takes, and where a reduction's block leaves its result.
#pragma once

#include "../primitives/reduce.cuh"
#include "kernels.h"

namespace cbam::cuda {

// This block's number, counted from the end where a pass runs backwards.
__device__ __forceinline__ int block_number(bool reverse) {
  return static_cast<int>(reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// A box of pixels, cut at the edges of the image. `number` counts boxes first, then samples.
struct Box {
  int64_t sample;
  int z, y, x;  // of the first pixel
  int depth, height, width;

  __device__ __forceinline__ Box(const ScaleGeometry& g, const Space& s, int number) {
    x = number % g.boxes_width * g.box_width;
    number /= g.boxes_width;
    y = number % g.boxes_height * g.box_height;
    number /= g.boxes_height;
    z = number % g.boxes_depth * g.box_depth;
    sample = number / g.boxes_depth;
    depth = min(g.box_depth, s.depth - z);
    height = min(g.box_height, s.height - y);
    width = min(g.box_width, s.width - x);
  }
  __device__ __forceinline__ int pixels() const { return depth * height * width; }
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

// All parts of one output, merged in their order; argmax stays kNone without kArgmax.
template <bool kArgmax, class A>
__device__ __forceinline__ Extremes<A, kArgmax> merge_parts(const Parts& parts, int64_t sample,
                                                            int outputs, int output) {
  const auto read = [&](int split) {
    const int64_t part = sample * parts.splits + split;
    const A* values = static_cast<const A*>(parts.values) + part * 2 * outputs + output;
    Extremes<A, kArgmax> e;
    e.sum = values[0];
    e.max = values[outputs];
    if constexpr (kArgmax) e.argmax = parts.argmax[part * outputs + output];
    return e;
  };
  auto merged = read(0);  // a single part as it is, NaN and all
  for (int split = 1; split < parts.splits; ++split) merged.merge(read(split));
  return merged;
}

}  // namespace cbam::cuda
