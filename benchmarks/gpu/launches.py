"""Which kernels a forced strategy launches: what is timed under a name must be what has run.

A device may refuse a resident launch that the plan holds possible; the backend then runs streaming
without a word, and only the kernels tell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cbam_cuda.arguments import Weights
from cbam_cuda.plan import plan

from ..outcome import SkippedError
from ..problems import BLOCKS, draw
from .inputs import draw_weights, operator_backward, run, saved_by_forward
from .strategies import STRATEGIES, Tally, forced

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DTYPES = (torch.float16, torch.float32)
OURS = "cbam::"  # in the names of this package's kernels
NAME = 80  # characters of a name that is shown: those of templates have hundreds


def as_planned(
    blocks: tuple[tuple[int, int, int], ...] = BLOCKS,
    batches: tuple[int, ...] = BATCHES,
    device: str = "cuda",
) -> str:
    """As many kernels as the plan says, of the strategy that is forced."""
    tally = Tally()
    for block, n, dtype in itertools.product(blocks, batches, DTYPES):
        x, grad = (draw((n, *block), dtype, device=device, seed=seed) for seed in (0, 1))
        for direction, call in calls(x, draw_weights(block[0], dtype, device), grad).items():
            for strategy in STRATEGIES:
                name = f"{direction} {tuple(x.shape)}, {dtype}, {strategy}"
                with tally.problem(name), forced(strategy):
                    call()
                    _check(name, kernels(call), x, direction, strategy)
    return tally.said("forwards and backwards")


def calls(x: Tensor, weights: Weights, grad: Tensor) -> dict[str, Callable[[], object]]:
    """A forward and a backward, each alone."""
    saved = saved_by_forward(x, weights)
    return {
        "forward": lambda: run(x, weights),
        "backward": lambda: operator_backward(x, weights, saved, grad),
    }


def _check(name: str, found: list[str], x: Tensor, direction: str, strategy: str) -> None:
    if not found:
        raise SkippedError("the profiler sees no kernels")
    dtype, backward = str(x.dtype).removeprefix("torch."), direction == "backward"
    planned = plan(x.shape, dtype, "cuda:0", strategy=strategy, backward=backward)
    expected = planned_kernels(planned, len(x))
    resident = sum(f"resident_{direction}" in kernel for kernel in found)
    assert resident == (strategy == "resident"), f"{name}: ran {found[0]}"
    foreign = sorted({kernel[:NAME] for kernel in found if OURS not in kernel})
    told = f"{len(found)} kernels, {expected} planned; not of this package: {foreign}"
    assert len(found) == expected, f"{name}: {told}"


def planned_kernels(planned: dict[str, Any], samples: int) -> int:
    """How many a plan launches for so many samples."""
    groups = -(-samples // planned["group"])
    return len(planned["stages"]) * groups + int(planned["summing_launches"])


def kernels(call: Callable[[], object]) -> list[str]:
    """Names of the kernels of a call."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA and not event.name.startswith("Mem")
    ]
