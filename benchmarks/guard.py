"""``python -m benchmarks.guard``: whether the CPU backend has become grossly slower.

Times the fused block beside plain PyTorch and a copy, on the same machine in the same seconds, so
that only ratios count. Exit code 1 where it is less than half as far ahead as it was: noise does
not do that, a lost vectorization does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from . import block
from .problems import Problem
from .rows import Row, speedup
from .text import markdown, number

GROSS = 2.0
SECONDS = 0.25  # of a contestant in each direction


class Expected(NamedTuple):
    """How many times the fused block's time plain PyTorch takes, as measured with 2 threads."""

    forward: float
    step: float


# In caches, so that neither memory nor page faults of the machine count.
EXPECTED = {
    Problem((4, 128, 28, 28)): Expected(9.0, 8.0),
    Problem((4, 128, 28, 28), layout="channels_last"): Expected(9.0, 8.0),
}


def judge(row: Row, expected: float) -> list[str]:
    """Cells: what was expected, what came, and whether that is a gross loss."""
    found = speedup(row, "eager") or 0.0
    verdict = "GROSS LOSS" if found * GROSS < expected else "fine"
    of_copy = row["fraction_of_copy"]["fused"]
    cells = [row["name"], row["direction"], number(expected, 1), number(found, 1)]
    return [*cells, number(of_copy, 2), verdict]


def main(expected: dict[Problem, Expected] | None = None) -> int:
    """Measure and print."""
    body: list[Sequence[str]] = []
    for problem, ratios in (expected or EXPECTED).items():
        rows = block.time_row(problem, SECONDS, plain=["eager"])
        body += [judge(row, ratio) for row, ratio in zip(rows, ratios, strict=True)]
    header = ["problem", "direction", "eager/fused was", "is", "copy/fused", ""]
    print(markdown(header, body, left=2))
    return int(any(cells[-1] != "fine" for cells in body))


if __name__ == "__main__":
    sys.exit(main())
