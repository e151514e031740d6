// From torch tensors to a Problem: the checks that keep kernels inside their memory, the layouts
// they read, and the copies that bring anything else into one of those. Python says in users' terms
// what is wrong with a call that was refused (cbam_cuda/arguments.py).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "problem.h"

namespace cbam {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct WeightArguments {
  const Tensor& fc1_weight;
  const std::optional<Tensor>& fc1_bias;
  const Tensor& fc2_weight;
  const std::optional<Tensor>& fc2_bias;
  const Tensor& conv_weight;
  const std::optional<Tensor>& conv_bias;
};

// The weights as kernels read them, in the dtype they came in; holds the tensors that the pointers
// of `view` point into.
struct DenseWeights {
  std::vector<Tensor> owned;
  Weights view;

  explicit DenseWeights(const WeightArguments& w);
};

// What forward_train returns beside the output, for backward: sizes in problem.h.
struct SavedTensors {
  Tensor channel_gate, spatial_gate, pooled, hidden, maps, pixel_argmax, channel_argmax;

  static SavedTensors make(const Tensor& x, const Shape& shape);
  // Throws unless each has the sizes and dtype that make() gives it, and indices inside the image.
  void check(const Tensor& x, const Shape& shape) const;
  SavedTensors contiguous() const;
  Saved view() const;
  // In the order of the operators' results.
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> results() const {
    return {channel_gate, spatial_gate, pooled, hidden, maps, pixel_argmax, channel_argmax};
  }
};

// Throws unless every tensor has the sizes, dtype and device that x and the weights' sizes ask for.
Shape check_forward(const Tensor& x, const WeightArguments& weights);
// The same of the last pass, which has no weights: hidden and the kernel's extents are 1.
// `spatial`, of this name, are the spatial gate or its logits.
Shape check_scale(const Tensor& x, const Tensor& channel_gate, const char* name,
                  const Tensor& spatial);
// Throws unless it can be added to what x becomes.
void check_residual(const Tensor& x, const Tensor& residual);

// Throws unless the gradients that arrive look like the outputs they belong to; the last one is
// that of the spatial gate, in kLogits that of its logits.
void check_gradients(Part part, const Tensor& x, const Shape& shape, const Tensor& grad_out,
                     const std::optional<Tensor>& grad_channel_gate,
                     const std::optional<Tensor>& grad_spatial);

// A new contiguous tensor on the device of `like`. Past the dispatcher, which costs more than small
// kernels do.
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
Tensor empty(const Tensor& like, Sizes sizes, ScalarType dtype);

// A new tensor for the gradient of the convolution's weights, in the order in which kernels read
// them.
Tensor empty_as_conv_weight(const Tensor& conv_weight);

// `t` itself, if it is contiguous.
Tensor dense(const Tensor& t);

DType dtype_of(ScalarType dtype);
DType dtype_of(const Tensor& x);
// float64 for float64, else float32.
ScalarType accumulator_of(const Tensor& x);

// The strides of a tensor whose pixels are evenly spaced and which has pixel or channel stride 1;
// nothing for any other.
std::optional<Strides> native_strides(const Tensor& x);

// `t` itself if its layout is native, else a contiguous copy.
Tensor in_native_layout(const Tensor& t);

// `t` itself if it has the kind of layout that `like` has, else a copy that does. `like` is dense
// and native.
Tensor in_layout_of(const Tensor& like, const Tensor& t);

// Two tensors of the same sizes in one kind of layout: as they are, or both as contiguous copies.
std::pair<Tensor, Tensor> in_one_layout(const Tensor& a, const Tensor& b);

// A new tensor of x's sizes and dtype, strides kept as torch's elementwise operators keep them.
// `native` is the same tensor, or a contiguous one where that layout is not native.
struct Output {
  Tensor result;
  Tensor native;

  explicit Output(const Tensor& x);
  // Brings what was written to `native` into `result`.
  void finish();
};

}  // namespace cbam
