"""``python -m benchmarks.guard``: whether the CPU backend has become grossly slower.

Times the fused block beside plain PyTorch and a copy, on the same machine in the same seconds, so
that only ratios count. Exit code 1 where it is less than half as far ahead as it was, each time of
a few: other programs on the same processors do that now and then, a lost vectorization always.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from . import block
from .problems import Problem
from .rows import Row, speedup
from .text import markdown, number

GROSS, FINE = 2.0, "fine"
SECONDS = 0.25  # of a contestant in each direction
TRIES = 4  # the best one counts


class Expected(NamedTuple):
    """How many times the fused block's time plain PyTorch takes, as measured with 2 threads."""

    forward: float
    step: float


# In caches, so that neither memory nor page faults of the machine count.
EXPECTED = {
    Problem((4, 128, 28, 28)): Expected(9.0, 8.0),
    Problem((4, 128, 28, 28), layout="channels_last"): Expected(9.0, 8.0),
}


def ahead(row: Row) -> float:
    """How many times the fused block's time plain PyTorch takes."""
    return speedup(row, "eager") or 0.0


def judge(row: Row, expected: float) -> list[str]:
    """Cells: what was expected, what came, and whether that is a gross loss."""
    found = ahead(row)
    verdict = "GROSS LOSS" if found * GROSS < expected else FINE
    of_copy = row["fraction_of_copy"]["fused"]
    cells = [row["name"], row["direction"], number(expected, 1), number(found, 1)]
    return [*cells, number(of_copy, 2), verdict]


def main(expected: dict[Problem, Expected] | None = None) -> int:
    """Measure and print."""
    body: list[Sequence[str]] = []
    for problem, ratios in (expected or EXPECTED).items():
        best: list[Row] = []
        for _ in range(TRIES):
            rows = block.time_row(problem, SECONDS, plain=["eager"])
            best = [max(same, key=ahead) for same in zip(rows, best or rows, strict=True)]
            judged = [judge(row, ratio) for row, ratio in zip(best, ratios, strict=True)]
            if all(cells[-1] == FINE for cells in judged):
                break
        body += judged
    header = ["problem", "direction", "eager/fused was", "is", "copy/fused", ""]
    print(markdown(header, body, left=2))
    return int(any(cells[-1] != FINE for cells in body))


if __name__ == "__main__":
    sys.exit(main())
