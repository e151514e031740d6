"""What is timed on the GPU: one problem, and every contestant over several inputs of its size.

As in `benchmarks.contestants`, but a call takes the number of an input, and the fused block runs
under each strategy.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from ..contestants import blocks, first_line
from . import calls
from .calls import Buffers
from .inputs import draw

GRAPH_CALLS = 20
FOOTPRINT = 4  # inputs together, in sizes of the L2 cache
FREE = 0.85  # the part of free memory that a row may take
COMPILE_SECONDS = 30
MAKERS = {"forward": calls.forward, "backward": calls.backward, "step": calls.step}


class Problem(NamedTuple):
    """What is timed."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layout: str

    @property
    def bytes(self) -> int:
        """Of x."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{'x'.join(map(str, self.shape))} {dtype} {self.layout}"


def buffers(problem: Problem, l2_bytes: int) -> int:
    """How many inputs a sample goes through."""
    return max(1, min(GRAPH_CALLS, -(-FOOTPRINT * l2_bytes // problem.bytes)))


def memory_needed(problem: Problem, count: int) -> int:
    """An estimate: buffers, what forwards keep, results, and what plain calls make beside."""
    return problem.bytes * (count * (4 + 4 + 6) + 16)


def too_large(problem: Problem) -> str | None:
    """Why a row cannot be timed on the current device, if so."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    needed = memory_needed(problem, buffers(problem, l2_bytes))
    torch.cuda.empty_cache()  # what the row before left
    free, _ = torch.cuda.mem_get_info()
    return "does not fit into memory" if needed > FREE * free else None


class Strategies:
    """The copy, and the fused block under each strategy, forward and backward.

    `calls[direction][name]` takes the number of a buffer; `missing[direction]` says who could not
    run.
    """

    def __init__(
        self, problem: Problem, count: int, with_compile: bool = False, device: str = "cuda"
    ) -> None:
        shape, dtype, layout = problem
        xs, grads = (
            [draw(shape, dtype, layout, device, first + i) for i in range(count)]
            for first in (0, count)
        )
        self.buffers = Buffers(xs, grads)
        self.blocks = blocks(shape[1], dtype, xs[0].device, with_compile)
        self.calls = {way: {"copy": copy} for way, copy in calls.copies(self.buffers).items()}
        self.missing: dict[str, dict[str, str]] = {direction: {} for direction in self.calls}
        for direction, make in (("forward", calls.forward), ("backward", calls.fused_backward)):
            call = make(self.blocks["fused"], self.buffers)
            found, self.missing[direction] = calls.by_strategy(call)
            self.calls[direction] |= found


class Contestants(Strategies):
    """Beside them the plain block and, if wanted, the compiled one; and forward with backward."""

    def __init__(
        self, problem: Problem, count: int, with_compile: bool, device: str = "cuda"
    ) -> None:
        super().__init__(problem, count, with_compile, device)
        self._add("eager", MAKERS)
        if with_compile:
            self._add_compiled()
        self._add("fused", ["step"])

    def _add(self, name: str, directions: Iterable[str]) -> None:
        """Once it has run in all of these."""
        found = {way: MAKERS[way](self.blocks[name], self.buffers) for way in directions}
        for direction, call in found.items():
            with torch.set_grad_enabled(direction == "step"):
                call(0)
        for direction, call in found.items():
            self.calls[direction][name] = call

    def _add_compiled(self) -> None:
        """In as many directions as it compiles for; the backward may fail alone."""
        # Else the compiled backward gives memory of the forward away, and runs once.
        torch._functorch.config.donated_buffer = False
        for directions in (("forward", "step"), ("backward",)):
            try:
                with at_most(COMPILE_SECONDS):
                    self._add("compile", directions)
            except Exception as error:  # of Triton, of a compiler, or out of time
                without = directions if directions == ("backward",) else MAKERS
                for direction in without:
                    self.missing[direction]["compile"] = first_line(error)
                return


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what runs longer; in the main thread."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
