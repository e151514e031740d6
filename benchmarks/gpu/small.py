"""``python -m benchmarks.gpu.small 1/1``: all kinds of calls, small, for compute-sanitizer.

``2/5`` makes the second fifth of them; dtypes behind it leave out the others.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

import cbam_cuda
from cbam_cuda.arguments import Weights

from .inputs import cases, operator_backward, saved_by_forward, train
from .strategies import STRATEGIES, Tally, forced

FINISHED = "small: reached the end"
WATCHED = "small, "  # begins a line about a strategy
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES = tuple(
    case
    for case in cases.CASES
    if case in cases.FEW_CASES
    or case.name
    in (
        "small sample, one thread does it all",
        "several column tiles, row blocks and pool blocks",
        "more channels than a column tile",
        "kernel larger than the image",
        "one of everything",
    )
)


ALL_CALLS = ("inference", "ended", "training")  # the last one has the kernels of "attention"
BY_PARTS = "by parts"  # which are streamed


class Watched(NamedTuple):
    """What is called."""

    case: cases.Case
    dtype: torch.dtype
    layout: str
    resident: str = "resident"  # the strategy by which it is that
    calls: Sequence[str] = ALL_CALLS

    def __str__(self) -> str:
        return f"{self.case}, {str(self.dtype).removeprefix('torch.')}, {self.layout}"

    def ways(self) -> dict[str, str]:
        """By strategy, how to ask for it. What is there for a way is large, and streamed slowly."""
        asked = {"resident": self.resident}
        return asked if self in FORMS else {"streaming": "streaming"} | asked


# What is held in a way of its own in both directions, or in one: racecheck takes minutes for some.
BOTH, FORWARD, BACKWARD = ("inference", "training"), ("inference", "attention"), ("backward",)


def _form(
    name: str,
    shape: tuple[int, ...],
    hidden: int,
    dtype: torch.dtype,
    resident: str,
    last: bool = False,
    calls: Sequence[str] = BOTH,
) -> Watched:
    case = cases.Case(name, shape, hidden, (7, 7))
    return Watched(case, dtype, cases.NATIVE_LAYOUTS[last], f"resident-{resident}", calls)


F16, F32 = torch.float16, torch.float32
# Ways to hold samples on the chip that no smaller problem takes.
FORMS = (
    _form("maps in bands", (1, 40, 118, 118), 4, F16, "channels:cluster:16:1", calls=FORWARD),
    _form("pixels of clusters of 16", (1, 64, 18, 18), 4, F16, "pixels:cluster:16:1", last=True),
    _form("pixels of the whole grid", (1, 96, 96, 96), 4, F32, "pixels:grid"),
    _form("x comes and goes", (1, 256, 40, 40), 16, F32, "channels:cluster:16:1", calls=BACKWARD),
    _form(
        "pixels, x comes and goes",
        (1, 8, 194, 194),
        1,
        F32,
        "pixels:cluster:16",
        last=True,
        calls=BACKWARD,
    ),
    _form("several boxes a block", (1, 4, 161, 53), 2, F32, "channels:grid", calls=FORWARD),
    _form("backward on the whole grid", (1, 4, 82, 82), 2, F16, "channels:grid:2", calls=BACKWARD),
    _form("several samples, several visits", (512, 16, 2, 2), 32, F16, "channels:cluster:4:0:8"),
    _form("shared hidden units", (140, 128, 2, 2), 200, F32, "channels:cluster:8"),
    _form("several visits of a team", (133, 64, 2, 2), 64, F16, "channels", last=True),
)


def problems(dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Watched]:
    """All of them in these dtypes, and the forms in theirs."""
    for case in CASES:
        for dtype in dtypes:
            for layout in cases.NATIVE_LAYOUTS:
                yield Watched(case, dtype, layout)
    yield from FORMS


def run(
    device: str = "cuda", part: int = 1, parts: int = 1, dtypes: Sequence[torch.dtype] = DTYPES
) -> dict[str, str]:
    """Make a part of all calls; returns how many of each strategy, and what it has no plan for.

    Inputs are made on the CPU and copied, so that hardly any kernels run but those in question.

    Raises:
        SkippedError: a strategy made no call at all, of all parts together.
    """
    tallies = {strategy: Tally() for strategy in STRATEGIES}
    for problem in itertools.islice(problems(dtypes), part - 1, None, parts):
        _make_calls(problem, device, tallies)
    # A part may hold what has no resident plan alone.
    made = {name: tally for name, tally in tallies.items() if tally.checked or parts == 1}
    return {strategy: tally.said("calls") for strategy, tally in made.items()}


def _make_calls(problem: Watched, device: str, tallies: Mapping[str, Tally]) -> None:
    case, dtype, layout, *_ = problem
    x = cases.LAYOUTS[layout](cases.make_x(case, dtype)).to(device)
    weights = Weights(*(w.to(device) for w in cases.make_weights(case, dtype)))
    grad = cases.LAYOUTS[layout](cases.make_x(case, dtype, seed=2)).to(device)

    @torch.no_grad()
    def forward(**options):
        found = cbam_cuda.cbam(x, *weights, backend=device, **options)
        return [found] if isinstance(found, torch.Tensor) else found

    calls = {
        "inference": forward,
        "attention": lambda: forward(return_attention=True),
        "ended": lambda: forward(residual=grad, activation="relu"),
        "training": lambda: train(x, weights, grad),
        "backward": lambda: operator_backward(x, weights, saved_by_forward(x, weights), grad),
        BY_PARTS: lambda: cases.step_by_parts(torch.ops.cbam_cuda, x, weights, grad),
    }
    for strategy, way in problem.ways().items():
        for name in (*problem.calls, BY_PARTS) if way == "streaming" else problem.calls:
            with tallies[strategy].problem(f"{problem}, {name}"), forced(way):
                # The copies wait for the kernels, and an error of theirs is raised here.
                finite = [torch.isfinite(tensor.cpu()).all().item() for tensor in calls[name]()]
                assert all(finite), f"{problem}, {name}, {strategy}: not finite"


if __name__ == "__main__":
    part, parts = map(int, sys.argv[1].split("/"))
    said = run("cuda", part, parts, [getattr(torch, name) for name in sys.argv[2:]] or DTYPES)
    torch.cuda.synchronize()
    for strategy, calls in said.items():
        print(f"{WATCHED}{strategy}: {calls}")
    print(FINISHED)
