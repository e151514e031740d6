"""What ``python -m benchmarks`` looks at before it times on a GPU, as far as a CPU can run it."""

from __future__ import annotations

import math
import time

import pytest
import torch

from benchmarks.contestants import make_block
from benchmarks.gpu import problems
from benchmarks.problems import Problem

PROBLEM = Problem((2, 32, 6, 5))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", ["cuda streaming", "cuda resident"])
def test_each_strategy_is_compared_with_the_truth(name, direction):
    contestants = problems.Contestants(PROBLEM, 1, ["eager"], device="cpu")
    contestants.leave_out_wrong()
    right = contestants.calls[direction][name]
    if direction == "forward":
        contestants.calls[direction][name] = lambda i: right(i) + 1e-3
        what = "inference"
    else:
        contestants.calls[direction][name] = lambda i: [*right(i)[:-1], right(i)[-1] * 1.001]
        what = "gradient of conv.bias"
    with pytest.raises(AssertionError, match=f"{name}, {what}: off by"):
        contestants.leave_out_wrong()


def test_strategies_that_are_impossible_are_not_compared():
    contestants = problems.Contestants(PROBLEM, 1, ["eager"], device="cpu")
    for direction in ("forward", "backward"):
        del contestants.calls[direction]["cuda resident"]
    contestants.leave_out_wrong()


@pytest.fixture
def compiling(monkeypatch):
    """Makes a row of compiled rivals, each of which takes half a second to compile."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))

    class Compiled(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.new = block, True

        def forward(self, x):
            if self.new:
                time.sleep(0.5)
                self.new = False
            return self.block(x)

    def made(name, *sizes):
        compiled = name not in ("eager", "fused")
        return Compiled(make_block("eager", *sizes)) if compiled else make_block(name, *sizes)

    monkeypatch.setattr(problems, "make_block", made)

    def row(seconds, rivals, left=math.inf):
        monkeypatch.setattr(problems, "COMPILE_SECONDS", seconds)
        return problems.Contestants(PROBLEM, 1, rivals, left, "cpu"), len(resets)

    return row


COMPILED = ["compile", "tuned compile", "max-autotune", "tuned max-autotune"]


@pytest.mark.parametrize("limits", [(0.9,), (60.0, 0.9)])  # of any row; of what the run has left
def test_rivals_of_a_row_share_the_time_to_compile(compiling, limits):
    contestants, resets = compiling(*limits[:1], ["eager", *COMPILED], *limits[1:])
    assert resets == 1
    assert list(contestants.blocks) == ["eager", "compile", "fused"]
    for missing in contestants.missing.values():
        reasons = [missing[name] for name in COMPILED[1:]]
        assert reasons[0].startswith("TimeoutError: took more than 0.")
        assert reasons[1:] == ["TimeoutError: no time left"] * 2


def test_what_a_row_compiled_stays_until_it_is_timed(compiling):
    """A reset between rivals would have those before compile again, outside of any limit."""
    assert compiling(60.0, COMPILED)[1] == 1
    assert compiling(60.0, ["eager"])[1] == 1
