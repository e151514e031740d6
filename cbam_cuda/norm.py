"""Batch normalisation between the convolution and the sigmoid of the spatial gate.

By given statistics it is an affine map, which the convolution's weights take in.

S. Ioffe, C. Szegedy, "Batch Normalization", ICML 2015.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import Weights, accumulator_dtype


class Norm(NamedTuple):
    """Normalises one map, z to (z - mean) / sqrt(variance + eps) * weight + bias."""

    mean: Tensor  # [1]
    variance: Tensor  # [1]
    weight: Tensor | None  # [1]
    bias: Tensor | None  # [1]
    eps: float


def known(norm: Any) -> Norm | None:
    """What a layer of batch normalisation does, unless it takes its statistics from the batch."""
    if norm.training or norm.running_mean is None:
        return None
    return Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def fold(weights: Weights, norm: Norm) -> Weights:
    """Weights of a convolution that gives what `norm` makes of the given one, in their dtype."""
    dtype = weights.conv_weight.dtype
    scale = (norm.variance.to(accumulator_dtype(dtype)) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    centre = norm.mean if weights.conv_bias is None else norm.mean - weights.conv_bias
    if norm.bias is None:
        bias = -centre * scale
    else:
        bias = torch.addcmul(norm.bias, centre, scale, value=-1)
    conv_weight = weights.conv_weight * scale
    return weights._replace(conv_weight=conv_weight.to(dtype), conv_bias=bias.to(dtype))
