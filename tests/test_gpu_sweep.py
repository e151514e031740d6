"""The sweep of ``python -m benchmarks.gpu`` over batches, as far as a CPU can run it."""

from __future__ import annotations

import pytest
import torch
from test_gpu_timings import ROWS, Ticks, cells_of, finished, one_row, plan_on_record

from benchmarks.gpu import measure, problems, report, rows, strategies, sweep, tables, ways
from benchmarks.outcome import Folder
from benchmarks.problems import Problem
from cbam_cuda import plan as planning


@pytest.fixture(autouse=True)
def _planned(monkeypatch):
    monkeypatch.setattr(rows, "plan", plan_on_record)


def test_cells_of_the_sweep():
    cells = list(sweep.cells())
    assert len(cells) == len(set(cells)) == 9 * 4 * 2
    assert {cell.layout for cell in cells} == {"contiguous"}
    assert {cell.shape[0] for cell in cells} == {2**k for k in range(9)}


def test_a_cell_of_the_sweep(monkeypatch):
    device = type("Device", (), {"L2_cache_size": 2**16})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    problem = Problem((1, 16, 6, 6), torch.float32, "contiguous")
    made = []

    def make(problem, count, more):
        assert set(more.values()) <= {("resident-pixels",), ("resident-channels",)}
        made.append(problems.Strategies(problem, count, "cpu", more))
        return made[0]

    monkeypatch.setattr(sweep, "Strategies", make)
    plain, timed = measure.measure, []

    def measured(calls, *given, **options):
        timed.append(calls)
        return plain(calls, *given, **options)

    monkeypatch.setattr(sweep, "measure", measured)
    monkeypatch.setattr(sweep, "buffers", lambda *given: 2)
    monkeypatch.setattr(sweep, "Clock", lambda l2_bytes: Ticks())
    monkeypatch.setattr(measure, "_graph", lambda call, count: lambda: call(0))
    found = sweep.time_cell(problem, 30.0)
    assert timed == [made[0].calls["forward"], made[0].calls["backward"]]
    assert [row["direction"] for row in found] == ["forward", "backward"]
    for row in found:
        plan = planning.plan(
            problem.shape,
            "float32",
            "H200",
            strategy="resident",
            backward=row["direction"] == "backward",
        )
        held = plan["passes"]["resident"]["split"]
        (other,) = {"cuda resident-pixels", "cuda resident-channels"} - {f"cuda resident-{held}"}
        assert set(row["contestants"]) == {"copy", "cuda streaming", "cuda resident", other}
        assert row["plans"][other]["passes"]["resident"]["split"] != held
        timing = row["contestants"]["cuda resident"]["graph"]
        assert timing["samples"] == sweep.ROUNDS * measure.SAMPLES_A_ROUND
        assert (row["missing"], row["layout"]) == ({}, "contiguous")
    streaming = [row["plans"]["cuda streaming"]["passes"] for row in found]
    assert list(streaming[0]) != list(streaming[1])


@pytest.mark.parametrize("direction", rows.ALONE)
def test_the_other_split(direction):
    def other(*shape):
        return sweep.other_split(Problem(shape, torch.float16, "contiguous"), direction)

    assert other(256, 256, 56, 56) in (("resident-pixels",), ("resident-channels",))
    assert other(256, 2048, 7, 7) == ()  # an image of no whole vectors
    assert other(1, 64, 4096, 4096) == ()  # no sample fits on the chip


@pytest.mark.parametrize("direction", rows.ALONE)
def test_ways_to_hold_samples(direction):
    problem = Problem((64, 512, 28, 28), torch.float16, "contiguous")
    found = ways.ways(problem, direction)
    assert len(set(found)) == len(found) > 10
    plans = [rows.planned(problem, direction, name) for name in found]
    held = [plan["passes"]["resident"] for plan in plans]
    assert len({str(geometry) for geometry in held}) == len(found)
    assert {geometry["kind"] for geometry in held} == {"cluster", "grid"}
    for geometry in held:  # of teams that come back, both
        other = geometry | {"fetches_ahead": not geometry["fetches_ahead"]}
        assert (other in held) == (geometry["teams"] * geometry["samples"] < 64)
    best = rows.planned(problem, direction, "resident")
    assert best["passes"]["resident"] in held
    longest = ways.LIMIT * best["predicted_seconds"]
    assert all(plan["predicted_seconds"] <= longest for plan in plans)
    assert ways.ways(Problem((1, 64, 4096, 4096), torch.float16, "contiguous"), direction) == []


def test_cells_of_all_ways(monkeypatch):
    asked = []
    monkeypatch.setattr(ways, "ways", lambda problem, direction: [f"{problem}, {direction}"])
    monkeypatch.setattr(sweep, "time_strategies", lambda *given: asked.append(given))
    ways.time_cell("a problem", 30.0)
    more = {direction: [f"a problem, {direction}"] for direction in rows.ALONE}
    assert asked == [("a problem", more)]


@pytest.mark.parametrize("direction", rows.ALONE)
def test_table_of_the_sweep(direction):
    fast = one_row(ROWS[0], direction=direction, **{"cuda resident-channels": 30.0})[0]
    fast |= {"auto": "streaming"}
    slow = one_row(ROWS[2], direction=direction, **{"cuda resident": 50.0})[0]
    slow |= {"auto": "streaming"}
    alone = one_row(ROWS[1], direction=direction, **{"cuda resident": 0.0})[0]
    table = tables.sweep_table([fast, alone, slow])
    assert [cells_of(table, 2 + i)[2] for i in range(3)] == ["1", "8", "32"]
    head = ["8x6x5", "float16", "32", "graph", "10.0", "40.0", "20.0", "resident", "streaming"]
    assert cells_of(table, 4)[:10] == [*head, "2.00"]
    backward = direction == "backward"
    for strategy, cell in zip(strategies.STRATEGIES, cells_of(table, 4)[10:12], strict=True):
        plan = planning.plan(ROWS[0].shape, "float16", "H200", strategy=strategy, backward=backward)
        assert cell == f"{plan['predicted_seconds'] * 1e6:.1f}"
    assert [cells_of(table, 2 + i)[12] for i in range(3)] == ["-", "-", "30.0"]
    assert cells_of(table, 3)[5:10] == ["40.0", "50.0", "streaming", "streaming", "1.00"]
    assert cells_of(table)[5:8] == ["40.0", "-", "streaming"]


def test_report_of_the_sweep():
    forward, backward = (one_row(ROWS[0], direction=d)[0] for d in rows.ALONE)
    alone = one_row(ROWS[1], direction="backward", **{"cuda resident": 0.0})[0]
    found = {"rows": [forward, backward, alone, {"name": "x", "error": "out of memory"}]}
    lines = list(report.SECTIONS["sweep"](found))
    for title, of in (("Forward", [forward]), ("Backward", [backward, alone])):
        assert lines[lines.index(f"### {title}") + 2] == tables.sweep_table(of)
    assert "- Backward: cuda resident is missing: RuntimeError: too large" in lines


def test_what_the_sweep_says_of_the_choice(monkeypatch, tmp_path):
    folder = Folder(tmp_path)
    right, wrong = ({**one_row(ROWS[0])[0], "auto": auto} for auto in strategies.STRATEGIES[::-1])
    slow = one_row(ROWS[0], direction="backward", **{"cuda resident": 50.0})[0]
    found = [right, wrong, slow | {"auto": "streaming"}, {"name": "x", "error": "out of memory"}]

    def work(command, seconds):
        folder.write("sweep", {"rows": found, "skipped": [], "ended": True})
        return finished("")

    monkeypatch.setattr(rows, "run", work)
    outcome = sweep.step(60, folder)
    assert outcome.summary == (
        "4 rows; forward: resident is faster in 2 of 2, auto picks the faster in 1; "
        "backward: resident is faster in 0 of 1, auto picks the faster in 1"
    )
