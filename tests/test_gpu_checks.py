"""Checks of ``python -m benchmarks.gpu``, as far as a CPU can run them."""

from __future__ import annotations

import contextlib
import json
import os
from typing import NamedTuple

import pytest
import torch
from conftest import why_not
from regimes import plan_of
from torch.autograd import DeviceType

import cbam_cuda
from benchmarks.gpu import capture, checks, inputs, launches, report, strategies, values
from benchmarks.gpu.commands import Finished
from benchmarks.outcome import FAILED, PASSED, SKIPPED, SkippedError

TINY = (8, 6, 5)


def finished(text, code=0, timed_out=False):
    return Finished(code, text, 12.0, timed_out)


def test_what_a_check_printed():
    result = {"state": PASSED, "reason": "fine", "seconds": 1.0}
    text = f"a warning\ncheck: {json.dumps(result)}\nanother warning\n"
    assert checks.parse(finished(text)) == result
    crashed = checks.parse(finished("CUDA error", code=-6))
    assert (crashed["state"], crashed["reason"]) == (FAILED, "crash, exit code -6: CUDA error")
    assert checks.parse(finished("", timed_out=True))["reason"] == "timeout"


def raising(error):
    def check(*_):
        raise error

    return check


@pytest.mark.parametrize(
    ("check", "state", "reason"),
    [
        (lambda: "3 problems", PASSED, "3 problems"),
        (raising(SkippedError("there is one device")), SKIPPED, "there is one device"),
        (raising(AssertionError("out differs")), FAILED, "AssertionError: out differs"),
    ],
)
def test_what_becomes_of_a_check(monkeypatch, check, state, reason):
    monkeypatch.setitem(checks.CHECKS, "it", check)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    result = checks.make("it")
    assert (result["state"], result["reason"]) == (state, reason)
    outcome = checks.judge({"it": result})
    assert outcome.state == (FAILED if state == FAILED else PASSED)


def test_checks_of_values_pass_on_the_cpu():
    assert values.network_shapes((TINY,), (2,), "cpu") == "6 problems"
    assert values.network_gradients((TINY,), "cpu") == "6 problems"
    few = values.sequences_and_volumes(values.OTHER_DIMENSIONS[:1], "cpu")
    assert few == "12 forwards and backwards"
    assert "1,440 elements" in values.more_than_31_bits(TINY, 1000, "cpu")
    assert values.repeated((TINY,), 2, "cpu") == "forward and backward, 3 problems"


def test_checks_of_values_can_fail(monkeypatch):
    calls = []

    def drifting(x, weights):
        calls.append(1)
        return x * len(calls)

    monkeypatch.setattr(values, "run", drifting)
    monkeypatch.setattr(values, "train", lambda x, weights, grad: [grad, drifting(x, weights)])
    with pytest.raises(AssertionError, match="off by"):
        values.network_shapes((TINY,), (1,), "cpu")
    with pytest.raises(AssertionError, match="off by"):
        values.sequences_and_volumes(device="cpu")
    with pytest.raises(AssertionError, match="off by"):
        values.more_than_31_bits(TINY, 1000, "cpu")
    with pytest.raises(AssertionError, match="run 0, result 1: 1920 of 1920 values"):
        values.repeated((TINY,), 1, "cpu")


def test_a_wrong_gradient_fails(monkeypatch):
    gradients = inputs.cases.gradients

    def wrong(backend, leaves, grad):
        out, dx, *others = gradients(backend, leaves, grad)
        return [out, dx if backend == "reference" else 2 * dx, *others]

    monkeypatch.setattr(inputs.cases, "gradients", wrong)
    with pytest.raises(AssertionError, match="x: off by"):
        values.network_gradients((TINY,), "cpu")
    with pytest.raises(AssertionError, match=r"sequence, torch\.float32, contiguous, x: off by"):
        values.sequences_and_volumes(device="cpu")
    with pytest.raises(AssertionError, match="sample 0, contiguous, x: off by"):
        values.more_than_31_bits(TINY, 1000, "cpu")


def test_memory_is_asked_for_before_each_large_tensor(monkeypatch):
    seen, left = [], [1]

    def empty(size, **options):
        if not left:
            raise torch.cuda.OutOfMemoryError
        left.pop()
        seen.append(size)

    monkeypatch.setattr(values.torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("given back"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (12 * 10**9, 40 * 10**9))
    monkeypatch.setattr(values, "_samples_right", lambda shape, layout, *_: seen.append(layout))
    with pytest.raises(SkippedError, match="26 GB are needed, 12 are free"):
        values.more_than_31_bits()
    assert seen == ["given back", 6 * 2676 * 802816 * 2, "contiguous", "given back"]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", inputs.cases.NATIVE_LAYOUTS)
def test_sequences_and_volumes_have_resident_plans(layout, backward):
    """Or under that strategy the check would be of nothing."""
    held = set()
    for case in values.OTHER_DIMENSIONS:
        with contextlib.suppress(ValueError):
            plan_of(case, torch.float16, layout, backward=backward)
            held.add(len(case.shape))
    assert held == {3, 5}


class Recorded:
    """Stands for a CUDA graph."""

    def __init__(self, replay):
        self.replay = replay


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda x, out: out.copy_(2 * x), None),
        (lambda x, out: None, "the replay changed nothing"),
        (lambda x, out: out.copy_(3 * x), "replay 0, result 0: 6 of 6 values differ"),
    ],
)
def test_replays_are_compared_with_calls(monkeypatch, work, message):
    x, grad = torch.ones(2, 3), torch.ones(2, 3)
    out = 2 * x
    monkeypatch.setattr(capture, "captured", lambda call: (Recorded(lambda: work(x, out)), [out]))
    if message is None:
        capture._check("", lambda: [2 * x], x, grad)
    else:
        with pytest.raises(AssertionError, match=message):
            capture._check("", lambda: [2 * x], x, grad)


def test_every_check_is_made_under_each_strategy(monkeypatch):
    names = list(checks.CHECKS)
    assert "forward in a CUDA graph, streaming" in names[: len(names) // 2]
    assert "forward in a CUDA graph, resident" in names[len(names) // 2 :]
    monkeypatch.setattr(values, "train", lambda *_: [torch.tensor(0)])
    monkeypatch.setattr(values, "draw", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(values, "draw_weights", lambda *_: None)
    monkeypatch.setattr(values, "_disturb", lambda: seen.add(os.environ[strategies.VARIABLE]))
    for strategy in strategies.STRATEGIES:
        seen = set()
        assert checks.make(f"100 runs, equal to the bit, {strategy}")["state"] == PASSED
        assert seen == {strategy}


def test_a_strategy_is_forced_for_a_while(monkeypatch):
    monkeypatch.setenv(strategies.VARIABLE, "auto")
    with contextlib.suppress(KeyError), strategies.forced("resident"):
        assert os.environ[strategies.VARIABLE] == "resident"
        raise KeyError
    assert os.environ[strategies.VARIABLE] == "auto"
    monkeypatch.delenv(strategies.VARIABLE)
    with strategies.forced("streaming"):
        assert os.environ[strategies.VARIABLE] == "streaming"
    assert strategies.VARIABLE not in os.environ


IMPOSSIBLE = "strategy: expected one that is possible, got resident: too large"


@pytest.mark.skipif(why_not("emulated") is not None, reason="make emulator builds it")
def test_what_the_operators_say_where_there_is_no_plan():
    """Of a sample that is too large, and of a backward for the weights alone."""
    tally, block = strategies.Tally(), cbam_cuda.CBAM(2, ratio=1, backend="emulated")
    with strategies.forced("streaming"):
        out = block(torch.ones(1, 2, 3, 3))
    with tally.problem("forward"), strategies.forced("resident"):
        block(torch.zeros(1, 2, 4096, 4096))
    with tally.problem("backward"), strategies.forced("resident"):
        out.sum().backward()
    assert tally.left_out == ["forward", "backward"]


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_problems_without_a_plan_are_named(monkeypatch, kind):
    run = values.run
    no_plan = raising(kind(IMPOSSIBLE))
    monkeypatch.setattr(values, "run", lambda x, w: (no_plan if len(x) == 2 else run)(x, w))
    said = values.network_shapes((TINY,), (1, 2), "cpu")
    assert said.startswith("6 problems, no resident plan for 6: (2, 8, 6, 5), torch.float32, cont")
    with pytest.raises(SkippedError, match=r"no resident plan for 6: \(2, 8"):
        values.network_shapes((TINY,), (2,), "cpu")
    monkeypatch.setattr(values, "run", raising(RuntimeError("CUDA error")))
    with pytest.raises(RuntimeError, match="CUDA error"):
        values.network_shapes((TINY,), (2,), "cpu")


def test_long_reasons_are_in_the_report_in_full():
    reason = "6 problems, no resident plan for 6: " + "; ".join(f"shape {i}" for i in range(40))
    found = {"checks": {"it": {"state": PASSED, "reason": reason, "seconds": 1.0}}}
    lines = list(report.SECTIONS["checks"](found))
    assert f"- it: {reason}" in lines
    assert reason not in lines[2]


STREAMED = [f"cbam::{name}" for name in ("pool", "hidden", "gate", "maps", "scale")]
STREAMED_BACKWARD = [
    f"cbam::{name}" for name in ("cross", "stencil", "terms", "gate", "hidden", "dx")
]
SUMS = ["cbam::outer", "cbam::vectors"]
RAN = {
    ("forward", "streaming"): STREAMED,
    ("forward", "resident"): ["cbam::resident_forward_kernel"],
    ("backward", "streaming"): [*STREAMED_BACKWARD, *SUMS],
    ("backward", "resident"): ["cbam::resident_backward_kernel", *SUMS],
}


def fake_plan(shape, dtype, device, strategy, backward):
    streamed = STREAMED_BACKWARD if backward else STREAMED
    stages = streamed if strategy == "streaming" else ["resident"]
    return {"stages": stages, "group": 8, "summing_launches": len(SUMS) if backward else 0}


@pytest.mark.parametrize(
    ("ran", "message"),
    [
        ({}, None),
        ({("forward", "resident"): STREAMED}, "forward .* resident: ran cbam::pool"),
        ({("forward", "streaming"): STREAMED[1:]}, "forward .*streaming: 4 kernels, 5 planned"),
        ({("forward", "streaming"): ["resident_forward"] * 5}, "streaming: ran resident_forward"),
        ({("backward", "resident"): RAN["backward", "streaming"]}, "backward .*: ran cbam::cross"),
        ({("backward", "resident"): ["resident_backward"]}, "resident: 1 kernels, 3 planned"),
        ({("backward", "resident"): ["resident_forward", *SUMS]}, "resident: ran resident_forward"),
        ({("backward", "streaming"): STREAMED_BACKWARD}, "streaming: 6 kernels, 8 planned"),
        ({("backward", "resident"): [*RAN["backward", "resident"], "cast"]}, r"4 .* \['cast'\]"),
    ],
)
def test_kernels_that_ran_are_compared_with_the_plan(monkeypatch, ran, message):
    called = []

    def kernels(call):
        call()
        return (RAN | ran)[called[-1], os.environ[strategies.VARIABLE]]

    monkeypatch.setattr(launches, "plan", fake_plan)
    monkeypatch.setattr(launches, "kernels", kernels)
    monkeypatch.setattr(launches, "run", lambda *_: called.append("forward"))
    monkeypatch.setattr(launches, "operator_backward", lambda *_: called.append("backward"))
    if message is None:
        assert launches.as_planned((TINY,), (1, 8), "cpu") == "16 forwards and backwards"
    else:
        with pytest.raises(AssertionError, match=message):
            launches.as_planned((TINY,), (1,), "cpu")


def test_kernels_of_every_group_are_counted(monkeypatch):
    monkeypatch.setattr(launches, "plan", fake_plan)
    x = torch.zeros(17, 1)
    launches._check("", STREAMED * 3, x, "forward", "streaming")
    launches._check("", STREAMED_BACKWARD * 3 + SUMS, x, "backward", "streaming")
    with pytest.raises(AssertionError, match="10 kernels, 15 planned"):
        launches._check("", STREAMED * 2, x, "forward", "streaming")


class Event(NamedTuple):
    """What the profiler has seen."""

    name: str
    device_type: DeviceType = DeviceType.CUDA


class Profiler(contextlib.nullcontext):
    """Stands for torch's."""

    def __init__(self, activities):
        super().__init__(self)

    def events(self):
        host = Event("cudaLaunchKernel", DeviceType.CPU)
        return [host, Event("pool_kernel"), Event("Memcpy DtoD"), Event("Memset (Device)")]


def test_kernels_are_told_from_what_else_the_profiler_sees(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(launches, "profile", Profiler)
    calls = []
    assert launches.kernels(lambda: calls.append(1)) == ["pool_kernel"]
    assert calls == [1]


def test_where_no_kernels_are_seen_none_are_compared(monkeypatch):
    monkeypatch.setattr(launches, "kernels", lambda call: [])
    with pytest.raises(SkippedError, match="the profiler sees no kernels"):
        launches.as_planned((TINY,), (1,), "cpu")
