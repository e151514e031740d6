"""Second derivatives: the gradients of the reference, differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .arguments import Weights

_WEIGHTS = len(Weights._fields)


def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the second derivatives are of."""
    ctx.output_mask = inputs[-1]
    ctx.inputs = len(inputs)
    ctx.save_for_backward(*inputs[: 4 + _WEIGHTS])
    ctx.set_materialize_grads(False)


def backward_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the operator `backward`: the first derivatives of the reference, differentiated.

    What forward_train saved is a function of x and the weights, so the whole derivative is taken
    through these and none through the saved tensors.
    """
    needed, saved = ctx.needs_input_grad[: 4 + _WEIGHTS], ctx.saved_tensors
    with reference.without_autocast(saved[3]):  # also around what derives the convolutions
        with torch.enable_grad():
            inputs = [in_graph(t) for t in saved]
            incoming, variables = inputs[:3], inputs[3:]
            first = reference_gradients(variables, incoming, ctx.output_mask)
        chosen = [
            (f, g) for f, g in zip(first, grads, strict=True) if f is not None and g is not None
        ]
        second = _differentiate(
            [f for f, _ in chosen],
            [t if wanted else None for t, wanted in zip(inputs, needed, strict=True)],
            [g for _, g in chosen],
            create_graph=torch.is_grad_enabled(),
        )
    return (*second, *(None for _ in range(ctx.inputs - len(second))))


def reference_gradients(
    variables: Sequence[Tensor | None],
    incoming: Sequence[Tensor | None],
    mask: Sequence[bool],
    function: Callable[..., Any] = reference.cbam,
) -> list[Tensor | None]:
    """Differentiable gradients of the reference, from those that come in for its three results."""
    results = function(*variables, return_attention=True)
    pairs = [
        (result, grad.to(result.dtype))
        for result, grad in zip(results, incoming, strict=True)
        if grad is not None
    ]
    return _differentiate(
        [result for result, _ in pairs],
        [v if wanted else None for v, wanted in zip(variables, mask, strict=True)],
        [grad for _, grad in pairs],
        create_graph=True,
    )


def in_graph(t: Tensor | None) -> Tensor | None:
    """An alias that can be differentiated for, still part of t's own graph if it has one."""
    if t is None:
        return None
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def _differentiate(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    *,
    create_graph: bool,
) -> list[Tensor | None]:
    """`torch.autograd.grad` that passes over inputs which are None."""
    wanted = [t for t in inputs if t is not None]
    outputs_with_graph = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    if not wanted or not outputs_with_graph:
        return [None] * len(inputs)
    results = iter(
        torch.autograd.grad(
            [o for o, _ in outputs_with_graph],
            wanted,
            [g for _, g in outputs_with_graph],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [None if t is None else next(results) for t in inputs]
