"""The ways in which the CUDA backend runs a forward or a backward, each forced in turn."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ..outcome import SkippedError

VARIABLE = "CBAM_CUDA_STRATEGY"
STRATEGIES = ("streaming", "resident")
# Resident by what the plan's blocks do not hold.
OTHER_SPLIT = {"channels": "resident-pixels", "pixels": "resident-channels"}
_IMPOSSIBLE = "expected one that is possible"


@contextlib.contextmanager
def forced(strategy: str) -> Iterator[None]:
    """Everything is run like this, or raises an error that `is_impossible`."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = strategy
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def is_impossible(error: Exception) -> bool:
    """Whether it says that there is no plan of the forced strategy."""
    return _IMPOSSIBLE in str(error)


def contestant(strategy: str) -> str:
    """What it is called in timings."""
    return f"cuda {strategy}"


class Tally:
    """Problems of a check: how many were checked, and which have no resident plan."""

    def __init__(self) -> None:
        self.checked = 0
        self.left_out: list[str] = []

    @contextlib.contextmanager
    def problem(self, name: str) -> Iterator[None]:
        """Around what is checked of one problem; ends early where it has no plan."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if not is_impossible(error):
                raise
            self.left_out.append(name)
        else:
            self.checked += 1

    def said(self, what: str = "problems") -> str:
        """How many, and what was left out; a check of nothing counts as skipped."""
        without = f"no resident plan for {len(self.left_out)}: {'; '.join(self.left_out)}"
        if not self.checked:
            raise SkippedError(without)
        counted = f"{self.checked} {what}"
        return f"{counted}, {without}" if self.left_out else counted
