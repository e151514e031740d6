"""Calls that are timed: forward, backward, and both, of any block.

Each takes the number of a buffer, so that none finds what the one before it left in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Call = Callable[[int], object]


class Buffers(NamedTuple):
    """Inputs, and as many gradients of the output."""

    xs: list[Tensor]
    grads: list[Tensor]


def copies(buffers: Buffers) -> dict[str, Call]:
    """By direction, the least that must be read and written."""
    xs, grads = buffers
    outs, dxs = ([torch.empty_like(x) for x in xs] for _ in range(2))

    def forward(i: int) -> Tensor:
        """Reads x, writes out."""
        return outs[i].copy_(xs[i])

    def backward(i: int) -> Tensor:
        """Reads x and out's gradient, writes x's gradient."""
        return torch.mul(xs[i], grads[i], out=dxs[i])

    def step(i: int) -> None:
        forward(i)
        backward(i)

    return {"forward": forward, "backward": backward, "step": step}


def forward(block: nn.Module, buffers: Buffers) -> Call:
    """Inference."""
    return lambda i: block(buffers.xs[i])


def step(block: nn.Module, buffers: Buffers) -> Call:
    """Forward and backward, for the gradients of x and all weights."""
    inputs, weights = _leaves(buffers), list(block.parameters())

    def call(i: int) -> object:
        out = block(inputs[i])
        return out.detach(), torch.autograd.grad(out, [inputs[i], *weights], buffers.grads[i])

    return call


def backward(block: nn.Module, buffers: Buffers) -> Call:
    """The same gradients, of forwards that are made here, one for each input."""
    inputs, weights = _leaves(buffers), list(block.parameters())
    with torch.enable_grad():
        outs = [block(x) for x in inputs]
    return lambda i: torch.autograd.grad(
        outs[i], [inputs[i], *weights], buffers.grads[i], retain_graph=True
    )


def _leaves(buffers: Buffers) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in buffers.xs]
