"""Training with batch normalisation as operators, which graphs can have.

For a library of operators two more, in Python over the others, which `normalised` explains; acc =
float64 for float64, else float32, in which the norm's weight and bias are:

- ``train_normalised`` returns out, z acc [N, 1, *space], and `normalised.Saved`.
- ``backward_normalised`` returns a gradient for x, each weight, and the norm's weight and bias, an
  empty tensor where not asked for.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, library

from . import derivatives, gradients, normalised, reference
from .arguments import Weights
from .ending import Ending, before_relu

_WEIGHTS = len(Weights._fields)
_INPUTS = ", ".join(
    (
        "Tensor x",
        *(f"Tensor{'?' if name.endswith('_bias') else ''} {name}" for name in Weights._fields),
        "Tensor? norm_weight, Tensor? norm_bias",
    )
)
_SAVED = ", ".join(f"Tensor {name}" for name in normalised.Saved._fields)
_TRAIN_NORMALISED = (
    f"train_normalised({_INPUTS}, Tensor? residual, bool relu, float eps) -> "
    f"(Tensor out, Tensor z, {_SAVED})"
)
_BACKWARD_NORMALISED = (
    "backward_normalised(Tensor? grad_out, Tensor? grad_channel_gate, Tensor? grad_spatial_gate, "
    f"{_INPUTS}, {_SAVED}, float eps, bool[] output_mask) -> Tensor[]"
)
_VARIABLES = 1 + _WEIGHTS + 2


def train(
    name: str, norm: Any, ending: Ending, x: Tensor, *variables: Tensor | None
) -> tuple[Tensor, ...]:
    """The output and the gates, by a library's operator; the norm's running statistics move on."""
    operator = getattr(torch.ops, name).train_normalised.default
    out, z, channel_gate, spatial_gate, *_ = operator(x, *variables, *ending, norm.eps)
    reference.in_its_dtype(norm)(z.detach())
    return out, channel_gate, spatial_gate


def _train_normalised(name: str, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *weights, weight, bias, residual, relu, eps = rest
    out, z, saved = normalised.forward(
        *(getattr(torch.ops, name), x, Weights(*weights), weight, bias, eps),
        Ending(residual, relu),
    )
    return out, z, *saved


def _backward_normalised(name: str, *given: Any) -> list[Tensor]:
    grads, (x, *weights), mask = given[:3], given[3 : 3 + _VARIABLES], given[-1]
    saved = normalised.Saved(*given[3 + _VARIABLES : -2])
    operators, chosen = getattr(torch.ops, name), Weights(*weights[:_WEIGHTS])
    found = normalised.backward(operators, grads, x, chosen, weights[_WEIGHTS], saved, mask)
    return [f if wanted else x.new_empty(0) for f, wanted in zip(found, mask, strict=True)]


def _fake_train_normalised(name: str, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weights = rest[:_WEIGHTS]
    channel_gate, z, *others = getattr(torch.ops, name).logits.default(x, *weights)
    saved = channel_gate, torch.empty_like(z), torch.empty_like(z), z.new_empty(1), *others
    return torch.empty_like(x), z, *saved


def _fake_backward_normalised(name: str, *given: Any) -> list[Tensor]:
    (x, *weights), mask = given[3 : 3 + _VARIABLES], given[-1]
    saved = normalised.Saved(*given[3 + _VARIABLES : -2])
    gates = saved.channel_gate, saved.spatial_gate
    found = getattr(torch.ops, name).logits_backward.default(
        *(x, None, None, x, *weights[:_WEIGHTS], *gates, saved.pooled, saved.hidden, saved.maps),
        *(saved.pixel_argmax, saved.channel_argmax, list(mask[:-2])),
    )
    of_norm = (saved.rstd.new_empty(1) if wanted else x.new_empty(0) for wanted in mask[-2:])
    return [*found, *of_norm]


def _setup_normalised(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, z, _, _, *others = output
    *variables, _, relu, ctx.eps = inputs
    ctx.save_for_backward(*variables, *output[2:], out if relu else None)
    ctx.mark_non_differentiable(z, *others)
    ctx.set_materialize_grads(False)


def _backward_of_normalised(
    name: str, ctx: Any, grad_out: Tensor | None, _: None, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    *mask, adds, _, _ = ctx.needs_input_grad
    *saved, after_relu = ctx.saved_tensors
    grad_out = before_relu(grad_out, after_relu)
    of_residual = grad_out if adds else None
    mask = gradients.reached(mask, (grad_out, *grads[:2]))
    if True not in mask:
        return (*(None for _ in mask), of_residual, None, None)
    operator = getattr(torch.ops, name).backward_normalised.default
    found = operator(grad_out, *grads[:2], *saved, ctx.eps, mask)
    wanted = (f if wanted else None for f, wanted in zip(found, mask, strict=True))
    return (*wanted, of_residual, None, None)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    derivatives.keep(ctx, inputs, functools.partial(normalised.plain, inputs[-2]), _VARIABLES)


def _backward_of_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    return derivatives.backward_gradients(ctx, *grads)


def define(name: str) -> None:
    """Add both to a library that is loaded."""
    for schema, implementation, fake in (
        (_TRAIN_NORMALISED, _train_normalised, _fake_train_normalised),
        (_BACKWARD_NORMALISED, _backward_normalised, _fake_backward_normalised),
    ):
        operator, _, signature = schema.partition("(")
        operator = f"{name}::{operator}"
        library.define(operator, f"({signature}")
        library.impl(operator, "CompositeExplicitAutograd")(functools.partial(implementation, name))
        library.register_fake(operator, functools.partial(fake, name))
    library.register_autograd(
        f"{name}::train_normalised",
        functools.partial(_backward_of_normalised, name),
        setup_context=_setup_normalised,
    )
    library.register_autograd(
        f"{name}::backward_normalised", _backward_of_backward, setup_context=_setup_backward
    )
