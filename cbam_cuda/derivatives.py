"""Derivatives by the reference: second ones, and first ones inside of a transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .arguments import Weights

_WEIGHTS = len(Weights._fields)


def is_transformed() -> bool:
    """Whether a call now must be made of operators that PyTorch itself can transform."""
    in_forward_mode = torch.autograd.forward_ad._current_level >= 0
    return in_forward_mode or torch._C._are_functorch_transforms_active()


def keep(
    ctx: Any,
    inputs: tuple[Any, ...],
    function: Callable[..., Any] = reference.cbam,
    variables: int = 1 + _WEIGHTS,
) -> None:
    """Keep what the second derivatives are of, of inputs that begin with three gradients."""
    ctx.function, ctx.output_mask, ctx.inputs = function, inputs[-1], len(inputs)
    ctx.save_for_backward(*inputs[: 3 + variables])
    ctx.set_materialize_grads(False)


def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """`keep`, for the operator `backward`."""
    keep(ctx, inputs)


def backward_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of such an operator: the first derivatives of the reference, differentiated.

    What the forward saved is a function of x and the weights, so the whole derivative is taken
    through these and none through the saved tensors.
    """
    saved = ctx.saved_tensors
    needed = ctx.needs_input_grad[: len(saved)]
    with reference.without_autocast(saved[3]):  # also around what derives the convolutions
        with torch.enable_grad():
            inputs = [in_graph(t) for t in saved]
            incoming, variables = inputs[:3], inputs[3:]
            first = reference_gradients(variables, incoming, ctx.output_mask, ctx.function)
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


def plain_gradients(
    variables: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    mask: Sequence[bool],
    function: Callable[..., Any] = reference.cbam,
) -> Sequence[Tensor | None]:
    """What such an operator gives, by PyTorch's own, to be differentiated or transformed."""
    x = variables[0]
    assert x is not None
    with reference.without_autocast(x):
        if is_transformed():
            return _pulled_back(variables, grads, mask, function)
        with torch.enable_grad():
            return reference_gradients([in_graph(t) for t in variables], grads, mask, function)


def _pulled_back(
    variables: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    mask: Sequence[bool],
    function: Callable[..., Any],
) -> list[Tensor | None]:
    """The same inside of a transform, in which torch.autograd.grad does not see outer tensors."""
    wanted = [number for number, asked in enumerate(mask) if asked]

    def of_wanted(*chosen: Tensor) -> Any:
        given = list(variables)
        for number, tensor in zip(wanted, chosen, strict=True):
            given[number] = tensor
        return function(*given, return_attention=True)

    results, pull = torch.func.vjp(of_wanted, *(variables[number] for number in wanted))  # type: ignore[misc]
    incoming = (
        torch.zeros_like(result) if grad is None else grad.to(result.dtype)
        for result, grad in zip(results, grads, strict=True)
    )
    found = dict(zip(wanted, pull(tuple(incoming)), strict=True))
    return [found.get(number) for number in range(len(mask))]


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
