"""What is timed on the GPU: one problem, and every contestant over several inputs of its size.

As in `benchmarks.contestants`, but a call takes the number of an input, and the fused block runs
under each strategy.
"""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch._functorch.config  # torch alone does not import it
from torch import nn

from .. import calls
from ..calls import Buffers
from ..contestants import COMPILED_ON_CUDA, first_line, make_block
from ..problems import Problem, draw
from ..truth import OUT, Truth
from .calls import by_strategy, fused_backward
from .strategies import STRATEGIES, contestant

GRAPH_CALLS = 20
FOOTPRINT = 4  # inputs together, in sizes of the L2 cache
FREE = 0.85  # the part of free memory that a row may take
COMPILE_SECONDS = 60.0  # of all compiled contestants of a row together
LATE_AGAIN = 5.0  # seconds between one TimeoutError and the next
NO_MORE: Mapping[str, Sequence[str]] = {"forward": (), "backward": ()}
MAKERS = {"forward": calls.forward, "backward": calls.backward, "step": calls.step}


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
    gc.collect()  # what the row before left, its compiler's frames too
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return "does not fit into memory" if needed > FREE * free else None


class Strategies:
    """The copy, and the fused block under each strategy, forward and backward.

    `calls[direction][name]` takes the number of a buffer; `missing[direction]` says who could not
    run. `more[direction]` are strategies beside the usual ones.
    """

    def __init__(
        self,
        problem: Problem,
        count: int,
        device: str = "cuda",
        more: Mapping[str, Sequence[str]] = NO_MORE,
    ) -> None:
        self.problem = problem
        xs, grads = (
            [draw(*problem, device, first + i) for i in range(count)] for first in (0, count)
        )
        self.buffers = Buffers(xs, grads)
        self.calls = {way: {"copy": copy} for way, copy in calls.copies(self.buffers).items()}
        self.missing: dict[str, dict[str, str]] = {direction: {} for direction in self.calls}
        block = self.block("fused")
        for direction, make in (("forward", calls.forward), ("backward", fused_backward)):
            strategies = (*STRATEGIES, *more[direction])
            found, self.missing[direction] = by_strategy(make(block, self.buffers), strategies)
            self.calls[direction] |= found

    def block(self, name: str) -> nn.Module:
        """A contestant for the problem."""
        x = self.buffers.xs[0]
        return make_block(name, x.shape[1], x.dtype, x.device, x.dim() - 2)


class Contestants(Strategies):
    """Beside them the `rivals`, and forward with backward."""

    def __init__(
        self,
        problem: Problem,
        count: int,
        rivals: Sequence[str],
        compile_seconds: float = math.inf,
        device: str = "cuda",
    ) -> None:
        super().__init__(problem, count, device)
        self.blocks: dict[str, nn.Module] = {}
        # Else a compiled backward gives memory of the forward away, and runs once.
        torch._functorch.config.donated_buffer = False
        if any(name in COMPILED_ON_CUDA for name in rivals):
            torch.compiler.reset()  # what rows before had compiled
        self.compile_seconds = min(COMPILE_SECONDS, compile_seconds)
        for name in rivals:
            self._add_rival(name)
        self._add("fused", self.block("fused"), ["step"])

    def _add(self, name: str, block: nn.Module, directions: Iterable[str]) -> None:
        """Once it has run in all of these."""
        found = {way: MAKERS[way](block, self.buffers) for way in directions}
        for direction, call in found.items():
            with torch.set_grad_enabled(direction == "step"):
                call(0)
        for direction, call in found.items():
            self.calls[direction][name] = call
        self.blocks[name] = block

    def leave_out_wrong(self) -> None:
        """Compare all with float64: a wrong rival is missing, a wrong fused block is an error.

        So is a rival that has no memory left, or breaks in another way.
        """
        x, grad = (tensors[0] for tensors in self.buffers)
        truth = Truth(self.problem, x, grad)
        for name, block in list(self.blocks.items()):
            try:
                truth.assert_right(name, block, x, grad)
            except Exception as error:
                if name in ("eager", "fused"):
                    raise
                del self.blocks[name]
                for direction, found in self.calls.items():
                    found.pop(name, None)
                    self.missing[direction].setdefault(name, first_line(error))
        for name in map(contestant, STRATEGIES):
            self._assert_strategy_right(name, truth)

    def _assert_strategy_right(self, name: str, truth: Truth) -> None:
        """What is forced; the block's own calls ran what "auto" picks."""
        if call := self.calls["forward"].get(name):
            with torch.no_grad():
                truth.judge(f"{name}, inference", OUT, call(0), by_element=True)
        if call := self.calls["backward"].get(name):
            for what, found in zip(truth.names[1:], call(0), strict=True):
                shaped = found.view(truth.eager[what].shape)
                truth.judge(f"{name}, {what}", what, shaped, by_element=True)

    def _add_rival(self, name: str) -> None:
        """In as many directions as it compiles for; the backward may fail alone."""
        block = None
        limit = self._compiling if name in COMPILED_ON_CUDA else contextlib.nullcontext
        for directions in (("forward", "step"), ("backward",)):
            try:
                with limit():
                    block = self.block(name) if block is None else block
                    self._add(name, block, directions)
            except (
                Exception
            ) as error:  # of Triton, of a compiler, or out of time; or it is not there
                if name == "eager":
                    raise
                without = directions if directions == ("backward",) else MAKERS
                for direction in without:
                    self.missing[direction][name] = first_line(error)
                return

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """Raise TimeoutError once the row's time for it is over."""
        begin = time.monotonic()
        try:
            with at_most(self.compile_seconds):
                yield
        finally:
            self.compile_seconds -= time.monotonic() - begin


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what runs longer; in the main thread.

    Again and again: compilers catch errors of what they try, and go on with something else.
    """

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.3g} s")

    if seconds <= 0:  # a timer of none would never end
        raise TimeoutError("no time left")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, LATE_AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
