"""Batch normalisation in the spatial gate by statistics of the batch, forward and backward.

A library's operators know none. They are called twice instead: the first call saves the maps, the
map z = conv(maps) has the statistics, and the second call is one with weights into which the
normalisation is folded.

Backward, with zn = (z - mean) / sqrt(variance + eps), the logit zn * weight + bias, dl what comes
in for the logit, and n positions in the batch::

    d_bias = sum dl,  d_weight = sum dl * zn
    dz     = (dl - d_bias / n - zn * d_weight / n) * weight / sqrt(variance + eps)

The operator is called for both sums first, as gradients of a convolution of one tap: its maps are
zn and 0. By then what dl lacks as a function of the folded weights is known. In the second call,
for all gradients, it comes in for the spatial gate, divided by the sigmoid's derivative; there the
gate is kept from 0 and 1, by less than it is rounded by, so that there is such a derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .arguments import Weights
from .norm import Norm, fold

_FC = 4  # of the weights


class Saved(NamedTuple):
    """What the backward needs beside x and the weights, in the dtype of sums but for the maps."""

    channel_gate: Tensor  # [N, C, 1, ...]
    spatial_gate: Tensor  # [N, 1, *space]
    zn: Tensor  # [N, 1, *space]
    rstd: Tensor  # [1]
    conv_weight: Tensor  # folded
    conv_bias: Tensor  # folded, [1]
    pooled: Tensor
    hidden: Tensor
    maps: Tensor
    pixel_argmax: Tensor
    channel_argmax: Tensor


def forward(
    operators: Any,
    x: Tensor,
    weights: Weights,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Saved]:
    """out, z [N, 1, *space], and the rest; weights are all in the dtype of sums."""
    with reference.without_autocast(x):
        channel_gate, _, *others = operators.forward_train.default(x, *weights)[1:]  # frees out
        pooled, hidden, maps, *argmax = others
        z = _convolved(maps, weights)
        variance, mean = (t.view(1) for t in torch.var_mean(z, correction=0))
        folded = fold(weights, Norm(mean, variance, weight, bias, eps))
        out = operators.forward.default(x, *folded)
        rstd = (variance + eps).rsqrt()
        zn = (z - mean) * rstd
        logit = zn if weight is None else zn * weight
        spatial_gate = torch.sigmoid(logit if bias is None else logit + bias)
    conv = folded.conv_weight, folded.conv_bias
    saved = Saved(channel_gate, spatial_gate, zn, rstd, *conv, pooled, hidden, maps, *argmax)  # type: ignore[arg-type]
    return out, z, saved


def _convolved(maps: Tensor, weights: Weights) -> Tensor:
    """z. In float64 on CUDA, where cuDNN makes TF32 of float32, which no operator does."""
    given = (maps, weights.conv_weight, weights.conv_bias)
    if maps.is_cuda:
        given = tuple(None if t is None else t.double() for t in given)  # type: ignore[assignment]
    return reference.convolved(*given).to(weights.conv_weight.dtype)


def backward(
    operators: Any,
    grads: Sequence[Tensor | None],
    x: Tensor,
    weights: Weights,
    weight: Tensor | None,
    saved: Saved,
    mask: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, the weights, and the norm's weight and bias, where `mask` says so.

    `grads` are those that come in for out, channel_gate and spatial_gate. What is not asked for may
    be there or empty.
    """
    d_out, d_channel_gate, d_spatial_gate = grads
    if d_out is None:
        d_out = torch.zeros_like(x)

    def call(
        d_gate: Tensor | None,
        conv: Sequence[Tensor],
        gate: Tensor,
        maps: Tensor,
        wanted: Sequence[bool],
    ) -> Sequence[Tensor]:
        kept = (saved.channel_gate, gate, saved.pooled, saved.hidden, maps)
        gradients: Sequence[Tensor] = operators.backward.default(
            *(d_out, d_channel_gate, d_gate, x, *weights[:_FC], *conv),
            *(*kept, saved.pixel_argmax, saved.channel_argmax, list(wanted)),
        )
        return gradients

    zn, gate = saved.zn, saved.spatial_gate
    tap = zn.new_zeros(1, 2, *(1 for _ in zn.shape[2:])), zn.new_zeros(1)
    both = torch.cat((zn, torch.zeros_like(zn)), 1).to(x.dtype)
    sums = call(d_spatial_gate, tap, gate, both, (*(False,) * (1 + _FC), True, True))
    d_weight, d_bias = sums[-2][0, :1].flatten(), sums[-1]

    eps = torch.finfo(zn.dtype).eps
    gate = gate.clamp(eps**2, 1 - eps / 2)
    d_gate = -(d_bias + zn * d_weight) / (zn.numel() * gate * (1 - gate))
    if d_spatial_gate is not None:
        d_gate += d_spatial_gate
    conv = saved.conv_weight, saved.conv_bias
    found = call(d_gate, conv, gate, saved.maps, mask[:-2])
    scale = saved.rstd if weight is None else saved.rstd * weight
    return [*found[:-2], found[-2] * scale, found[-1] * scale, d_weight, d_bias]
