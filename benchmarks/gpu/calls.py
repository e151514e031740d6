"""Calls that only the GPU's benchmarks time: the fused backward alone, and one strategy alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..calls import Buffers, Call
from ..contestants import first_line
from .inputs import operator_backward, saved_by_forward
from .strategies import contestant, forced, is_impossible


def fused_backward(block: nn.Module, buffers: Buffers) -> Call:
    """The same by the fused block's operator, without autograd."""
    xs, grads = buffers
    weights = block.weights()
    saved = [saved_by_forward(x, weights) for x in xs]
    return lambda i: operator_backward(xs[i], weights, saved[i], grads[i])


def by_strategy(call: Call, strategies: Iterable[str]) -> tuple[dict[str, Call], dict[str, str]]:
    """The call under each strategy, and which strategy is missing, with why."""
    found, missing = {}, {}
    for strategy in strategies:
        name, forced_call = contestant(strategy), forced(strategy)(call)
        try:
            with torch.no_grad():
                forced_call(0)
        except (RuntimeError, ValueError) as error:
            if not is_impossible(error):
                raise
            missing[name] = first_line(error)
        else:
            found[name] = forced_call
    return found, missing
