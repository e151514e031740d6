#include <algorithm>
#include <type_traits>

#include "forward.h"

namespace cbam::cuda {
namespace {

// `count` elements of `size` bytes further on; null stays null.
template <class V>
V* further(V* pointer, int64_t count, int64_t size = 1) {
  using Byte = std::conditional_t<std::is_const_v<V>, const char, char>;
  if constexpr (std::is_void_v<std::remove_const_t<V>>)
    return pointer ? static_cast<Byte*>(pointer) + count * size : nullptr;
  else
    return pointer ? pointer + count : nullptr;
}

// The part of a problem that is samples [first, first + count).
ForwardProblem samples_of(ForwardProblem p, int64_t first, int64_t count) {
  const Shape& s = p.shape;
  const int64_t element = bytes_of(p.dtype), acc = bytes_of_accumulator(p.dtype);
  p.x = further(p.x, first * p.strides.sample, element);
  p.out = further(p.out, first * p.out_strides.sample, element);
  p.saved.channel_gate = further(p.saved.channel_gate, first * s.channels, acc);
  p.saved.pooled = further(p.saved.pooled, first * 2 * s.channels, acc);
  p.saved.hidden = further(p.saved.hidden, first * 2 * s.hidden, acc);
  p.saved.spatial_gate = further(p.saved.spatial_gate, first * s.pixels(), acc);
  p.saved.maps = further(p.saved.maps, first * 2 * s.pixels(), element);
  p.saved.pixel_argmax = further(p.saved.pixel_argmax, first * s.channels);
  p.saved.channel_argmax = further(p.saved.channel_argmax, first * s.pixels());
  p.shape.samples = count;
  return p;
}

Matrix matrix_of(const ForwardProblem& p) {
  const bool first = p.strides.channels_first();
  const int channels = static_cast<int>(p.shape.channels);
  const int pixels = static_cast<int>(p.shape.pixels());
  return {p.x, p.strides.sample, first ? p.strides.channel : p.strides.pixel,
          first ? channels : pixels, first ? pixels : channels};
}

// One group of samples: what its launches are handed.
class ForwardGroup {
 public:
  ForwardGroup(const ForwardProblem& problem, const ForwardPlan& plan, const ForwardScratch& bytes,
               void* scratch)
      : p_(problem), plan_(plan) {
    char* at = static_cast<char*>(scratch);
    const auto take = [&](int64_t count) {
      char* taken = count ? at : nullptr;
      at += count;
      return static_cast<void*>(taken);
    };
    void* pool_values = take(bytes.pool_values);
    auto* pool_argmax = static_cast<int32_t*>(take(bytes.pool_argmax));
    void* map_values = take(bytes.map_values);
    auto* map_argmax = static_cast<int32_t*>(take(bytes.map_argmax));
    pooled_ = {pool_values ? pool_values : p_.saved.pooled,
               pool_argmax ? pool_argmax : p_.saved.pixel_argmax, plan.pool.splits};
    maps_ = {map_values, map_argmax ? map_argmax : p_.saved.channel_argmax, plan.maps.splits};
  }

  Reduction pool() const { return {matrix_of(p_), nullptr, plan_.pool, pooled_}; }
  Reduction maps() const { return {matrix_of(p_), p_.saved.channel_gate, plan_.maps, maps_}; }

  ChannelGate channel_gate() const {
    const bool saves = pooled_.splits > 1 && p_.training();
    return {static_cast<int>(p_.shape.samples),
            static_cast<int>(p_.shape.channels),
            static_cast<int>(p_.shape.hidden),
            p_.weights.dtype,
            p_.weights.fc1_weight,
            p_.weights.fc1_bias,
            p_.weights.fc2_weight,
            p_.weights.fc2_bias,
            pooled_,
            saves ? p_.saved.pooled : nullptr,
            saves ? p_.saved.pixel_argmax : nullptr,
            p_.saved.hidden,
            p_.saved.channel_gate};
  }

  SpatialGate spatial_gate() const {
    const Shape& s = p_.shape;
    SpatialGate g{};
    g.x = matrix_of(p_);
    g.out = p_.out;
    g.channels_first = p_.strides.channels_first();
    g.out_sample_stride = p_.out_strides.sample;
    g.out_row_stride = g.channels_first ? p_.out_strides.channel : p_.out_strides.pixel;
    g.channels = static_cast<int>(s.channels);
    g.depth = static_cast<int>(s.depth);
    g.height = static_cast<int>(s.height);
    g.width = static_cast<int>(s.width);
    g.kernel_depth = static_cast<int>(s.kernel_depth);
    g.kernel_height = static_cast<int>(s.kernel_height);
    g.kernel_width = static_cast<int>(s.kernel_width);
    g.geometry = plan_.scale;
    g.maps = maps_;
    g.channel_gate = p_.saved.channel_gate;
    g.weight_dtype = p_.weights.dtype;
    g.conv_weight = p_.weights.conv_weight;
    g.conv_bias = p_.weights.conv_bias;
    g.saved_gate = p_.saved.spatial_gate;
    g.saved_maps = p_.saved.maps;
    g.saved_argmax = maps_.splits > 1 ? p_.saved.channel_argmax : nullptr;
    return g;
  }

 private:
  const ForwardProblem& p_;
  const ForwardPlan& plan_;
  Parts pooled_, maps_;
};

void reduce(DType dtype, const Reduction& r, const Grid& grid, Stream stream) {
  if (r.geometry.along_rows)
    reduce_rows(dtype, r, grid, stream);
  else
    reduce_columns(dtype, r, grid, stream);
}

}  // namespace

void forward(const ForwardProblem& problem, const ForwardPlan& plan, void* memory, Stream stream) {
  const ForwardScratch bytes = scratch(plan, problem);
  for (int64_t first = 0; first < problem.shape.samples; first += plan.group.samples) {
    const int64_t count = std::min(plan.group.samples, problem.shape.samples - first);
    const ForwardProblem part = samples_of(problem, first, count);
    const ForwardGroup group(part, plan, bytes, memory);
    const ForwardGrids grid = grids(plan, part, count);
    reduce(part.dtype, group.pool(), grid.pool, stream);
    hidden_layer(group.channel_gate(), grid.hidden, stream);
    gate_layer(group.channel_gate(), grid.gate, stream);
    reduce(part.dtype, group.maps(), grid.maps, stream);
    spatial_gate(part.dtype, group.spatial_gate(), grid.scale, stream);
  }
}

}  // namespace cbam::cuda
