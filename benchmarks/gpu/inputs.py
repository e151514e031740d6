"""Inputs for checks and timings; shapes, weights and tolerance are those of the test suite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import cbam_cuda
from cbam_cuda import reference
from cbam_cuda.arguments import Weights

from ..contestants import KERNEL_SIZE, RATIO
from ..truth import cases, tolerance
from .strategies import forced


def draw_weights(channels: int, dtype: torch.dtype, device: str = "cuda") -> Weights:
    """Of a two-dimensional block, large enough that every gate varies."""
    kernel = (KERNEL_SIZE, KERNEL_SIZE)
    case = cases.Case("", (1, channels, 1, 1), max(1, channels // RATIO), kernel)
    return cases.make_weights(case, dtype, device)


def run(x: Tensor, weights: Weights) -> Tensor:
    """The fused block."""
    out: Tensor = cbam_cuda.cbam(x, *weights, backend=x.device.type)
    return out


def train(x: Tensor, weights: Weights, grad: Tensor) -> list[Tensor]:
    """The fused block's output and all gradients: that of x, and those of the weights."""
    found: list[Tensor] = cases.gradients(x.device.type, cases.leaves(x, weights), grad)
    return found


def saved_by_forward(x: Tensor, weights: Weights) -> Sequence[Tensor]:
    """What a backward needs, whichever the strategy of either."""
    with torch.no_grad(), forced("streaming"):
        found: Sequence[Tensor] = torch.ops.cbam_cuda.forward_train(x, *weights)[1:]
    return found


def operator_backward(
    x: Tensor, weights: Weights, saved: Sequence[Tensor], grad: Tensor
) -> Sequence[Tensor]:
    """The gradients of x and all weights, by the operator alone."""
    mask = [True] * (1 + len(weights))
    with torch.no_grad():
        found: Sequence[Tensor] = torch.ops.cbam_cuda.backward(
            grad, None, None, x, *weights, *saved, mask
        )
    return found


def assert_right(name: str, out: Tensor, x: Tensor, weights: Weights) -> None:
    """Fail unless `out` is as near to the reference in float64 as the suite asks."""
    eager = reference.cbam(x, *weights)
    truth = reference.cbam(x.double(), *(None if w is None else w.double() for w in weights))
    tolerance.assert_as_good_as_eager(name, out, eager, truth)


def assert_gradients_right(
    name: str, found: list[Tensor], x: Tensor, weights: Weights, grad: Tensor
) -> None:
    """The same of the output and the gradients of x and, where they are given, the weights."""
    eager = cases.gradients("reference", cases.leaves(x, weights), grad)
    leaves = cases.leaves(x, weights, torch.float64)
    truth = cases.gradients("reference", leaves, grad.double())
    names = ("out", "x", *Weights._fields)[: len(found)]
    for part, *three in zip(names, found, eager, truth, strict=False):
        tolerance.assert_as_good_as_eager(f"{name}, {part}", *three)


def assert_same(name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Fail unless the results of two calls are equal to the bit."""
    for index, (left, right) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(left, right):
            differing = (left != right).sum().item()
            raise AssertionError(
                f"{name}, result {index}: {differing} of {left.numel()} values differ"
            )
