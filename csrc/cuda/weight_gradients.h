// The gradients of the weights on CUDA: products over the batch, by torch, of the small vectors
// that the forward saved and the backward's launches left.
//
//   d fc2 = dm^T (hidden[mean] + hidden[max])    d fc2_bias = 2 sum_n dm
//   d fc1 = d_hidden^T pooled                    d fc1_bias = sum_n d_hidden        over n and
//   mean, max d conv, d conv_bias = the sum over samples and boxes of the stencil's partial sums
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../arguments.h"
#include "backward.h"

namespace cbam::cuda {

// Writes every gradient that `p` asks for; those of an empty batch are 0.
inline void weight_gradients(const BackwardProblem& p, const WeightSums& sums,
                             const torch::stable::Device& device, ScalarType acc) {
  const Shape& s = p.shape;
  const auto view = [&](void* data, std::vector<int64_t> sizes) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
    return torch::stable::from_blob(data, sizes, strides, device, acc);
  };
  const auto write = [&](void* gradient, std::vector<int64_t> sizes, const Tensor& value) {
    Tensor to = view(gradient, std::move(sizes));
    torch::stable::copy_(to, value);
  };
  const auto sum_first = [](const Tensor& t) {
    return torch::stable::sum(t, std::vector<int64_t>{0});
  };
  const Gradients& g = p.gradients;
  if (g.mlp()) {
    const Tensor dm = view(sums.dm, {s.samples, s.channels});
    const Tensor d_hidden = view(sums.d_hidden, {2 * s.samples, s.hidden});
    if (g.fc1_weight)
      write(g.fc1_weight, {s.hidden, s.channels},
            torch::stable::matmul(torch::stable::transpose(d_hidden, 0, 1),
                                  view(p.saved.pooled, {2 * s.samples, s.channels})));
    if (g.fc1_bias) write(g.fc1_bias, {s.hidden}, sum_first(d_hidden));
    if (g.fc2_weight)
      write(g.fc2_weight, {s.channels, s.hidden},
            torch::stable::matmul(torch::stable::transpose(dm, 0, 1),
                                  torch::stable::sum(view(p.saved.hidden, {s.samples, 2, s.hidden}),
                                                     std::vector<int64_t>{1})));
    if (g.fc2_bias) {
      const Tensor once = sum_first(dm);
      write(g.fc2_bias, {s.channels}, torch::stable::subtract(once, once, -1.0));
    }
  }
  if (g.conv()) {
    Tensor conv = sum_first(view(sums.d_conv, {s.samples * sums.boxes, 2 * s.taps() + 1}));
    if (g.conv_weight)
      write(g.conv_weight, {2 * s.taps()}, torch::stable::narrow(conv, 0, 0, 2 * s.taps()));
    if (g.conv_bias) write(g.conv_bias, {1}, torch::stable::narrow(conv, 0, 2 * s.taps(), 1));
  }
}

}  // namespace cbam::cuda
