"""What ``python -m benchmarks.gpu`` times, and how, as far as a CPU can run it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import pytest
import torch
import torch._functorch.config
from test_gpu_timings import IMPOSSIBLE, Ticks

from benchmarks.contestants import make_block
from benchmarks.gpu import calls, inputs, measure, problems, rows, strategies, timings
from benchmarks.problems import Problem
from benchmarks.stamp import ROOT

PROBLEM = Problem((2, 32, 6, 5), torch.float32, "channels_last")
FORCED = {"cuda streaming", "cuda resident"}


def test_inputs_of_a_sample_are_larger_than_the_cache():
    cache = 50 * 2**20
    for row in timings.problems():
        count = problems.buffers(row, cache)
        assert 1 <= count <= problems.GRAPH_CALLS
        assert count == problems.GRAPH_CALLS or count * row.bytes >= 2 * cache


def test_contestants_compute_the_same():
    contestants = problems.Contestants(PROBLEM, 3, ["eager"], device="cpu")
    forward, backward, step = (contestants.calls[d] for d in ("forward", "backward", "step"))
    assert set(forward) == set(backward) == {"copy", "eager", *FORCED}
    assert set(step) == {"copy", "eager", "fused"}
    for i in (0, 1, 2, 0):
        for name in FORCED:
            with torch.no_grad():
                torch.testing.assert_close(forward[name](i), forward["eager"](i))
            assert_gradients(backward[name](i), step["eager"](i)[1])
        assert_gradients(backward["eager"](i), step["eager"](i)[1])
        torch.testing.assert_close(step["fused"](i), step["eager"](i))


def assert_gradients(found, expected):
    """x's and those of all weights; the operator leaves these in shapes of its own."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.view(other.shape), other)


def test_copies_move_what_must_be_moved():
    contestants = problems.Strategies(PROBLEM, 2, device="cpu")
    xs, grads = contestants.buffers
    copy = {direction: found["copy"] for direction, found in contestants.calls.items()}
    for i in range(2):
        assert torch.equal(copy["forward"](i), xs[i])
        assert torch.equal(copy["backward"](i), xs[i] * grads[i])
    results = copy["forward"](0), copy["backward"](0)
    for result in results:
        result.zero_()
    copy["step"](0)
    assert torch.equal(results[0], xs[0])
    assert torch.equal(results[1], xs[0] * grads[0])
    assert len({t.data_ptr() for t in (*xs, *grads, *results)}) == 6


@pytest.fixture
def with_compile(monkeypatch):
    """Makes contestants, given what makes a compiled block of the plain one."""

    def contestants(compiled):
        def made(name, *sizes):
            block = make_block("eager" if name == "compile" else name, *sizes)
            return compiled(block) if name == "compile" else block

        monkeypatch.setattr(problems, "make_block", made)
        return problems.Contestants(PROBLEM, 2, ["eager", "compile"], device="cpu")

    with torch._functorch.config.patch(donated_buffer=True):  # as a process begins
        yield contestants


def test_a_compiled_backward_runs_more_than_once(with_compile):
    torch.compiler.reset()
    contestants = with_compile(lambda eager: torch.compile(eager, backend="aot_eager"))
    assert contestants.missing == {"forward": {}, "backward": {}, "step": {}}
    backward = contestants.calls["backward"]
    for i in (0, 1, 0):
        torch.testing.assert_close(backward["compile"](i), backward["eager"](i))


def test_contestants_are_made_in_a_process_of_their_own():
    """This one has imported more of torch than those that take times."""
    program = f"""\
from benchmarks.gpu import timings
from benchmarks.problems import Problem
from benchmarks.stamp import ROOT
timings.Contestants(Problem({tuple(PROBLEM.shape)}), 1, ["eager"], device="cpu")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


class Compiled(torch.nn.Module):
    """Stands for a compiled block."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


@pytest.mark.parametrize(
    ("broken", "missing"),
    [("backward", {"backward"}), ("forward", set(problems.MAKERS)), ("step", set(problems.MAKERS))],
)
def test_a_compiled_backward_may_be_missing_alone(monkeypatch, with_compile, broken, missing):
    plain = problems.MAKERS[broken]

    def make(block, buffers):
        if isinstance(block, Compiled):
            raise ValueError("no compiler")
        return plain(block, buffers)

    monkeypatch.setitem(problems.MAKERS, broken, make)
    contestants = with_compile(Compiled)
    for direction, found in contestants.calls.items():
        assert ("compile" in found) == (direction not in missing)
        why = {"compile": "ValueError: no compiler"} if direction in missing else {}
        assert contestants.missing[direction] == why


@pytest.mark.parametrize("possible", [True, False])
def test_each_call_is_forced(possible):
    seen = []

    def call(i):
        seen.append(os.environ[strategies.VARIABLE])
        if seen[-1] == "resident" and not possible:
            raise IMPOSSIBLE

    found, missing = calls.by_strategy(call, strategies.STRATEGIES)
    assert seen == ["streaming", "resident"]
    assert set(found) == FORCED - set(missing)
    assert bool(missing) != possible
    for name, forced in found.items():
        forced(0)
        assert seen[-1] == name.removeprefix("cuda ")


def test_a_backward_without_a_resident_plan_is_missing_alone(monkeypatch):
    backward = inputs.operator_backward

    def impossible(*arguments):
        if os.environ[strategies.VARIABLE] == "resident":
            raise IMPOSSIBLE
        return backward(*arguments)

    monkeypatch.setattr(calls, "operator_backward", impossible)
    found = problems.Strategies(PROBLEM, 1, device="cpu")
    assert found.missing["forward"] == {}
    assert list(found.missing["backward"]) == ["cuda resident"]
    assert set(found.calls["backward"]) == {"copy", "cuda streaming"}


def test_what_a_backward_needs_comes_of_a_strategy_that_is_always_possible(monkeypatch):
    seen = []
    operators = type("Operators", (), {})
    operators.forward_train = lambda *_: seen.append(os.environ[strategies.VARIABLE]) or [0, 1]
    monkeypatch.setattr(torch.ops, "cbam_cuda", operators)
    with strategies.forced("resident"):
        assert inputs.saved_by_forward(torch.zeros(1), ()) == [1]
    assert seen == ["streaming"]


def test_calls_that_break_are_not_called_impossible():
    def call(i):
        raise RuntimeError("CUDA error: too many blocks in cooperative launch")

    with pytest.raises(RuntimeError, match="too many blocks"):
        calls.by_strategy(call, strategies.STRATEGIES)


@pytest.fixture
def rows_on_cpu(monkeypatch):
    device = type("Device", (), {"L2_cache_size": 1})
    on_cpu = problems.Contestants
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(timings, "Contestants", lambda *given: on_cpu(*given, device="cpu"))
    monkeypatch.setattr(timings, "Clock", lambda l2_bytes: Ticks())
    monkeypatch.setattr(measure, "_graph", lambda call, count: lambda: call(0))

    def rows(measured, rivals):
        plain = measure.measure

        def few(calls, count, clock, training, missing):
            return plain(calls, count, clock, training, rounds=1, missing=missing)

        monkeypatch.setattr(
            timings, "measure", lambda *given, **named: measured(few, *given, **named)
        )
        return {row["direction"]: row for row in timings.time_row_and_memory(PROBLEM, rivals)}

    return rows


def test_a_row_a_direction(rows_on_cpu):
    seen = {}

    def measured(plain, calls, count, clock, training, missing):
        seen[tuple(calls)] = training
        return plain(calls, count, clock, training, missing)

    found = rows_on_cpu(measured, ["eager"])
    memory = found["step"]["memory"]
    assert 0 < memory["fused"]["saved_bytes"] < memory["eager"]["saved_bytes"]
    assert list(found) == ["forward", "backward", "step"]
    assert set(found["backward"]["contestants"]) == {"copy", "eager", *FORCED}
    assert "faster" in found["backward"]
    assert "faster" not in found["step"]
    assert seen[tuple(found["step"]["contestants"])]
    assert not seen[tuple(found["forward"]["contestants"])]


def test_the_memory_of_a_rival_that_had_too_little_is_not_taken(rows_on_cpu):
    """It would run out of it again, and the row would be an error."""

    def measured(plain, calls, count, clock, training, missing):
        if training:
            calls = {name: call for name, call in calls.items() if name != "tuned"}
            missing["tuned"] = "OutOfMemoryError: CUDA out of memory"
        return plain(calls, count, clock, training, missing)

    assert set(rows_on_cpu(measured, ["eager", "tuned"])["step"]["memory"]) == {"eager", "fused"}


def test_a_rival_that_is_wrong_is_not_timed():
    contestants = problems.Contestants(PROBLEM, 1, ["eager", "tuned"], device="cpu")
    contestants.leave_out_wrong()
    assert "tuned" in contestants.calls["step"]
    for name in ("tuned", "fused"):
        with torch.no_grad():
            contestants.blocks[name].conv.bias += 1e-3
        if name == "fused":
            with pytest.raises(AssertionError, match="fused, inference: off by"):
                contestants.leave_out_wrong()
            continue
        contestants.leave_out_wrong()
        for direction, found in contestants.calls.items():
            assert name not in found
            assert contestants.missing[direction][name].startswith("AssertionError: tuned")


def test_a_rival_that_breaks_when_it_is_compared_is_not_timed(monkeypatch):
    contestants = problems.Contestants(PROBLEM, 1, ["eager", "tuned"], device="cpu")

    def broken(module, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    contestants.blocks["tuned"].register_forward_pre_hook(broken)
    contestants.leave_out_wrong()
    for direction, found in contestants.calls.items():
        assert "tuned" not in found
        assert contestants.missing[direction]["tuned"] == "OutOfMemoryError: CUDA out of memory"


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


@pytest.mark.parametrize("name", ["eager", "tuned", "fused", "cuda resident"])
def test_a_rival_without_memory_is_missing(monkeypatch, name):
    """Not a row of others, timed in vain; but there is no row without eager and the fused block."""

    def call(i):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(measure, "_graph", lambda call, count: lambda: call(0))
    calls = {"copy": lambda i: None, name: call, "compile": lambda i: None}
    missing = {}
    expected = (
        contextlib.nullcontext() if name == "tuned" else pytest.raises(torch.OutOfMemoryError)
    )
    with expected:
        found = measure.measure(calls, 1, Ticks(), False, missing=missing)
        assert set(found) == {"copy", "compile"}
        assert all("graph" in timing for timing in found.values())
    assert missing == ({"tuned": "OutOfMemoryError: CUDA out of memory"} if name == "tuned" else {})


def test_slow_contestants_get_fewer_rounds():
    class Slow:
        def sample(self, work, calls):
            return 1e6 * measure.MOST_SECONDS

    found = measure.measure({"copy": lambda i: None}, 1, Slow(), False)
    assert found["copy"]["launched"]["samples"] == measure.SAMPLES_A_ROUND


def test_compilation_is_ended():
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"took more than 0.1 s"), problems.at_most(0.1):
        time.sleep(60)
    assert time.monotonic() - begin < 30


def test_compilation_is_ended_though_its_errors_are_caught(monkeypatch):
    monkeypatch.setattr(problems, "LATE_AGAIN", 0.2)
    begin = time.monotonic()

    def compile_on():
        with contextlib.suppress(Exception):
            time.sleep(60)
        time.sleep(60)

    with pytest.raises(TimeoutError), problems.at_most(0.1):
        compile_on()
    assert time.monotonic() - begin < 30


@pytest.fixture
def streams(monkeypatch):
    """Stands for streams: their numbers, the current one last; 0 is the default one."""
    current = [0]

    @contextlib.contextmanager
    def entered(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda: 7)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    return current


def test_graphs_are_recorded_where_all_else_runs(monkeypatch, streams, tmp_path):
    """Or they would miss a backward, which runs on the stream of its forward."""
    replays, recorded = [], []
    graph = type("Graph", (), {"replay": lambda self: replays.append(1)})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(
        torch.cuda, "graph", lambda graph, stream: recorded.append(stream) or torch.no_grad()
    )

    def time_row(wanted, left):
        made = []
        measure._graph(made.append, 2)()
        assert made == [0, 1] * (problems.GRAPH_CALLS // 2)
        return [{"stream": streams[-1]}]

    monkeypatch.setattr(rows.sys, "argv", ["", str(tmp_path), "60"])
    rows.main("timings", ["a", "b"], 1.0, time_row, {"b": "too large"}.get)
    found = rows.Folder(tmp_path).read("timings")
    assert found["rows"] == [{"stream": 7}]
    assert found["skipped"] == [{"name": "b", "reason": "too large"}]
    assert recorded == [7]
    assert len(replays) == 2
