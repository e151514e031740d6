"""Training outside of tracing: the operators, and their backward, in one step of autograd.

The operators can be differentiated by themselves (`gradients`), as tracing needs it; the machinery
for that is written in Python and costs as much as a small block. Here it is passed by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import Weights
from .derivatives import is_transformed
from .ending import NO_ENDING, Ending
from .gradients import forward_gradients
from .ops import FUSED, MemoryErrors

# Where operators are called as they are.
below_autograd = torch._C._AutoDispatchBelowAutograd


class _Train(torch.autograd.Function):
    """out, channel_gate and spatial_gate by a library's forward_train."""

    @staticmethod
    def forward(ctx: Any, name: str, relu: bool, *given: Tensor | None) -> Any:
        library = getattr(torch.ops, name)
        with below_autograd():
            out, *saved = library.forward_train.default(*given, relu)
        ctx.save_for_backward(*given[:-1], *saved, out if relu else None)
        ctx.set_materialize_grads(False)
        ctx.operator = library.backward.default
        return out, saved[0], saved[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        given = ctx.operator, ctx.saved_tensors, list(ctx.needs_input_grad[2:]), *grads
        with MemoryErrors():
            if torch.is_grad_enabled() or is_transformed():  # more derivatives are wanted
                return (None, None, *forward_gradients(*given))
            with below_autograd():
                return (None, None, *forward_gradients(*given))


def forward_train(
    x: Tensor, weights: Weights, ending: Ending = NO_ENDING, name: str = FUSED
) -> tuple[Tensor, ...]:
    """The output and the gates, differentiable twice."""
    residual, relu = ending
    outputs: tuple[Tensor, ...] = _Train.apply(name, relu, x, *weights, residual)  # type: ignore[no-untyped-call]
    return outputs
