"""Ways to hold samples on the chip, each of them timed: what the costs in plans are fitted to.

``python -m benchmarks.gpu.ways FOLDER SECONDS`` takes the cells of the sweep and writes the file as
it goes. No step of the acceptance run: a cell takes some seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ..problems import Problem
from ..rows import Row
from . import rows, sweep
from .problems import too_large

CELL_SECONDS = 10.0  # with less left, a cell is not begun
LIMIT = 1.7  # what is predicted to take so many times as long as the plan's way is left out
CLUSTERS = (1, 2, 4, 8, 16)
GRIDS = (*range(2, 15), 16, 18, 20, 22, 26, 33, 44, 66)
BLOCKS = (1, 2)  # on a multiprocessor
SAMPLES = (1, 2, 4, 8)  # of a visit


def named() -> Iterator[str]:
    """All that are asked for."""
    for split, samples in itertools.product(("channels", "pixels"), SAMPLES):
        if split == "pixels" and samples > 1:
            continue
        for kind, teams in (("cluster", CLUSTERS), ("grid", GRIDS)):
            for blocks, team in itertools.product(BLOCKS, teams):
                yield f"resident-{split}:{kind}:{team}:{blocks}:{samples}"


def ways(problem: Problem, direction: str) -> list[str]:
    """Those that a problem has, once each, unless they are expected to be slow.

    Where teams come back for more samples, also with the next visit brought to the cache ahead.
    """
    found: dict[str, tuple[str, ...]] = {}
    try:
        longest = LIMIT * rows.planned(problem, direction, "resident")["predicted_seconds"]
    except (RuntimeError, ValueError):
        return []
    for name in named():
        try:
            plan = rows.planned(problem, direction, name)
        except (RuntimeError, ValueError):
            continue
        if plan["predicted_seconds"] <= longest:
            held = plan["passes"]["resident"]
            comes_back = held["teams"] * held["samples"] < problem.shape[0]
            found.setdefault(str(held), (name, f"{name}:ahead") if comes_back else (name,))
    return list(itertools.chain(*found.values()))


def time_cell(problem: Problem, left: float) -> list[Row]:
    """A row a direction: each strategy, and each way."""
    return sweep.time_strategies(problem, {way: ways(problem, way) for way in rows.ALONE})


if __name__ == "__main__":
    rows.main("ways", list(sweep.cells()), CELL_SECONDS, time_cell, too_large)
