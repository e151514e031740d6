"""Where the resident forward overtakes the streaming one: both, over batches and shapes.

``python -m benchmarks.gpu.sweep FOLDER SECONDS`` takes the cells and writes the file as it goes.
Thresholds of the plan are set from its table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from . import rows
from .inputs import BLOCKS
from .measure import Clock, measure
from .problems import Problem, buffers, forwards
from .results import Folder, Outcome
from .rows import Row, describe

# Far apart first: what the time does not suffice for lies between others.
BATCHES = (1, 8, 32, 128, 2, 16, 64, 4, 256)
DTYPES = (torch.float16, torch.float32)
CELL_SECONDS = 3.0  # with less left, a cell is not begun
ROUNDS = 3


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
    """What the cells say of the choice."""
    found = [row for row in outcome.details["rows"] if "faster" in row]
    faster = sum(row["faster"] == "resident" for row in found)
    right = sum(row["faster"] == row.get("auto") for row in found)
    return f"resident is faster in {faster}, auto picks the faster in {right}"


def time_cell(problem: Problem, left: float) -> list[Row]:
    """One row: inference under each strategy, and the copy."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    count = buffers(problem, l2_bytes)
    calls, missing = forwards(problem, count)
    found = measure(calls, count, Clock(l2_bytes), training=False, rounds=ROUNDS)
    return [describe(problem, "forward", found, count, missing)]


if __name__ == "__main__":
    rows.main("sweep", list(cells()), CELL_SECONDS, time_cell)
