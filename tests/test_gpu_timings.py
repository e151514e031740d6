"""Timings of ``python -m benchmarks.gpu`` and the sweep, as far as a CPU can run them."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch

from benchmarks.gpu import measure, problems, report, rows, strategies, sweep, tables, timings
from benchmarks.gpu.commands import Finished
from benchmarks.gpu.results import FAILED, PASSED, Folder
from cbam_cuda import plan as planning

TINY = (8, 6, 5)
IMPOSSIBLE = RuntimeError("strategy: expected one that is possible, got resident: too large")


def finished(text, code=0, timed_out=False):
    return Finished(code, text, 12.0, timed_out)


def test_rows_cover_what_is_asked_for():
    wanted = list(timings.problems())
    assert len(wanted) == len(set(wanted)) == 48
    assert {row.shape[0] for row in wanted} == {1, 8, 32, 256}
    assert {str(row) for row in wanted} >= {"32x2048x7x7 bfloat16 channels_last"}


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
    assert set(forward) == {"copy", "eager", "cuda streaming", "cuda resident"}
    assert set(step) == {"copy", "eager", "fused"}
    for i in range(3):
        for name in ("cuda streaming", "cuda resident"):
            with torch.no_grad():
                torch.testing.assert_close(forward[name](i), forward["eager"](i))
        torch.testing.assert_close(step["fused"](i), step["eager"](i))
    assert not torch.equal(forward["copy"](0), forward["copy"](1))


@pytest.mark.parametrize("possible", [True, False])
def test_each_forward_is_forced(possible):
    seen, missing = [], {}

    def call(i):
        seen.append(os.environ[strategies.VARIABLE])
        if seen[-1] == "resident" and not possible:
            raise IMPOSSIBLE

    found = problems._by_strategy(call, missing)
    assert seen == ["streaming", "resident"]
    assert set(found) == {"cuda streaming", "cuda resident"} - set(missing)
    assert bool(missing) != possible
    for name, forced in found.items():
        forced(0)
        assert seen[-1] == name.removeprefix("cuda ")


def test_forwards_that_break_are_not_called_impossible():
    def call(i):
        raise RuntimeError("CUDA error: too many blocks in cooperative launch")

    with pytest.raises(RuntimeError, match="too many blocks"):
        problems._by_strategy(call, {})


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


TIMES = {"copy": 10.0, "eager": 200.0, "cuda streaming": 40.0, "cuda resident": 20.0}


def one_row(problem, left=0.0, **changed):
    """A row of a forward; without those that take no time."""
    times = {name: m for name, m in (TIMES | changed).items() if m}
    found = {n: {"launched": {"median": 2 * m}, "graph": {"median": m}} for n, m in times.items()}
    missing = {name: "RuntimeError: too large" for name in TIMES if name not in times}
    return [rows.describe(problem, "forward", found, 4, missing)]


@pytest.fixture
def planned(monkeypatch):
    """Plans for a device on record, as there is none here."""
    monkeypatch.setattr(
        rows, "plan", lambda shape, dtype, device, **k: planning.plan(shape, dtype, "H200", **k)
    )


ROWS = [problems.Problem((n, *TINY), torch.float16, "contiguous") for n in (32, 1, 8)]


def test_rows_that_do_not_fit_or_fail_are_said(planned):
    kept = []

    def time_row(problem, left):
        assert 90 < left <= 100
        if problem.shape[0] == 1:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return one_row(problem)

    def why_not(problem):
        return "does not fit into memory" if problem.shape[0] == 8 else None

    rows.take(ROWS, 100, 6, time_row, why_not, lambda found: kept.append(json.dumps(found)))
    assert not json.loads(kept[0])["ended"]
    outcome = rows.judge(json.loads(kept[-1]), "exit code 0", "")
    assert outcome.state == FAILED
    assert outcome.problems == [
        "1x8x6x5 float16 contiguous: RuntimeError: CUDA error: out of memory"
    ]
    assert outcome.summary == "2 rows, 1 skipped (does not fit into memory)"


def test_rows_after_the_deadline_are_skipped(planned):
    kept = []
    rows.take(ROWS, 1, 6, one_row, lambda problem: None, kept.append)
    outcome = rows.judge(kept[-1], "exit code 0", "")
    assert (outcome.state, outcome.summary) == (PASSED, "0 rows, 3 skipped (no time left)")
    lines = list(report.SECTIONS["sweep"](outcome.details))
    assert "- 32x8x6x5 float16 contiguous: no time left" in lines


@pytest.mark.parametrize("module", [timings, sweep])
def test_rows_of_a_run_that_crashed_are_kept(monkeypatch, tmp_path, planned, module):
    folder = Folder(tmp_path)
    name = module.__name__.rpartition(".")[2]

    def crash(command, seconds):
        assert command[1:] == ["-m", module.__name__, str(tmp_path), "85"]
        folder.write(name, {"rows": one_row(ROWS[0]), "skipped": [], "ended": False})
        return finished("CUDA error", code=-6)

    monkeypatch.setattr(rows, "run", crash)
    outcome = module.step(100, folder)
    assert (outcome.state, outcome.problems) == (FAILED, ["exit code -6: CUDA error"])
    assert len(outcome.details["rows"]) == 1


def test_compilation_takes_part_for_so_long(monkeypatch):
    seen = []
    monkeypatch.setattr(timings, "time_row", lambda problem, compiled: seen.append(compiled))
    timer = timings.Timer()
    timer(ROWS[0], 200.0)
    timer(ROWS[1], 200.0)
    timer(ROWS[0], timings.COMPILE_SECONDS - 1)
    timer.compiling = timings.COMPILE_SECONDS
    timer(ROWS[0], 200.0)
    assert seen == [True, False, False, False]


def test_compilation_is_ended():
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"took more than 0.1 s"), problems.at_most(0.1):
        time.sleep(60)
    assert time.monotonic() - begin < 30


def cells_of(table, line=2):
    lines = table.splitlines()
    assert len({len(text) for text in lines}) == 1
    return [cell.strip() for cell in lines[line].strip("|").split("|")]


def test_table_of_timings(planned):
    row = one_row(ROWS[0])[0]
    assert row["fraction_of_copy"] == {"cuda streaming": 0.25, "cuda resident": 0.5}
    cells = cells_of(tables.timing_table([{**row, "auto": "resident"}], "forward"))
    assert cells[:4] == ["32x8x6x5", "float16", "contiguous", "graph"]
    assert cells[4:10] == ["10.0", "200.0", "-", "40.0", "20.0", "resident"]
    assert cells[10:14] == ["10.00", "-", "0.25", "0.50"]
    other = cells_of(tables.timing_table([{**row, "auto": "streaming"}], "forward"))
    assert other[9:14] == ["streaming", "5.00", "-", "0.25", "0.50"]


def test_table_of_steps():
    found = {name: {"launched": {"median": 10.0 + i}} for i, name in enumerate(("copy", "fused"))}
    row = rows.describe(ROWS[0], "step", found, 1, {})
    cells = cells_of(tables.timing_table([row], "step"))
    assert cells[3:] == ["launched", "10.0", "-", "-", "11.0", "-", "-", "0.91"]


def test_what_is_kept_of_each_plan(planned):
    row = one_row(ROWS[0])[0]
    for name in ("cuda streaming", "cuda resident"):
        expected = planning.plan(ROWS[0].shape, "float16", "H200", strategy=name[5:])
        kept = row["plans"][name]
        assert kept["predicted_seconds"] == expected["predicted_seconds"]
        speed = expected["device_memory_bytes"] / TIMES[name] / 1e3
        assert kept["gigabytes_per_second"] == pytest.approx(speed)
    assert row["auto"] == planning.plan(ROWS[0].shape, "float16", "H200")["strategy"]


def test_rows_without_a_plan_keep_their_times(monkeypatch):
    def plan(*_, **__):
        raise ValueError("no such device")

    monkeypatch.setattr(rows, "plan", plan)
    (row,) = one_row(ROWS[0])
    assert row["missing"] == {"plan": "ValueError: no such device"}
    assert cells_of(tables.timing_table([row], "forward"))[8:10] == ["20.0", "-"]
    assert cells_of(tables.sweep_table([row]))[6:] == ["20.0", "resident", "-", "-", "-", "-"]


def test_cells_of_the_sweep():
    cells = list(sweep.cells())
    assert len(cells) == len(set(cells)) == 9 * 4 * 2
    assert {cell.layout for cell in cells} == {"contiguous"}
    assert {cell.shape[0] for cell in cells} == {2**k for k in range(9)}


def test_a_cell_of_the_sweep(monkeypatch, planned):
    device = type("Device", (), {"L2_cache_size": 2**16})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    on_cpu = problems.forwards
    monkeypatch.setattr(sweep, "forwards", lambda problem, count: on_cpu(problem, count, "cpu"))
    monkeypatch.setattr(sweep, "Clock", lambda l2_bytes: Ticks())
    monkeypatch.setattr(measure, "_graph", lambda call, count: lambda: call(0))
    (row,) = sweep.time_cell(problems.Problem((1, 16, 6, 5), torch.float32, "contiguous"), 30.0)
    assert set(row["contestants"]) == {"copy", "cuda streaming", "cuda resident"}
    timing = row["contestants"]["cuda resident"]["graph"]
    assert timing["samples"] == sweep.ROUNDS * measure.SAMPLES_A_ROUND
    assert (row["missing"], row["direction"], row["layout"]) == ({}, "forward", "contiguous")


def test_table_of_the_sweep(planned):
    fast = one_row(ROWS[0])[0] | {"auto": "streaming"}
    slow = one_row(ROWS[2], **{"cuda resident": 50.0})[0] | {"auto": "streaming"}
    alone = one_row(ROWS[1], **{"cuda resident": 0.0})[0]
    table = tables.sweep_table([fast, alone, slow])
    assert [cells_of(table, 2 + i)[2] for i in range(3)] == ["1", "8", "32"]
    head = ["8x6x5", "float16", "32", "graph", "10.0", "40.0", "20.0", "resident", "streaming"]
    assert cells_of(table, 4)[:10] == [*head, "2.00"]
    for strategy, cell in zip(strategies.STRATEGIES, cells_of(table, 4)[10:], strict=True):
        seconds = planning.plan(ROWS[0].shape, "float16", "H200", strategy=strategy)
        assert cell == f"{seconds['predicted_seconds'] * 1e6:.1f}"
    assert cells_of(table, 3)[5:10] == ["40.0", "50.0", "streaming", "streaming", "1.00"]
    assert cells_of(table)[5:8] == ["40.0", "-", "streaming"]
    found = {"rows": [fast, slow, alone, {"name": "x", "error": "out of memory"}]}
    lines = "\n".join(report.SECTIONS["sweep"](found))
    assert table in lines
    assert "- cuda resident is missing: RuntimeError: too large" in lines


def test_what_the_sweep_says_of_the_choice(monkeypatch, tmp_path, planned):
    folder = Folder(tmp_path)
    right, wrong = ({**one_row(ROWS[0])[0], "auto": auto} for auto in strategies.STRATEGIES[::-1])

    def work(command, seconds):
        folder.write("sweep", {"rows": [right, wrong], "skipped": [], "ended": True})
        return finished("")

    monkeypatch.setattr(rows, "run", work)
    outcome = sweep.step(60, folder)
    assert outcome.state == PASSED
    assert outcome.summary == "2 rows; resident is faster in 2, auto picks the faster in 1"
