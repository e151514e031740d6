"""``python -m benchmarks.normalised``: blocks with batch normalisation in the spatial gate.

The stages of a ResNet-50 at batch 8, float32, on CUDA where there is a GPU, else on the CPU: plain
PyTorch and the fused block with a norm, the fused block without; in inference by known statistics,
in training by the batch's. They take turns; medians in microseconds a call. All calls take the same
tensors, of which caches may keep some. What is right is not asked here, but in tests/test_norm.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import nn

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
PLAIN, FUSED, WITHOUT = "plain", "fused", "fused without"
# Whether they train, by what is timed.
MODES = {"forward, known statistics": False, "step, statistics of the batch": True}


def blocks(problem: Problem, device: torch.device) -> dict[str, nn.Module]:
    """What is compared, by name; with the same weights."""
    channels, backend = problem.shape[1], device.type
    torch.manual_seed(0)
    plain = reference.CBAM(channels, RATIO, KERNEL_SIZE, norm=True, device=device)
    fused = cbam_cuda.CBAM(channels, RATIO, KERNEL_SIZE, norm=True, device=device, backend=backend)
    fused.load_state_dict(plain.state_dict())
    without = cbam_cuda.CBAM(channels, RATIO, KERNEL_SIZE, device=device, backend=backend)
    without.load_state_dict(plain.state_dict(), strict=False)
    return {PLAIN: plain, FUSED: fused, WITHOUT: without}


def medians(
    problem: Problem, device: torch.device, training: bool, seconds: float
) -> dict[str, float]:
    """By name: a step where they train, else a forward."""
    x, grad = (draw(*problem, device, seed) for seed in (0, 1))
    buffers, make = Buffers([x], [grad]), calls.step if training else calls.forward
    with torch.set_grad_enabled(training):
        found = {
            name: make(block.train(training), buffers)
            for name, block in blocks(problem, device).items()
        }
        timed = time_together({n: lambda c=c: c(0) for n, c in found.items()}, device, seconds)
    return {name: one["median"] for name, one in timed.items()}


def table(mode: str, found: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each problem, by its name, and the mean of the ratios."""
    gains = {name: times[PLAIN] / times[FUSED] for name, times in found.items()}
    body = [
        [name, *(microseconds(times[n]) for n in (PLAIN, FUSED, WITHOUT)), number(gains[name], 2)]
        for name, times in found.items()
    ]
    body.append(["geometric mean", "", "", "", number(geometric_mean(gains.values()), 2)])
    return markdown([mode, PLAIN, FUSED, WITHOUT, f"{PLAIN}/{FUSED}"], body)


def main(problems: Sequence[Problem] | None = None, seconds: float = SECONDS) -> int:
    """Print both tables."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for mode, training in MODES.items():
        found = {
            str(problem): medians(problem, device, training, seconds)
            for problem in problems or in_stages(8)
        }
        print(table(mode, found), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
