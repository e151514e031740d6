"""``python -m benchmarks.targets``: what the CPU backend is meant to reach, and what it reaches.

A line for each aim, measured with two threads: geometric means over the stages of a ResNet-50 at
batch 8 ("four"), ratios of medians of contestants that took turns.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from . import block
from .problems import SMALL, Problem, in_stages
from .rows import Row, geometric_mean, median, speedup
from .text import markdown, number

THREADS = 2
SECONDS = 0.5  # of a contestant in each direction
COMPILES = ("compile", "tuned compile")
LARGE = Problem((32, 256, 56, 56))
TINY = Problem((1, 16, 4, 4))
SIZES = tuple(Problem((1, 64, n, n)) for n in (32, 64, 128, 256, 512, 1024))
# Of glibc's mallopt: no allocation is mapped on its own, none is given back.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


class Line(NamedTuple):
    """One aim."""

    what: str
    target: float
    found: float | None
    at_least: bool  # else at most

    @property
    def cells(self) -> list[str]:
        """Of the table."""
        met = self.found is not None and (self.found >= self.target) == self.at_least
        sign = ">=" if self.at_least else "<="
        return [
            self.what,
            f"{sign} {self.target:g}",
            number(self.found, 2),
            "" if met else "missed",
        ]


class Rows:
    """Rows by problem and direction, each measured once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.taken: dict[tuple[Problem, bool], dict[str, Row]] = {}

    def __call__(self, problem: Problem, compiled: bool = False) -> dict[str, Row]:
        """By direction."""
        if (problem, compiled) not in self.taken:
            print(f"  {problem}", file=sys.stderr, flush=True)
            found = block.time_row(problem, self.seconds, compiled, ["eager"])
            self.taken[problem, compiled] = {row["direction"]: row for row in found}
        return self.taken[problem, compiled]


def over_eager(rows: Iterable[Row]) -> float | None:
    """Geometric mean of speed-ups."""
    return geometric_mean(speedup(row, "eager") for row in rows)


def over_compile(rows: Iterable[Row]) -> float | None:
    """Geometric mean of speed-ups over the faster of the compiled forms."""
    best = [[r for n in COMPILES if (r := speedup(row, n)) is not None] for row in rows]
    return geometric_mean(min(ratios) if ratios else None for ratios in best)


def fused_us(row: Row) -> float:
    """Microseconds."""
    return median(row, "fused") or float("nan")


def copies(row: Row) -> float:
    """How many times the copy's time the fused block takes."""
    return 1 / row["fraction_of_copy"]["fused"]


def lines(rows: Rows) -> Iterator[Line]:
    """All of them."""
    four = [rows(p, True) for p in in_stages(8)]
    half = [rows(p, True) for p in in_stages(8, torch.bfloat16)]
    float16 = [rows(p) for p in in_stages(8, torch.float16)]
    last = [rows(p) for p in in_stages(8, layout="channels_last")]
    aims = {"forward": (8.0, 3.2, 12.0, 1.2), "step": (9.0, 4.5, 10.0, 1.3)}
    for way, (eager, compiled, bfloat16, layout) in aims.items():
        f32, bf16 = [r[way] for r in four], [r[way] for r in half]
        yield Line(f"{way}, four: times as fast as eager", eager, over_eager(f32), True)
        yield Line(f"{way}, four: as compiled", compiled, over_compile(f32), True)
        yield Line(f"{way}, four, bfloat16: as eager", bfloat16, over_eager(bf16), True)
        if way == "forward":
            yield Line(f"{way}, four, bfloat16: as compiled", 3.5, over_compile(bf16), True)
        for one, other in zip(last, four, strict=True):
            ratio = fused_us(one[way]) / fused_us(other[way])
            yield Line(f"{one[way]['name']}, {way}: contiguous", layout, ratio, False)
    for row in four[:3]:
        yield Line(f"{row['forward']['name']}, forward: copies", 1.5, copies(row["forward"]), False)
    for one, other in zip(float16, half, strict=True):
        ratio = fused_us(one["forward"]) / fused_us(other["forward"])
        yield Line(f"{one['forward']['name']}, forward: of bfloat16", 1.3, ratio, False)
    yield Line("8x2048x7x7, forward: as eager", 8.0, speedup(four[3]["forward"], "eager"), True)
    yield from small(rows)
    yield from large(rows)
    yield from over_threads()
    yield from over_sizes(rows)


def small(rows: Rows) -> Iterator[Line]:
    """Batch 1, and what a call costs that computes nearly nothing."""
    for problem, eager in ((Problem(SMALL), 16.0), (Problem((1, 256, 56, 56)), 11.0)):
        for way, aim in (("forward", eager), ("step", 11.0)):
            found = speedup(rows(problem)[way], "eager")
            yield Line(f"{problem}, {way}: as eager", aim, found, True)
    for way, aim in (("forward", 15.0), ("step", 60.0)):
        yield Line(f"{TINY}, {way}: microseconds", aim, fused_us(rows(TINY)[way]), False)


def large(rows: Rows) -> Iterator[Line]:
    """Outputs above 32 MB: each is mapped anew by the default allocator."""
    row = block.time_row(LARGE, rows.seconds, True, ["eager"])[0]
    yield Line(f"{LARGE}, forward: as compiled", 1.0, over_compile([row]), True)
    with kept_memory():
        row = block.time_row(LARGE, rows.seconds, False, ["eager"])[0]
    yield Line(f"{LARGE}, forward, memory at hand: copies", 1.3, copies(row), False)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Large allocations come from memory that the process keeps; glibc only."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(MMAP_MAX, 65536)
        mallopt(TRIM_THRESHOLD, 128 * 1024)


def over_threads() -> Iterator[Line]:
    """Where the copy gains from a second thread, so must the fused block."""
    for problem in in_stages(8):
        taken = list(block.time_threads(problem, SECONDS))
        for way in block.DIRECTIONS:
            one, two = (r for r in taken if r["direction"] == way and r["threads"] in (1, THREADS))
            gains = {n: (median(one, n) or 0) / (median(two, n) or 1) for n in ("copy", "fused")}
            what = f"{problem}, {way}: second thread (copy: {gains['copy']:.2f})"
            yield Line(what, min(1.7, gains["copy"]), gains["fused"], True)


def over_sizes(rows: Rows) -> Iterator[Line]:
    """Time an element, the slowest size over the fastest."""
    with kept_memory():
        times = [fused_us(rows(p)["forward"]) / p.bytes for p in SIZES]
    yield Line("64x32x32 to 64x1024x1024: time an element", 1.3, max(times) / min(times), False)


def main(make: Callable[[Rows], Iterable[Line]] = lines, seconds: float = SECONDS) -> int:
    """Print the table."""
    torch.set_num_threads(THREADS)
    body: Sequence[Sequence[str]] = [line.cells for line in make(Rows(seconds))]
    print(markdown(["aim", "target", "measured", ""], body))
    return 0


if __name__ == "__main__":
    sys.exit(main())
