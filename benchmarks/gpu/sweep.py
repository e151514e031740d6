"""Where resident overtakes streaming, forward and backward: both, over batches and shapes.

Resident teams whose blocks hold pixels where the plan's hold channels, or channels where those hold
pixels, take part, too.

``python -m benchmarks.gpu.sweep FOLDER SECONDS`` takes the cells and writes the file as it goes.
Thresholds of the plan are set from its tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch

from ..outcome import Folder, Outcome
from ..problems import BLOCKS, Problem
from ..rows import Row
from . import rows
from .measure import Clock, measure
from .problems import Strategies, buffers, too_large
from .rows import describe
from .strategies import OTHER_SPLIT

# Far apart first: what the time does not suffice for lies between others.
BATCHES = (1, 8, 32, 128, 2, 16, 64, 4, 256)
DTYPES = (torch.float16, torch.float32)
CELL_SECONDS = 4.0  # with less left, a cell is not begun
ROUNDS = 1  # a cell is of two directions


def cells() -> Iterator[Problem]:
    """All of them, the most wanted first."""
    for n in BATCHES:
        for dtype in DTYPES:
            for block in BLOCKS:
                yield Problem((n, *block), dtype, "contiguous")


def step(seconds: float, folder: Folder) -> Outcome:
    """Take them in another process."""
    outcome = rows.step("sweep", seconds, folder)
    return dataclasses.replace(outcome, summary=f"{outcome.summary}; {told(outcome)}")


def told(outcome: Outcome) -> str:
    """What the cells say of the choice, in each direction."""
    parts = []
    for direction in rows.ALONE:
        found = [r for r in outcome.details["rows"] if r.get("direction") == direction]
        faster = sum(row["faster"] == "resident" for row in found)
        right = sum(row["faster"] == row.get("auto") for row in found)
        parts.append(
            f"{direction}: resident is faster in {faster} of {len(found)}, "
            f"auto picks the faster in {right}"
        )
    return "; ".join(parts)


def other_split(problem: Problem, direction: str) -> Sequence[str]:
    """The strategy that is resident otherwise than the plan; none where there is no such plan."""
    try:
        held = rows.planned(problem, direction, "resident")["passes"]["resident"]["split"]
        rows.planned(problem, direction, OTHER_SPLIT[held])
    except (RuntimeError, ValueError):
        return ()
    return (OTHER_SPLIT[held],)


def time_cell(problem: Problem, left: float) -> list[Row]:
    """A row a direction: each strategy, the other split, and the copy."""
    more = {direction: other_split(problem, direction) for direction in rows.ALONE}
    return time_strategies(problem, more)


def time_strategies(problem: Problem, more: Mapping[str, Sequence[str]]) -> list[Row]:
    """A row a direction: each strategy, more of that direction, and the copy."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    count = buffers(problem, l2_bytes)
    both, clock = Strategies(problem, count, more=more), Clock(l2_bytes)
    found = []
    for direction in rows.ALONE:
        times = measure(both.calls[direction], count, clock, training=False, rounds=ROUNDS)
        found.append(describe(problem, direction, times, count, both.missing[direction]))
    return found


if __name__ == "__main__":
    rows.main("sweep", list(cells()), CELL_SECONDS, time_cell, too_large)
