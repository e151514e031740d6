"""Training with batch normalisation in the spatial gate, by statistics of the batch.

The operators know none. They are called twice instead: the first call saves the maps, the map
z = conv(maps) has the statistics, and the second call is one with weights into which the
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

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .arguments import Weights, accumulator_dtype
from .norm import Norm, fold
from .ops import MemoryErrors, in_graph, reference_gradients, without_autocast

_below_autograd = torch._C._AutoDispatchBelowAutograd
_WEIGHTS = len(Weights._fields)


def forward_normalised(x: Tensor, weights: Weights, norm: Any, name: str) -> tuple[Tensor, ...]:
    """The output and the gates, differentiable twice; the norm's running statistics move on."""
    acc = accumulator_dtype(x.dtype)
    # What the backward takes from gradients of the weights wants more than 16 bits.
    variables = (None if t is None else t.to(acc) for t in (*weights, norm.weight, norm.bias))
    outputs: tuple[Tensor, ...] = _TrainNormalised.apply(name, norm, x, *variables)  # type: ignore[no-untyped-call]
    return outputs


class _TrainNormalised(torch.autograd.Function):
    """out, channel_gate and spatial_gate of x, the weights, and the norm's weight and bias."""

    @staticmethod
    def forward(ctx: Any, name: str, norm: Any, x: Tensor, *variables: Tensor | None) -> Any:
        library = getattr(torch.ops, name)
        weights, (weight, bias) = Weights(*variables[:_WEIGHTS]), variables[_WEIGHTS:]  # type: ignore[arg-type]
        with _below_autograd(), without_autocast(x):
            channel_gate, _, *saved = library.forward_train.default(x, *weights)[1:]  # frees out
            z = _convolved(saved[2], weights)
            reference.in_its_dtype(norm)(z)  # for its running statistics
            variance, mean = (t.view(1) for t in torch.var_mean(z, correction=0))
            folded = fold(weights, Norm(mean, variance, weight, bias, norm.eps))
            out = library.forward.default(x, *folded)
            rstd = (variance + norm.eps).rsqrt()
            zn = (z - mean) * rstd
            logit = zn if weight is None else zn * weight
            spatial_gate = torch.sigmoid(logit if bias is None else logit + bias)
        ctx.save_for_backward(
            x, *variables, *folded[-2:], zn, rstd, channel_gate, spatial_gate, *saved
        )
        ctx.set_materialize_grads(False)
        ctx.operator, ctx.eps = library.backward.default, norm.eps
        return out, channel_gate, spatial_gate

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * (3 + _WEIGHTS + 2)
        mask = ctx.needs_input_grad[2:]
        with MemoryErrors():
            if torch.is_grad_enabled():  # a second derivative is wanted
                return (None, None, *_plain_gradients(ctx, mask, grads))
            with _below_autograd():
                return (None, None, *_gradients(ctx, mask, grads))


def _convolved(maps: Tensor, weights: Weights) -> Tensor:
    """z. In float64 on CUDA, where cuDNN makes TF32 of float32, which no operator does."""
    given = (maps, weights.conv_weight, weights.conv_bias)
    if maps.is_cuda:
        given = tuple(None if t is None else t.double() for t in given)  # type: ignore[assignment]
    return reference.convolved(*given).to(weights.conv_weight.dtype)


def _gradients(
    ctx: Any, mask: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Of x, the weights, and the norm's weight and bias; the formulas are above."""
    x, *others = ctx.saved_tensors
    fc, (weight, _) = others[: _WEIGHTS - 2], others[_WEIGHTS : _WEIGHTS + 2]
    folded, (zn, rstd) = others[_WEIGHTS + 2 : _WEIGHTS + 4], others[_WEIGHTS + 4 : _WEIGHTS + 6]
    channel_gate, spatial_gate, pooled, hidden, maps, *argmax = others[_WEIGHTS + 6 :]
    d_out, d_channel_gate, d_spatial_gate = grads
    if d_out is None:
        d_out = torch.zeros_like(x)

    def backward(
        d_gate: Tensor | None,
        conv: Sequence[Tensor],
        gate: Tensor,
        maps: Tensor,
        wanted: Sequence[bool],
    ) -> Sequence[Tensor]:
        saved = (channel_gate, gate, pooled, hidden, maps, *argmax)
        gradients: Sequence[Tensor] = ctx.operator(
            d_out, d_channel_gate, d_gate, x, *fc, *conv, *saved, list(wanted)
        )
        return gradients

    tap = zn.new_zeros(1, 2, *(1 for _ in zn.shape[2:])), zn.new_zeros(1)
    both = torch.cat((zn, torch.zeros_like(zn)), 1).to(x.dtype)
    of_conv = (*(False,) * (_WEIGHTS - 1), True, True)
    sums = backward(d_spatial_gate, tap, spatial_gate, both, of_conv)
    d_weight, d_bias = sums[-2][0, :1].flatten(), sums[-1]

    eps = torch.finfo(zn.dtype).eps
    gate = spatial_gate.clamp(eps**2, 1 - eps / 2)
    d_gate = -(d_bias + zn * d_weight) / (zn.numel() * gate * (1 - gate))
    if d_spatial_gate is not None:
        d_gate += d_spatial_gate
    found = backward(d_gate, folded, gate, maps, mask[:-2])
    scale = rstd if weight is None else rstd * weight
    found = [*found[:-2], found[-2] * scale, found[-1] * scale, d_weight, d_bias]
    return [f if wanted else None for f, wanted in zip(found, mask, strict=True)]


def _plain_gradients(
    ctx: Any, mask: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The same by PyTorch's own operators, to be differentiated."""
    saved = ctx.saved_tensors[: 1 + _WEIGHTS + 2]
    with without_autocast(saved[0]), torch.enable_grad():
        variables = [in_graph(t) for t in saved]
        return reference_gradients(variables, grads, mask, functools.partial(_plain, ctx.eps))


def _plain(eps: float, x: Tensor, *variables: Tensor | None, return_attention: bool) -> Any:
    *weights, weight, bias = variables

    def normalise(z: Tensor) -> Tensor:
        return F.batch_norm(z, None, None, weight, bias, training=True, eps=eps)

    return reference.cbam(x, *weights, return_attention=return_attention, normalise=normalise)  # type: ignore[arg-type]
