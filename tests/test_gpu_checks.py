"""Checks and timings of ``python -m benchmarks.gpu``, as far as a CPU can run them."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks.gpu import capture, checks, inputs, measure, problems, report, timings, values
from benchmarks.gpu.commands import Finished
from benchmarks.gpu.results import FAILED, PASSED, SKIPPED, Folder, SkippedError
from cbam_cuda import plan as planning

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
    def check():
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
    with pytest.raises(AssertionError, match="sample 0, contiguous, x: off by"):
        values.more_than_31_bits(TINY, 1000, "cpu")


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


def test_rows_cover_what_is_asked_for():
    rows = list(timings.problems())
    assert len(rows) == len(set(rows)) == 48
    assert {row.shape[0] for row in rows} == {1, 8, 32, 256}
    assert {str(row) for row in rows} >= {"32x2048x7x7 bfloat16 channels_last"}


def test_inputs_of_a_sample_are_larger_than_the_cache():
    cache = 50 * 2**20
    for row in timings.problems():
        count = problems.buffers(row, cache)
        assert 1 <= count <= problems.GRAPH_CALLS
        assert count == problems.GRAPH_CALLS or count * row.bytes >= 2 * cache


def test_contestants_compute_the_same():
    problem = problems.Problem((2, 32, 6, 5), torch.float32, "channels_last")
    contestants = problems.Contestants(problem, 3, False, device="cpu")
    forward, step = contestants.calls["forward"], contestants.calls["step"]
    assert set(forward) == set(step) == {"copy", "eager", "fused"}
    for i in range(3):
        with torch.no_grad():
            torch.testing.assert_close(forward["fused"](i), forward["eager"](i))
        torch.testing.assert_close(step["fused"](i), step["eager"](i))
    assert not torch.equal(forward["copy"](0), forward["copy"](1))


class Ticks:
    """Stands for the device's clock."""

    def sample(self, work, calls):
        work()
        return 1.0


@pytest.mark.parametrize("graphs", [True, False])
def test_short_calls_are_also_timed_in_graphs(monkeypatch, graphs):
    def graph(call, count):
        if not graphs:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: call(count - 1)

    monkeypatch.setattr(measure, "_graph", graph)
    seen = []
    found = measure.measure({"copy": seen.append, "fused": seen.append}, 4, Ticks(), False)
    assert set(seen) == {0, 1, 2, 3}
    assert found["fused"]["launched"]["samples"] >= 20
    assert ("graph" in found["copy"], "no_graph" in found["copy"]) == (graphs, not graphs)


def test_slow_contestants_get_fewer_rounds():
    class Slow:
        def sample(self, work, calls):
            return 1e6 * measure.MOST_SECONDS

    found = measure.measure({"copy": lambda i: None}, 1, Slow(), False)
    assert found["copy"]["launched"]["samples"] == measure.SAMPLES_A_ROUND


def one_row(problem, with_compile=False):
    found = {
        name: {"launched": {"median": 40.0, "raw": []}, "graph": {"median": m, "raw": []}}
        for name, m in {"copy": 10.0, "eager": 200.0, "fused": 20.0}.items()
    }
    missing = {"compile": "RuntimeError: no compiler"} if with_compile else {}
    return [timings.describe(problem, "forward", found, 4, missing)]


@pytest.fixture
def planned(monkeypatch):
    """Plans for a device on record, as there is none here."""
    monkeypatch.setattr(
        timings, "plan", lambda shape, dtype, device, **k: planning.plan(shape, dtype, "H200", **k)
    )


ROWS = [problems.Problem((n, *TINY), torch.float16, "contiguous") for n in (32, 1, 8)]


def test_rows_that_do_not_fit_or_fail_are_said(planned):
    kept = []

    def time_row(problem, with_compile):
        assert with_compile == (problem.shape[0] == 32)
        if problem.shape[0] == 1:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return one_row(problem, with_compile)

    def why_not(problem):
        return "does not fit into memory" if problem.shape[0] == 8 else None

    timings.take(ROWS, 100, time_row, why_not, lambda found: kept.append(json.dumps(found)))
    assert not json.loads(kept[0])["ended"]
    outcome = timings.judge(json.loads(kept[-1]), "exit code 0", "")
    assert outcome.state == FAILED
    assert outcome.problems == [
        "1x8x6x5 float16 contiguous: RuntimeError: CUDA error: out of memory"
    ]
    assert outcome.summary == "2 rows, 1 skipped (does not fit into memory)"


def test_rows_after_the_deadline_are_skipped(planned):
    kept = []
    timings.take(ROWS, 1, one_row, lambda problem: None, kept.append)
    outcome = timings.judge(kept[-1], "exit code 0", "")
    assert (outcome.state, outcome.summary) == (PASSED, "0 rows, 3 skipped (no time left)")


def test_rows_of_a_run_that_crashed_are_kept(monkeypatch, tmp_path, planned):
    folder = Folder(tmp_path)

    def crash(command, seconds):
        folder.write("timings", {"rows": one_row(ROWS[0]), "skipped": [], "ended": False})
        return finished("CUDA error", code=-6)

    monkeypatch.setattr(timings, "run", crash)
    outcome = timings.step(100, folder)
    assert (outcome.state, outcome.problems) == (FAILED, ["exit code -6: CUDA error"])
    assert len(outcome.details["rows"]) == 1


def test_compilation_is_ended():
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"took more than 0.1 s"), problems.at_most(0.1):
        time.sleep(60)
    assert time.monotonic() - begin < 30


def test_table_of_timings(planned):
    lines = report.timing_table(one_row(ROWS[0])).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:4] == ["32x8x6x5", "float16", "contiguous", "graph"]
    assert cells[4:11] == ["10.0", "200.0", "-", "20.0", "10.00", "-", "0.50"]
