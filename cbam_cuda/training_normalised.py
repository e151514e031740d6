"""Training with batch normalisation in the spatial gate, outside of tracing."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import normalised, reference
from .arguments import Weights
from .derivatives import is_transformed, plain_gradients
from .ending import Ending, before_relu
from .gradients import reached
from .ops import MemoryErrors
from .training import below_autograd

_WEIGHTS = len(Weights._fields)
_VARIABLES = _WEIGHTS + 2  # and the norm's weight and bias


def train(
    name: str, norm: Any, ending: Ending, x: Tensor, *variables: Tensor | None
) -> tuple[Tensor, ...]:
    """The output and the gates, differentiable twice; the norm's running statistics move on."""
    residual, relu = ending
    outputs: tuple[Tensor, ...] = _TrainNormalised.apply(name, norm, relu, residual, x, *variables)  # type: ignore[no-untyped-call]
    return outputs


class _TrainNormalised(torch.autograd.Function):
    """out, channel_gate and spatial_gate of x, the weights, and the norm's weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        norm: Any,
        relu: bool,
        residual: Tensor | None,
        x: Tensor,
        *variables: Tensor | None,
    ) -> Any:
        ctx.operators, ctx.eps = getattr(torch.ops, name), norm.eps
        weights = Weights(*variables[:_WEIGHTS])  # type: ignore[arg-type]
        weight, bias = variables[_WEIGHTS:]
        with below_autograd():
            out, z, saved = normalised.forward(
                ctx.operators, x, weights, weight, bias, norm.eps, Ending(residual, relu)
            )
            reference.in_its_dtype(norm)(z)  # for its running statistics
        ctx.save_for_backward(out if relu else None, x, *variables, *saved)
        ctx.set_materialize_grads(False)
        return out, saved.channel_gate, saved.spatial_gate

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        adds, *mask = ctx.needs_input_grad[3:]
        after_relu, x, *others = ctx.saved_tensors
        grads = before_relu(grads[0], after_relu), *grads[1:]
        of_residual = grads[0] if adds else None
        mask = reached(mask, grads)
        if True not in mask or all(grad is None for grad in grads):
            return (None, None, None, of_residual, *(None for _ in mask))
        variables, saved = others[:_VARIABLES], normalised.Saved(*others[_VARIABLES:])
        with MemoryErrors():
            if torch.is_grad_enabled() or is_transformed():  # more derivatives are wanted
                plain = functools.partial(normalised.plain, ctx.eps)
                found = plain_gradients([x, *variables], grads, mask, plain)
            else:
                weights, weight = Weights(*variables[:_WEIGHTS]), variables[_WEIGHTS]
                with below_autograd():
                    found = normalised.backward(
                        ctx.operators, grads, x, weights, weight, saved, mask
                    )
        wanted = (f if wanted else None for f, wanted in zip(found, mask, strict=True))
        return (None, None, None, of_residual, *wanted)
