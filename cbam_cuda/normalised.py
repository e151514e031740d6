"""Batch normalisation in the spatial gate by statistics of the batch, forward and backward.

A library has operators for what stands before the normalisation and for what stands behind it:
together they walk over x no more often than without one, but the last walk begins when all samples
have been seen, which leave caches meanwhile, and the chip of a GPU. What is between them is one
value a position, and PyTorch's.

Backward, with zn = (z - mean) / sqrt(variance + eps), the logit zn * weight + bias, dl what comes
in for the logit, and n positions in the batch::

    d_bias = sum dl,  d_weight = sum dl * zn
    dz     = (dl - d_bias / n - zn * d_weight / n) * weight / sqrt(variance + eps)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .arguments import Weights, accumulator_dtype
from .ending import Ending

# Sums of so many values PyTorch shares among the threads of a CPU, as many as there are.
_SHARED, _BLOCK = 32768, 4096


class Saved(NamedTuple):
    """What the backward needs beside x and the weights, in the dtype of sums but for the maps."""

    channel_gate: Tensor  # [N, C, 1, ...]
    spatial_gate: Tensor  # [N, 1, *space]
    zn: Tensor  # [N, 1, *space]
    rstd: Tensor  # [1]
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
    ending: Ending,
) -> tuple[Tensor, Tensor, Saved]:
    """out, z [N, 1, *space], and the rest; the norm's weight and bias are in the dtype of sums."""
    channel_gate, z, *others = operators.logits.default(x, *weights)
    centred = z - _total(z) / z.numel()
    rstd = (_total(centred.square()) / z.numel() + eps).rsqrt()
    zn = centred * rstd
    logit = zn if weight is None else zn * weight
    logit = logit if bias is None else logit + bias
    out, spatial_gate = operators.scale.default(x, channel_gate, logit, *ending)
    return out, z, Saved(channel_gate, spatial_gate, zn, rstd, *others)


def _total(t: Tensor) -> Tensor:
    """The sum, [1]: for any number of threads the same, that of blocks' sums."""
    if t.device.type != "cpu" or t.numel() < _SHARED:
        return t.sum().view(1)
    return _total(F.pad(t.flatten(), (0, -t.numel() % _BLOCK)).view(-1, _BLOCK).sum(1))


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
    d_out = torch.zeros_like(x) if grads[0] is None else grads[0]
    if d_out.stride() != torch.empty_like(x, device="meta").stride():
        d_out = torch.empty_like(x).copy_(d_out)  # for both calls
    gates = saved.channel_gate, saved.spatial_gate
    d_channel_gate, d_spatial_gate = (
        d if more is None else d + more
        for d, more in zip(
            operators.scale_backward.default(d_out, x, *gates), grads[1:], strict=True
        )
    )
    dl = d_spatial_gate * saved.spatial_gate * (1 - saved.spatial_gate)
    d_bias, d_weight = _total(dl), _total(dl * saved.zn)
    scale = saved.rstd if weight is None else saved.rstd * weight
    dz = (dl - (d_bias + saved.zn * d_weight) / dl.numel()) * scale
    found = operators.logits_backward.default(
        *(d_out, d_channel_gate, dz, x, *weights, *gates, saved.pooled, saved.hidden, saved.maps),
        *(saved.pixel_argmax, saved.channel_argmax, list(mask[:-2])),
    )
    return [*found, d_weight, d_bias]


def plain(eps: float, x: Tensor, *variables: Tensor | None, return_attention: bool) -> Any:
    """The reference's form of it: `variables` are the weights, and the norm's weight and bias."""
    # In 16 bits second derivatives overflow.
    acc = accumulator_dtype(x.dtype)
    *weights, weight, bias = (None if v is None else v.to(acc) for v in variables)

    def normalise(z: Tensor) -> Tensor:
        return F.batch_norm(z, None, None, weight, bias, training=True, eps=eps)

    return reference.cbam(x, *weights, return_attention=return_attention, normalise=normalise)  # type: ignore[arg-type]
