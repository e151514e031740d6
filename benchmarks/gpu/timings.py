"""Timings of the blocks of a ResNet-50, row by row until the time is over.

``python -m benchmarks.gpu.timings FOLDER SECONDS`` takes them and writes the file as it goes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch

from ..memory import of_blocks
from ..outcome import Folder, Outcome
from ..problems import BLOCKS, Problem
from ..rows import Row
from . import rows
from .measure import Clock, measure
from .problems import Contestants, buffers, too_large
from .rows import describe
from .targets import AUTOTUNED, COMPARED_BATCH

ROW_SECONDS = 8.0  # with less left, a row is not begun
COMPILE_SECONDS = 40.0  # after so many, of all rows together, compilation takes no part any more


def problems() -> Iterator[Problem]:
    """All rows, the most wanted first: those of 16 bits beside all that others make of them."""
    compared = [(COMPARED_BATCH, dtype) for dtype in (torch.float16, torch.float32, torch.bfloat16)]
    large = ((256, torch.float16), (1, torch.float16), (256, torch.float32))
    others = ((8, torch.float16), (8, torch.float32), (1, torch.float32))
    kinds = [(n, dtype, "contiguous") for n, dtype in (compared[0], *large, *compared[1:], *others)]
    kinds += [(n, dtype, "channels_last") for n, dtype in compared]
    for n, dtype, layout in kinds:
        for block in BLOCKS:
            yield Problem((n, *block), dtype, layout)


def step(seconds: float, folder: Folder) -> Outcome:
    """Take them in another process."""
    return rows.step("timings", seconds, folder)


class Timer:
    """Times rows; torch.compile takes part for so long."""

    def __init__(self) -> None:
        self.compiling = 0.0

    def __call__(self, problem: Problem, left: float) -> list[Row]:
        """A row a direction."""
        compared = problem.shape[0] == COMPARED_BATCH
        compiled = [AUTOTUNED] if compared and self.compiling < COMPILE_SECONDS < left else []
        begin = time.monotonic()
        try:
            return time_row(problem, ["eager", *(["tuned"] if compared else []), *compiled])
        finally:
            if compiled:
                self.compiling += time.monotonic() - begin


def time_row(problem: Problem, rivals: Sequence[str]) -> list[Row]:
    """A row a direction, of the fused block, the copy, and these contestants."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return time_contestants(Contestants(problem, buffers(problem, l2_bytes), rivals), l2_bytes)


def time_row_and_memory(
    problem: Problem, rivals: Sequence[str], compile_seconds: float = math.inf
) -> list[Row]:
    """The same of those that are right, and the memory of each in the last row."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    contestants = Contestants(problem, buffers(problem, l2_bytes), rivals, compile_seconds)
    contestants.leave_out_wrong()
    found = time_contestants(contestants, l2_bytes)
    ran = {n: b for n, b in contestants.blocks.items() if n not in contestants.missing["step"]}
    memory = of_blocks(ran, contestants.buffers)
    return [*found[:-1], {**found[-1], "memory": memory, "bytes": problem.bytes}]


def time_contestants(contestants: Contestants, l2_bytes: int) -> list[Row]:
    """A row a direction."""
    problem, count = contestants.problem, len(contestants.buffers.xs)
    clock = Clock(l2_bytes)
    found = []
    for direction, calls in contestants.calls.items():
        missing = contestants.missing[direction]
        times = measure(calls, count, clock, direction == "step", missing=missing)
        found.append(describe(problem, direction, times, count, missing))
    return found


if __name__ == "__main__":
    rows.main("timings", list(problems()), ROW_SECONDS, Timer(), too_large)
