"""Autograd of the operators that make out: from gradients of what comes out to those of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import derivatives
from .arguments import Weights
from .ending import Ending, before_relu

_WEIGHTS = len(Weights._fields)
_BEHIND = 1 + Weights._fields.index("conv_weight")  # the channel gate, of x and the weights


def setup_inference(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the backward of `forward` needs: all that it makes again."""
    variables, ending = inputs[: 1 + _WEIGHTS], Ending(*inputs[1 + _WEIGHTS :])
    ctx.save_for_backward(*variables, output if ending.relu else None)


def backward_of_inference(operators: Any, ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Of `forward`, by the operators of its library: it runs `forward_train` first."""
    asked = ctx.needs_input_grad
    mask = [*asked, False][: 2 + _WEIGHTS]
    *variables, after_relu = ctx.saved_tensors
    _, *saved = operators.forward_train.default(*variables)
    given = (*variables, *saved, after_relu)
    found = forward_gradients(operators.backward.default, given, mask, grad_out, None, None)
    return (*found, None)[: len(asked)]


def setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the backward of `forward_train` needs."""
    out, channel_gate, spatial_gate, *others = output
    variables, ending = inputs[: 1 + _WEIGHTS], Ending(*inputs[1 + _WEIGHTS :])
    after_relu = out if ending.relu else None
    ctx.save_for_backward(*variables, channel_gate, spatial_gate, *others, after_relu)
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


def backward_of_forward(
    backward: Any, ctx: Any, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Of `forward_train`, by the operator `backward` of its library."""
    asked = ctx.needs_input_grad  # of what follows it may have nothing
    mask = [*asked, False][: 2 + _WEIGHTS]
    found = forward_gradients(backward, ctx.saved_tensors, mask, *grads[:3])
    return (*found, None)[: len(asked)]


def forward_gradients(
    backward: Any,
    saved: Sequence[Any],
    mask: list[bool],
    grad_out: Tensor | None,
    grad_channel_gate: Tensor | None,
    grad_spatial_gate: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the weights and the residual where `mask` says so, by a library's operator.

    Of `saved` the last is out where a ReLU has followed, else None.
    """
    *saved, after_relu = saved
    *mask, adds = mask
    grad_out = before_relu(grad_out, after_relu)
    of_residual = grad_out if adds else None
    arrived = grad_out, grad_channel_gate, grad_spatial_gate
    mask = reached(mask, arrived)
    if True not in mask or all(grad is None for grad in arrived):
        return (*(None for _ in mask), of_residual)
    if derivatives.is_transformed():
        gradients = derivatives.plain_gradients(saved[: 1 + _WEIGHTS], arrived, mask)
    else:
        if grad_out is None:
            grad_out = torch.zeros_like(saved[0])
        gradients = backward(grad_out, *arrived[1:], *saved, mask)
    wanted = (g if wanted else None for g, wanted in zip(gradients, mask, strict=True))
    return (*wanted, of_residual)


def reached(mask: list[bool], grads: Sequence[Tensor | None]) -> list[bool]:
    """Of x, the weights and what follows them, what gradients of out and the gates lead to."""
    if grads[0] is not None or grads[2] is not None:
        return mask
    return [wanted and number < _BEHIND for number, wanted in enumerate(mask)]
