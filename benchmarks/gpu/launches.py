"""Which kernels a forced forward launches: what is timed under a name must be what has run.

A device may refuse a resident launch that the plan holds possible; the backend then runs streaming
without a word, and only the kernels tell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cbam_cuda.plan import plan

from .inputs import BLOCKS, draw, draw_weights, run
from .results import SkippedError
from .strategies import STRATEGIES, Tally, forced

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DTYPES = (torch.float16, torch.float32)
RESIDENT = "resident_forward"  # in the name of its kernel


def as_planned(
    blocks: tuple[tuple[int, int, int], ...] = BLOCKS,
    batches: tuple[int, ...] = BATCHES,
    device: str = "cuda",
) -> str:
    """As many kernels as the plan says, of the strategy that is forced."""
    tally = Tally()
    for block, n, dtype in itertools.product(blocks, batches, DTYPES):
        x, weights = draw((n, *block), dtype, device=device), draw_weights(block[0], dtype, device)
        for strategy in STRATEGIES:
            name = f"{tuple(x.shape)}, {dtype}, {strategy}"
            with tally.problem(name), forced(strategy):
                run(x, weights)
                found = kernels(lambda x=x, weights=weights: run(x, weights))
                _check(name, found, x, strategy)
    return tally.said("forwards")


def _check(name: str, found: list[str], x: torch.Tensor, strategy: str) -> None:
    if not found:
        raise SkippedError("the profiler sees no kernels")
    dtype = str(x.dtype).removeprefix("torch.")
    planned = plan(x.shape, dtype, "cuda:0", strategy=strategy)
    expected = len(planned["stages"]) * -(-len(x) // planned["group"])
    resident = sum(RESIDENT in kernel for kernel in found)
    assert resident == (strategy == "resident"), f"{name}: ran {found[0]}"
    assert len(found) == expected, f"{name}: {len(found)} kernels, {expected} planned"


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
