"""``python -m benchmarks.variants``: blocks with more to them than the published one.

The stages of a ResNet-50 at batch 8, float32, on CUDA where there is a GPU, else on the CPU: plain
PyTorch, the fused block that does all of it, and for comparison one that does less. They take
turns; medians in microseconds a call. All calls take the same tensors, of which caches may keep
some. What is right is not asked here, but in tests/test_norm.py and tests/test_ending.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import cbam_cuda
from cbam_cuda import reference

from . import calls
from .calls import Buffers
from .contestants import KERNEL_SIZE, RATIO
from .problems import Problem, draw, in_stages
from .rows import geometric_mean
from .text import markdown, microseconds, number
from .timing import time_together

SECONDS = 1.0  # of a contestant
PLAIN, FUSED = "plain", "fused"
RESIDUAL_SEED = 2


class Ended(nn.Module):
    """relu(block(x) + residual), the residual being what a gradient is asked for, too."""

    def __init__(self, block: nn.Module, residual: Tensor, at_once: bool) -> None:
        super().__init__()
        self.block, self.at_once = block, at_once
        self.residual = nn.Parameter(residual)

    def forward(self, x: Tensor) -> Tensor:
        """In one call, or as residual networks have it."""
        if self.at_once:
            return self.block(x, residual=self.residual, activation="relu")
        return self.block(x).add_(self.residual).relu_()


def with_a_norm(problem: Problem, device: torch.device) -> dict[str, nn.Module]:
    """Batch normalisation in the spatial gate; beside it the fused block that has none."""
    plain, fused = _pair(problem, device, norm=True)
    without = cbam_cuda.CBAM(problem.shape[1], RATIO, KERNEL_SIZE, device=device)
    without.load_state_dict(plain.state_dict(), strict=False)
    return {PLAIN: plain, FUSED: fused, "fused without": without}


def with_an_ending(problem: Problem, device: torch.device) -> dict[str, nn.Module]:
    """A residual and a ReLU; beside it the fused block to which PyTorch adds these."""
    plain, fused = _pair(problem, device)
    residual = draw(*problem, device, RESIDUAL_SEED)
    return {
        PLAIN: Ended(plain, residual, at_once=False),
        FUSED: Ended(fused, residual, at_once=True),
        "fused, then PyTorch": Ended(fused, residual, at_once=False),
    }


def _pair(
    problem: Problem, device: torch.device, norm: bool = False
) -> tuple[nn.Module, nn.Module]:
    """The plain and the fused block, with the same weights."""
    channels = problem.shape[1]
    torch.manual_seed(0)
    plain = reference.CBAM(channels, RATIO, KERNEL_SIZE, norm=norm, device=device)
    fused = cbam_cuda.CBAM(
        channels, RATIO, KERNEL_SIZE, norm=norm, device=device, backend=device.type
    )
    fused.load_state_dict(plain.state_dict())
    return plain, fused


class Mode(NamedTuple):
    """What is timed: a step where they train, else a forward."""

    training: bool
    blocks: Callable[[Problem, torch.device], dict[str, nn.Module]]


MODES = {
    "forward, norm by known statistics": Mode(False, with_a_norm),
    "step, norm by the batch's": Mode(True, with_a_norm),
    "forward, residual and ReLU": Mode(False, with_an_ending),
    "step, residual and ReLU": Mode(True, with_an_ending),
}


def medians(problem: Problem, device: torch.device, mode: Mode, seconds: float) -> dict[str, float]:
    """By name of contestant."""
    x, grad = (draw(*problem, device, seed) for seed in (0, 1))
    buffers, make = Buffers([x], [grad]), calls.step if mode.training else calls.forward
    with torch.set_grad_enabled(mode.training):
        found = {
            name: make(block.train(mode.training), buffers)
            for name, block in mode.blocks(problem, device).items()
        }
        timed = time_together({n: lambda c=c: c(0) for n, c in found.items()}, device, seconds)
    return {name: one["median"] for name, one in timed.items()}


def table(mode: str, found: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each problem, by its name, and the mean of the ratios."""
    names = list(next(iter(found.values())))
    gains = {name: times[PLAIN] / times[FUSED] for name, times in found.items()}
    body = [
        [problem, *(microseconds(times[n]) for n in names), number(gains[problem], 2)]
        for problem, times in found.items()
    ]
    mean = number(geometric_mean(gains.values()), 2)
    body.append(["geometric mean", *("" for _ in names), mean])
    return markdown([mode, *names, f"{PLAIN}/{FUSED}"], body)


def main(problems: Sequence[Problem] | None = None, seconds: float = SECONDS) -> int:
    """Print a table for each mode."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, mode in MODES.items():
        found = {
            str(problem): medians(problem, device, mode, seconds)
            for problem in problems or in_stages(8)
        }
        print(table(name, found), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
