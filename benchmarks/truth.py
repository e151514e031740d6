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

PART = 1 << 20  # elements of x that are looked at together: what fits into caches
OUT, DX = "out", "gradient of x"


class Truth:
    """Output and all gradients of a problem, by plain PyTorch in its dtype and in float64.

    Of every sample. A sample's output and gradient do not depend on the others, and the weights'
    gradients are sums over them: a part of the batch at a time takes little memory beside the
    results.
    """

    def __init__(self, problem: Problem, x: Tensor, grad: Tensor) -> None:
        block = make_block("eager", x.shape[1], problem.dtype, x.device, x.dim() - 2)
        self.names = (OUT, DX, *(f"gradient of {name}" for name, _ in block.named_parameters()))
        samples = max(1, PART * x.shape[0] // x.numel())
        self.parts = [slice(n, n + samples) for n in range(0, x.shape[0], samples)]
        self.eager = dict(zip(self.names, differentiate(block, x, grad), strict=True))
        block.double()
        found = [differentiate(block, x[p].double(), grad[p].double()) for p in self.parts]
        out, dx, *weights = zip(*found, strict=True)
        wide = (torch.cat(out), torch.cat(dx), *(sum(parts) for parts in weights))
        self.wide = dict(zip(self.names, wide, strict=True))

    def assert_right(self, name: str, block: nn.Module, x: Tensor, grad: Tensor) -> None:
        """Raises AssertionError unless inference, training and gradients are as good as eager's.

        The fused block keeps to the rule element by element. Of the gradients of others the norm
        does: where two elements are the maximum, they may share the gradient or choose the other.
        """
        fused = name == "fused"
        with torch.no_grad():
            self.judge(f"{name}, inference", OUT, block(x), by_element=True)
        for what, found in zip(self.names, differentiate(block, x, grad), strict=True):
            self.judge(f"{name}, {what}", what, found, by_element=fused or what == OUT)

    def judge(self, title: str, what: str, found: Tensor, by_element: bool) -> None:
        """The same of one result, in each part of the batch: one of `names`."""
        rule = (
            tolerance.assert_as_good_as_eager
            if by_element
            else tolerance.assert_norm_as_good_as_eagers
        )
        for part in self.parts if what in (OUT, DX) else [...]:
            rule(title, found[part], self.eager[what][part], self.wide[what][part])


def differentiate(block: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and all weights."""
    x = x.detach().requires_grad_()
    out = block(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], grad)]
