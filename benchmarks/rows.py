"""Rows of measurements: taken one by one until the time is over, and what is kept of each.

A row is of one problem in one direction. As JSON it has

    name, direction       what it is of; with shape, dtype and layout where it is of one block
    contestants           by name: "launched" and perhaps "graph", each median, lower and upper
                          quartile, and every sample ("raw"), in microseconds a call
    method                which of the two the row's speeds are of
    missing               by name of a contestant, why it was not timed
    memory                by name: "saved_bytes" until the backward, "peak_bytes" at any time
    preempted             on a CPU: how often a second other programs took a processor meanwhile
    fraction_of_copy      by name of ours: the copy's time over its own
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from .contestants import first_line
from .problems import Problem

# Passes over tensors of x's size that nobody can save: read x, write out; in the backward read x
# and out's gradient, write x's gradient.
COPY_PASSES = {"forward": 2, "backward": 3, "step": 5}
TITLES = {"forward": "Forward", "backward": "Backward", "step": "Forward + backward"}

Row = dict[str, Any]
Found = Mapping[str, Any]
Wanted = TypeVar("Wanted")  # what a row is of; its text is the row's name


class Costs:
    """Seconds that a row is going to take, judged by those taken before it.

    Those of a kind take alike by their size: a row at least as long as the one nearest in size, and
    in proportion where it is larger.
    """

    def __init__(self) -> None:
        self.known: dict[object, list[tuple[float, float]]] = {}

    def add(self, kind: object, size: float, seconds: float) -> None:
        """What one took."""
        self.known.setdefault(kind, []).append((size, seconds))

    def expected(self, kind: object, size: float) -> float:
        """Of the next one; 0 where nothing is known of its kind."""
        known = self.known.get(kind, [])
        nearest = min(known, key=lambda one: abs(math.log(size / one[0])), default=(size, 0.0))
        return nearest[1] * max(1.0, size / nearest[0])


def take(
    wanted: Sequence[Wanted],
    seconds: float,
    shortest: float,
    time_row: Callable[[Wanted, float], list[Row]],
    why_not: Callable[[Wanted], str | None],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Time row after row, none begun with less than `shortest` seconds left.

    `time_row` is also given the seconds left; `keep` is given all there is after each row.
    """
    end = time.monotonic() + seconds
    found: dict[str, Any] = {"rows": [], "skipped": [], "ended": False}
    for problem in wanted:
        left = end - time.monotonic()
        reason = "no time left" if left < shortest else why_not(problem)
        if reason:
            found["skipped"].append({"name": str(problem), "reason": reason})
            continue
        try:
            found["rows"] += time_row(problem, left)
        except Exception as error:  # out of memory, a failed launch: the next row may do
            found["rows"].append({"name": str(problem), "error": first_line(error)})
        keep(found)
    keep({**found, "ended": True})


def describe(
    problem: Problem,
    direction: str,
    contestants: dict[str, dict[str, Any]],
    missing: dict[str, str],
    ours: Sequence[str],
) -> Row:
    """What is kept of every row. Speeds are those in a graph where ours and the copy have one."""
    method = "graph" if all("graph" in contestants[n] for n in ("copy", *ours)) else "launched"
    times = {name: contestants[name][method]["median"] for name in ("copy", *ours)}
    return {
        "name": str(problem),
        "direction": direction,
        "shape": list(problem.shape),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "layout": problem.layout,
        "contestants": contestants,
        "missing": missing,
        "method": method,
        "fraction_of_copy": {name: times["copy"] / times[name] for name in ours},
        "copy_gigabytes_per_second": COPY_PASSES[direction] * problem.bytes / times["copy"] / 1e3,
    }


def timing(row: Found, name: str) -> Found | None:
    """Of a contestant, as the row's speeds are; None where it was not timed so."""
    found: Found | None = row["contestants"].get(name, {}).get(row["method"])
    return found


def median(row: Found, name: str) -> float | None:
    """Microseconds of a contestant; None where it was not timed."""
    found = timing(row, name)
    return None if found is None else found["median"]


def spread(found: Found) -> float:
    """How far the quartiles of a timing are from its median, as a part of it."""
    return float(found["upper"] - found["lower"]) / 2 / float(found["median"])


def fused(row: Found) -> str:
    """The contestant that a user of the fused block gets."""
    return "fused" if "fused" in row["contestants"] else f"cuda {row.get('auto', '')}"


def speedup(row: Found, name: str) -> float | None:
    """How many times the fused block's time a contestant takes; None where one is not there."""
    theirs, ours = median(row, name), median(row, fused(row))
    return None if theirs is None or ours is None else theirs / ours


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None if none is."""
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None
