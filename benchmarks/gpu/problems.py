"""What is timed on the GPU: one problem, and every contestant over several inputs of its size.

As in `benchmarks.contestants`, but a call takes the number of an input, so that no call finds what
the one before it left in the cache.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..contestants import blocks, first_line
from .inputs import draw
from .strategies import STRATEGIES, contestant, forced, is_impossible

GRAPH_CALLS = 20
FOOTPRINT = 4  # inputs together, in sizes of the L2 cache
COMPILE_SECONDS = 30

Call = Callable[[int], object]


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
    """An estimate of what timing takes: buffers, results, and what the plain form makes."""
    return problem.bytes * (count * 4 + 16)


class Contestants:
    """`calls[direction][name]` takes the number of a buffer; `missing` says who could not run."""

    def __init__(
        self,
        problem: Problem,
        count: int,
        with_compile: bool,
        device: str = "cuda",
    ) -> None:
        shape, dtype, layout = problem
        self.missing: dict[str, str] = {}
        xs = [draw(shape, dtype, layout, device, seed) for seed in range(count)]
        outs = [torch.empty_like(x) for x in xs]
        grads = [draw(shape, dtype, layout, device, count + seed) for seed in range(count)]
        self.calls: dict[str, dict[str, Call]] = {
            "forward": {"copy": _copy(xs, outs)},
            "step": {"copy": _copy_step(xs, outs, grads)},
        }
        for name, block in blocks(shape[1], dtype, xs[0].device, with_compile).items():
            calls = {"forward": _forward(block, xs), "step": _step(block, xs, grads)}
            if name == "compile" and not self._compiles(calls):
                continue
            self.calls["step"][name] = calls["step"]
            self.calls["forward"] |= (
                _by_strategy(calls["forward"], self.missing)
                if name == "fused"
                else {name: calls["forward"]}
            )

    def _compiles(self, calls: dict[str, Call]) -> bool:
        try:
            with at_most(COMPILE_SECONDS):
                for direction, call in calls.items():
                    with torch.set_grad_enabled(direction == "step"):
                        call(0)
        except Exception as error:  # of Triton, of a compiler, or out of time
            self.missing["compile"] = first_line(error)
            return False
        return True


def forwards(
    problem: Problem, count: int, device: str = "cuda"
) -> tuple[dict[str, Call], dict[str, str]]:
    """The copy and the fused forward under each strategy; and which one is missing, with why."""
    shape, dtype, layout = problem
    xs = [draw(shape, dtype, layout, device, seed) for seed in range(count)]
    outs = [torch.empty_like(x) for x in xs]
    block = blocks(shape[1], dtype, xs[0].device, with_compile=False)["fused"]
    missing: dict[str, str] = {}
    return {"copy": _copy(xs, outs), **_by_strategy(_forward(block, xs), missing)}, missing


def _by_strategy(call: Call, missing: dict[str, str]) -> dict[str, Call]:
    found = {}
    for strategy in STRATEGIES:
        name, forced_call = contestant(strategy), forced(strategy)(call)
        try:
            with torch.no_grad():
                forced_call(0)
        except RuntimeError as error:
            if not is_impossible(error):
                raise
            missing[name] = first_line(error)
        else:
            found[name] = forced_call
    return found


def _copy(xs: list[Tensor], outs: list[Tensor]) -> Call:
    """Reads x, writes out."""
    return lambda i: outs[i].copy_(xs[i])


def _copy_step(xs: list[Tensor], outs: list[Tensor], grads: list[Tensor]) -> Call:
    """Reads x, writes out; then reads x and out's gradient, writes x's gradient."""
    dxs = [torch.empty_like(x) for x in xs]

    def step(i: int) -> None:
        outs[i].copy_(xs[i])
        torch.mul(xs[i], grads[i], out=dxs[i])

    return step


def _forward(block: nn.Module, xs: list[Tensor]) -> Call:
    return lambda i: block(xs[i])


def _step(block: nn.Module, xs: list[Tensor], grads: list[Tensor]) -> Call:
    """Forward and backward, for the gradients of x and all weights."""
    inputs = [x.detach().requires_grad_() for x in xs]
    weights = list(block.parameters())

    def step(i: int) -> object:
        out = block(inputs[i])
        return out.detach(), torch.autograd.grad(out, [inputs[i], *weights], grads[i])

    return step


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
