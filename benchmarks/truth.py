"""Whether what is timed computes CBAM; the rule is the test suite's."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from .contestants import make_block
from .problems import Problem

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import cases
import tolerance

__all__ = ["Truth", "cases", "tolerance"]


class Truth:
    """Output and gradient of x, for the first and the last sample of a problem, in float64.

    A sample's output and gradient do not depend on the others, so that these two stand for all and
    the truth stays cheap.
    """

    def __init__(self, problem: Problem, x: Tensor, grad: Tensor) -> None:
        self.ends = [0, -1] if x.shape[0] > 1 else [0]
        dim, channels = x.dim() - 2, x.shape[1]
        eager = make_block("eager", channels, problem.dtype, x.device, dim)
        xs, grads = x[self.ends], grad[self.ends]
        self.eager = _differentiate(eager, xs, grads)
        self.wide = _differentiate(eager.double(), xs.double(), grads.double())

    def assert_right(self, name: str, block: nn.Module, x: Tensor, grad: Tensor) -> None:
        """Raises AssertionError unless inference, training and gradient are as good as eager's.

        The fused block keeps to the rule element by element. Of the gradients of others the norm
        does: where two elements are the maximum, they may share the gradient or choose the other.
        """
        with torch.no_grad():
            inference = block(x)[self.ends]
        out, dx = (whole[self.ends] for whole in _differentiate(block, x, grad))
        for what, found, index in (
            ("inference", inference, 0),
            ("out", out, 0),
            ("gradient of x", dx, 1),
        ):
            judge = (
                tolerance.assert_norm_as_good_as_eagers
                if index and name != "fused"
                else tolerance.assert_as_good_as_eager
            )
            judge(f"{name}, {what}", found, self.eager[index], self.wide[index])


def _differentiate(block: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = block(x)
    (dx,) = torch.autograd.grad(out, x, grad)
    return out.detach(), dx
