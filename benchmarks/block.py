"""One block on the CPU: every contestant on the same x, taking turns."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence

import torch

from . import calls
from .calls import Buffers
from .contestants import COMPILED, PLAIN, first_line, make_block
from .memory import of_blocks
from .problems import Problem, draw
from .rows import Row, describe
from .timing import preemptions, time_together
from .truth import Truth

CPU = torch.device("cpu")
DIRECTIONS = {"forward": calls.forward, "step": calls.step}
FREE = 0.6  # the part of free memory that a row may take
COPIES = 14  # of x in float32, that the hungriest contestant and the truth need at once


def too_large(problem: Problem) -> str | None:
    """Why a row cannot be timed here, if so."""
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    needed = COPIES * problem.bytes * 4 / problem.dtype.itemsize
    return "does not fit into memory" if needed > FREE * free * 1024 else None


class Contestants:
    """All that can run, once they are known to be right.

    `blocks` by name; `missing` says why others are not among them.
    """

    def __init__(self, problem: Problem, names: Sequence[str]) -> None:
        self.problem = problem
        x, grad = (draw(*problem, CPU, seed) for seed in (0, 1))
        self.buffers = Buffers([x], [grad])
        self.blocks: dict[str, torch.nn.Module] = {}
        self.missing: dict[str, str] = {}
        truth = Truth(problem, x, grad)
        for name in names:
            try:
                block = make_block(name, x.shape[1], problem.dtype, CPU, x.dim() - 2)
                truth.assert_right(name, block, x, grad)
            except Exception as error:  # each missing compiler is missed in another way
                if name in ("eager", "fused"):
                    raise
                self.missing[name] = first_line(error)
            else:
                self.blocks[name] = block

    def calls(self, direction: str) -> dict[str, calls.Call]:
        """By name, the copy among them."""
        make = DIRECTIONS[direction]
        copy = {"copy": calls.copies(self.buffers)[direction]}
        return copy | {name: make(block, self.buffers) for name, block in self.blocks.items()}


def time_row(
    problem: Problem, seconds: float, compiled: bool = False, plain: Sequence[str] = PLAIN
) -> list[Row]:
    """A row a direction; each contestant takes about so many seconds in each."""
    if compiled:
        torch.compiler.reset()
    names = [*plain, *(COMPILED if compiled else ()), "fused"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        contestants = Contestants(problem, names)
    rows = [_row(contestants, direction, seconds) for direction in DIRECTIONS]
    rows[-1]["memory"] = of_blocks(contestants.blocks, contestants.buffers)
    rows[-1]["bytes"] = problem.bytes
    return rows


def _row(contestants: Contestants, direction: str, seconds: float) -> Row:
    """All of them in one direction, and how often the processors were taken away meanwhile."""
    before, begin = preemptions(), time.monotonic()
    found = _time(contestants, direction, seconds)
    often = (preemptions() - before) / (time.monotonic() - begin)
    row = describe(contestants.problem, direction, found, contestants.missing, ["fused"])
    return {**row, "preempted": round(often, 1)}


def _time(contestants: Contestants, direction: str, seconds: float) -> dict[str, dict]:
    with torch.set_grad_enabled(direction == "step"):
        fns = {
            name: (lambda call=call: call(0)) for name, call in contestants.calls(direction).items()
        }
        return {name: {"launched": t} for name, t in time_together(fns, CPU, seconds).items()}


def time_threads(problem: Problem, seconds: float) -> Iterator[Row]:
    """The copy and the fused block over numbers of threads, doubled up to torch's own choice."""
    most = torch.get_num_threads()
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < most] + [most]
    contestants = Contestants(problem, ["fused"])
    for direction in DIRECTIONS:
        for threads in counts:
            torch.set_num_threads(threads)
            try:
                row = _row(contestants, direction, seconds)
            finally:
                torch.set_num_threads(most)
            yield {**row, "threads": threads}
