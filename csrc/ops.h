// The operators, written once for every backend: schemas, and the functions around its kernels that
// check, allocate, fill a Problem and hand it on. A Backend has
//
//   static void forward(const ForwardProblem& problem, const Tensor& x);   x: for scratch memory
//   static void backward(const BackwardProblem& problem, const Tensor& x);
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"

namespace cbam {

using OptionalTensor = std::optional<Tensor>;

// What x in a native layout says of a problem.
inline ForwardProblem problem_of(Part part, const Tensor& x, const Shape& shape) {
  ForwardProblem p{};
  p.part = part;
  p.dtype = dtype_of(x);
  p.shape = shape;
  p.strides = p.out_strides = *native_strides(x);
  p.x = x.const_data_ptr();
  return p;
}

// Runs what ends with out, on x in a form that kernels read; fill(p) says all but x, out and what
// follows the block.
template <class Backend, class Fill>
Tensor run_forward(Part part, const Tensor& x_given, const Shape& shape,
                   const OptionalTensor& residual_given, bool relu, Fill fill) {
  if (residual_given) check_residual(x_given, *residual_given);
  Output out(x_given);
  if (shape.samples == 0) return out.result;
  const Tensor x = in_layout_of(out.native, x_given);
  OptionalTensor residual;
  if (residual_given) residual = in_layout_of(out.native, *residual_given);
  ForwardProblem p = problem_of(part, x, shape);
  p.out_strides = *native_strides(out.native);
  p.out = out.native.mutable_data_ptr();
  if (residual) {
    p.ending.residual = residual->const_data_ptr();
    p.ending.strides = *native_strides(*residual);
  }
  p.ending.relu = relu;
  fill(p);
  Backend::forward(p, x);
  out.finish();
  return out.result;
}

template <class Backend>
Tensor forward(const Tensor& x, const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
               const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const Tensor& conv_weight,
               const OptionalTensor& conv_bias, const OptionalTensor& residual, bool relu) {
  const WeightArguments w{fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias};
  const Shape s = check_forward(x, w);
  // The channel gate, both pools and both hidden vectors, each on a boundary of 128 bytes or more.
  const auto room = [&](int64_t per_sample) { return (s.samples * per_sample + 31) / 32 * 32; };
  const int64_t gate = room(s.channels), pooled = room(2 * s.channels), hidden = room(2 * s.hidden);
  const Tensor scratch = empty(x, {gate + pooled + hidden}, accumulator_of(x));
  char* memory = static_cast<char*>(scratch.mutable_data_ptr());
  const int64_t size = bytes_of_accumulator(dtype_of(x));
  const DenseWeights weights(w);
  return run_forward<Backend>(Part::kAll, x, s, residual, relu, [&](ForwardProblem& p) {
    p.weights = weights.view;
    p.saved.channel_gate = memory;
    p.saved.pooled = memory + gate * size;
    p.saved.hidden = memory + (gate + pooled) * size;
  });
}

using TrainOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Backend>
TrainOutputs forward_train(const Tensor& x, const Tensor& fc1_weight,
                           const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                           const OptionalTensor& fc2_bias, const Tensor& conv_weight,
                           const OptionalTensor& conv_bias, const OptionalTensor& residual,
                           bool relu) {
  const WeightArguments w{fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias};
  const Shape s = check_forward(x, w);
  const SavedTensors saved = SavedTensors::make(x, s);
  const DenseWeights weights(w);
  const Tensor out = run_forward<Backend>(Part::kAll, x, s, residual, relu, [&](auto& p) {
    p.weights = weights.view;
    p.saved = saved.view();
  });
  return std::tuple_cat(std::tuple{out}, saved.results());
}

using LogitsOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Backend>
LogitsOutputs logits(const Tensor& x_given, const Tensor& fc1_weight,
                     const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
                     const OptionalTensor& fc2_bias, const Tensor& conv_weight,
                     const OptionalTensor& conv_bias) {
  const WeightArguments w{fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias};
  const Shape s = check_forward(x_given, w);
  const SavedTensors saved = SavedTensors::make(x_given, s);
  if (s.samples > 0) {
    const Tensor x = in_native_layout(x_given);
    const DenseWeights weights(w);
    ForwardProblem p = problem_of(Part::kLogits, x, s);
    p.weights = weights.view;
    p.saved = saved.view();
    Backend::forward(p, x);
  }
  return saved.results();
}

template <class Backend>
std::tuple<Tensor, Tensor> scale(const Tensor& x, const Tensor& channel_gate, const Tensor& logits,
                                 const OptionalTensor& residual, bool relu) {
  const Shape s = check_scale(x, channel_gate, "logits", logits);
  const Tensor channel = dense(channel_gate), given = dense(logits);
  const Tensor spatial_gate = empty(x, given.sizes(), accumulator_of(x));
  const Tensor out = run_forward<Backend>(Part::kScale, x, s, residual, relu, [&](auto& p) {
    p.saved.channel_gate = channel.mutable_data_ptr();
    p.saved.spatial_gate = spatial_gate.mutable_data_ptr();
    p.logits = given.const_data_ptr();
  });
  return {out, spatial_gate};
}

template <class Backend>
std::tuple<Tensor, Tensor> scale_backward(const Tensor& grad_out, const Tensor& x_given,
                                          const Tensor& channel_gate, const Tensor& spatial_gate) {
  const Shape s = check_scale(x_given, channel_gate, "spatial_gate", spatial_gate);
  check_gradients(Part::kScale, x_given, s, grad_out, std::nullopt, std::nullopt);
  const auto [x, dout] = in_one_layout(x_given, grad_out);
  const Tensor channel = dense(channel_gate), spatial = dense(spatial_gate);
  const Tensor d_channel = empty(x, channel.sizes(), accumulator_of(x)),
               d_spatial = empty(x, spatial.sizes(), accumulator_of(x));
  BackwardProblem p{};
  static_cast<ForwardProblem&>(p) = problem_of(Part::kScale, x, s);
  p.saved.channel_gate = channel.mutable_data_ptr();
  p.saved.spatial_gate = spatial.mutable_data_ptr();
  p.dout_strides = *native_strides(dout);
  p.dout = dout.const_data_ptr();
  p.gradients.channel_gate = d_channel.mutable_data_ptr();
  p.gradients.spatial_gate = d_spatial.mutable_data_ptr();
  if (s.samples > 0) Backend::backward(p, x);
  return {d_channel, d_spatial};
}

// The gradient of a weight, for a kernel to write; empty where nobody asked for it.
inline Tensor weight_gradient(const Tensor& x, const OptionalTensor& weight, bool wanted) {
  return wanted ? empty(x, weight->sizes(), weight->scalar_type()) : empty(x, {0}, x.scalar_type());
}

inline OptionalTensor dense(const OptionalTensor& t) {
  return t ? OptionalTensor(dense(*t)) : std::nullopt;
}

inline void expect_mask(const std::vector<bool>& mask, const WeightArguments& w) {
  STD_TORCH_CHECK(mask.size() == 7, "output_mask: expected 7 values, got ", mask.size());
  STD_TORCH_CHECK((w.fc1_bias || !mask[2]) && (w.fc2_bias || !mask[4]) && (w.conv_bias || !mask[6]),
                  "output_mask: expected false for a bias that is absent");
}

using InputGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// `part`: kAll or kLogits, in which `grad_spatial_gate` is that of the logits.
template <class Backend, Part part>
InputGradients backward(const Tensor& grad_out, const OptionalTensor& grad_channel_gate,
                        const OptionalTensor& grad_spatial_gate, const Tensor& x_given,
                        const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
                        const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
                        const Tensor& conv_weight, const OptionalTensor& conv_bias,
                        const Tensor& channel_gate, const Tensor& spatial_gate,
                        const Tensor& pooled, const Tensor& hidden, const Tensor& maps,
                        const Tensor& pixel_argmax, const Tensor& channel_argmax,
                        const std::vector<bool>& output_mask) {
  const WeightArguments w{fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias};
  const SavedTensors given{channel_gate, spatial_gate, pooled,        hidden,
                           maps,         pixel_argmax, channel_argmax};
  const Shape s = check_forward(x_given, w);
  check_gradients(part, x_given, s, grad_out, grad_channel_gate, grad_spatial_gate);
  given.check(x_given, s);
  expect_mask(output_mask, w);

  std::optional<Output> dx;
  if (output_mask[0]) dx.emplace(x_given);
  const auto [x, dout] =
      dx ? std::pair{in_layout_of(dx->native, x_given), in_layout_of(dx->native, grad_out)}
         : in_one_layout(x_given, grad_out);
  const SavedTensors saved = given.contiguous();
  const DenseWeights weights(w);
  const OptionalTensor d_gate = dense(grad_channel_gate), d_spatial = dense(grad_spatial_gate);
  const Tensor d1 = weight_gradient(x, fc1_weight, output_mask[1]),
               d1b = weight_gradient(x, fc1_bias, output_mask[2]),
               d2 = weight_gradient(x, fc2_weight, output_mask[3]),
               d2b = weight_gradient(x, fc2_bias, output_mask[4]),
               dc = output_mask[5] ? empty_as_conv_weight(conv_weight)
                                   : empty(x, {0}, x.scalar_type()),
               dcb = weight_gradient(x, conv_bias, output_mask[6]);

  BackwardProblem p{};
  static_cast<ForwardProblem&>(p) = problem_of(part, x, s);
  p.weights = weights.view;
  p.saved = saved.view();
  p.dout_strides = *native_strides(dout);
  p.dout = dout.const_data_ptr();
  p.d_channel_gate = d_gate ? d_gate->const_data_ptr() : nullptr;
  p.d_spatial_gate = d_spatial ? d_spatial->const_data_ptr() : nullptr;
  if (dx) p.dx_strides = *native_strides(dx->native);
  const auto written = [&](size_t input, const Tensor& gradient) {
    return output_mask[input] ? gradient.mutable_data_ptr() : nullptr;
  };
  p.gradients = {dx ? dx->native.mutable_data_ptr() : nullptr,
                 written(1, d1),
                 written(2, d1b),
                 written(3, d2),
                 written(4, d2b),
                 written(5, dc),
                 written(6, dcb),
                 nullptr,
                 nullptr};
  Backend::backward(p, x);
  if (dx) dx->finish();
  return {dx ? dx->result : empty(x, {0}, x.scalar_type()), d1, d1b, d2, d2b, dc, dcb};
}

}  // namespace cbam

#define CBAM_WEIGHTS                                                           \
  "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, " \
  "Tensor conv_weight, Tensor? conv_bias"
#define CBAM_SAVED                                                                        \
  "Tensor channel_gate, Tensor spatial_gate, Tensor pooled, Tensor hidden, Tensor maps, " \
  "Tensor pixel_argmax, Tensor channel_argmax"

#define CBAM_ENDING "Tensor? residual=None, bool relu=False"
#define CBAM_GRADIENTS "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

// Shapes and dtypes: cbam_cuda/ops.py, where the same outputs are described for tracing. A gradient
// that output_mask leaves out is an empty tensor.
#define CBAM_DEFINE_OPERATORS(m)                                                                 \
  m.def("forward(Tensor x, " CBAM_WEIGHTS ", " CBAM_ENDING ") -> Tensor");                       \
  m.def("forward_train(Tensor x, " CBAM_WEIGHTS ", " CBAM_ENDING ") -> (Tensor out, " CBAM_SAVED \
        ")");                                                                                    \
  m.def(                                                                                         \
      "backward(Tensor grad_out, Tensor? grad_channel_gate, Tensor? grad_spatial_gate, "         \
      "Tensor x, " CBAM_WEIGHTS ", " CBAM_SAVED ", bool[] output_mask) -> " CBAM_GRADIENTS);     \
  m.def("logits(Tensor x, " CBAM_WEIGHTS ") -> (" CBAM_SAVED ")");                               \
  m.def(                                                                                         \
      "logits_backward(Tensor grad_out, Tensor? grad_channel_gate, Tensor? grad_logits, "        \
      "Tensor x, " CBAM_WEIGHTS ", " CBAM_SAVED ", bool[] output_mask) -> " CBAM_GRADIENTS);     \
  m.def("scale(Tensor x, Tensor channel_gate, Tensor logits, " CBAM_ENDING                       \
        ") -> (Tensor, Tensor)");                                                                \
  m.def(                                                                                         \
      "scale_backward(Tensor grad_out, Tensor x, Tensor channel_gate, "                          \
      "Tensor spatial_gate) -> (Tensor, Tensor)")

#define CBAM_IMPLEMENT_OPERATORS(m, Backend)                                             \
  m.impl("forward", TORCH_BOX(&cbam::forward<Backend>));                                 \
  m.impl("forward_train", TORCH_BOX(&cbam::forward_train<Backend>));                     \
  m.impl("backward", TORCH_BOX((&cbam::backward<Backend, cbam::Part::kAll>)));           \
  m.impl("logits", TORCH_BOX(&cbam::logits<Backend>));                                   \
  m.impl("logits_backward", TORCH_BOX((&cbam::backward<Backend, cbam::Part::kLogits>))); \
  m.impl("scale", TORCH_BOX(&cbam::scale<Backend>));                                     \
  m.impl("scale_backward", TORCH_BOX(&cbam::scale_backward<Backend>))
