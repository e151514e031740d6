"""Rows of timings of ``python -m benchmarks.gpu``: which, what is kept of them, and tables."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import rows as all_rows
from benchmarks import variants
from benchmarks.gpu import network, report, rows, sweep, tables, timings
from benchmarks.gpu import variants as variants_on_gpu
from benchmarks.gpu.commands import Finished
from benchmarks.outcome import FAILED, PASSED, Folder
from benchmarks.problems import Problem, in_stages
from cbam_cuda import plan as planning

TINY = (8, 6, 5)
IMPOSSIBLE = ValueError("strategy: expected one that is possible, got resident: too large")


def finished(text, code=0, timed_out=False):
    return Finished(code, text, 12.0, timed_out)


def test_rows_cover_what_is_asked_for():
    wanted = list(timings.problems())
    assert len(wanted) == len(set(wanted)) == 48
    assert {row.shape[0] for row in wanted} == {1, 8, 32, 256}
    assert {str(row) for row in wanted} >= {"32x2048x7x7 bfloat16 channels_last"}
    # What is compared to all that others make of it, then what no other step times.
    sizes = [(row.shape[0], row.dtype.itemsize) for row in wanted[:16]]
    assert list(dict.fromkeys(sizes)) == [(32, 2), (256, 2), (1, 2), (256, 4)]


class Ticks:
    """Stands for the device's clock."""

    def sample(self, work, calls):
        work()
        return 1.0


TIMES = {"copy": 10.0, "eager": 200.0, "cuda streaming": 40.0, "cuda resident": 20.0}


def one_row(problem, left=0.0, direction="forward", **changed):
    """A row of one direction; without those that take no time."""
    times = {name: m for name, m in (TIMES | changed).items() if m}
    found = {n: {"launched": {"median": 2 * m}, "graph": {"median": m}} for n, m in times.items()}
    missing = {name: "RuntimeError: too large" for name in TIMES if name not in times}
    return [rows.describe(problem, direction, found, 4, missing)]


def plan_on_record(shape, dtype, device, **options):
    """For a device on record, as there is none here."""
    return planning.plan(shape, dtype, "H200", **options)


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr(rows, "plan", plan_on_record)


ROWS = [Problem((n, *TINY), torch.float16, "contiguous") for n in (32, 1, 8)]


def test_rows_that_do_not_fit_or_fail_are_said(planned):
    kept = []

    def time_row(problem, left):
        assert 90 < left <= 100
        if problem.shape[0] == 1:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return one_row(problem)

    def why_not(problem):
        return "does not fit into memory" if problem.shape[0] == 8 else None

    all_rows.take(ROWS, 100, 6, time_row, why_not, lambda found: kept.append(json.dumps(found)))
    assert not json.loads(kept[0])["ended"]
    outcome = rows.judge(json.loads(kept[-1]), "exit code 0", "")
    assert outcome.state == FAILED
    assert outcome.problems == [
        "1x8x6x5 float16 contiguous: RuntimeError: CUDA error: out of memory"
    ]
    assert outcome.summary == "2 rows, 1 skipped (does not fit into memory)"


def test_rows_after_the_deadline_are_skipped(planned):
    kept = []
    all_rows.take(ROWS, 1, 6, one_row, lambda problem: None, kept.append)
    outcome = rows.judge(kept[-1], "exit code 0", "")
    assert (outcome.state, outcome.summary) == (PASSED, "0 rows, 3 skipped (no time left)")
    lines = list(report.SECTIONS["sweep"](outcome.details))
    assert "- 32x8x6x5 float16 contiguous: no time left" in lines


@pytest.mark.parametrize("module", [timings, network, sweep])
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
    monkeypatch.setattr(timings, "time_row", lambda problem, rivals: seen.append(rivals))
    timer = timings.Timer()
    timer(ROWS[0], 200.0)
    timer(ROWS[1], 200.0)
    timer(ROWS[0], timings.COMPILE_SECONDS - 1)
    timer.compiling = timings.COMPILE_SECONDS
    timer(ROWS[0], 200.0)
    plain = ["eager", "tuned"]
    assert seen == [[*plain, "max-autotune"], ["eager"], plain, plain]


def cells_of(table, line=2):
    lines = table.splitlines()
    assert len({len(text) for text in lines}) == 1
    return [cell.strip() for cell in lines[line].strip("|").split("|")]


@pytest.mark.parametrize("direction", rows.ALONE)
def test_table_of_timings(planned, direction):
    row = one_row(ROWS[0], direction=direction)[0]
    assert row["fraction_of_copy"] == {"cuda streaming": 0.25, "cuda resident": 0.5}
    cells = cells_of(tables.timing_table([{**row, "auto": "resident"}], direction))
    assert cells[:4] == ["32x8x6x5", "float16", "contiguous", "graph"]
    assert cells[4:11] == ["10.0", "200.0", "-", "-", "40.0", "20.0", "resident"]
    assert cells[11:16] == ["10.00", "-", "-", "0.25", "0.50"]
    speed = row["plans"]["cuda resident"]["gigabytes_per_second"]
    assert cells[16] == f"{speed:.0f}"
    other = cells_of(tables.timing_table([{**row, "auto": "streaming"}], direction))
    assert other[10:16] == ["streaming", "5.00", "-", "-", "0.25", "0.50"]


def test_table_of_steps():
    found = {name: {"launched": {"median": 10.0 + i}} for i, name in enumerate(("copy", "fused"))}
    row = rows.describe(ROWS[0], "step", found, 1, {})
    cells = cells_of(tables.timing_table([row], "step"))
    assert cells[3:] == ["launched", "10.0", *"---", "11.0", *"---", "0.91"]


LARGE = Problem((32, 512, 28, 28), torch.float16, "channels_last")


@pytest.mark.parametrize("direction", rows.ALONE)
def test_what_is_kept_of_each_plan(monkeypatch, direction):
    asked = []

    def plan(*given, strategy="auto", **options):
        asked.append(options)
        return plan_on_record(*given, strategy=strategy, **options)

    monkeypatch.setattr(rows, "plan", plan)
    row = one_row(LARGE, direction=direction)[0]
    kind = {"channels_last": True, "backward": direction == "backward"}
    assert asked == [kind] * 3
    for name in ("cuda streaming", "cuda resident"):
        expected = planning.plan(LARGE.shape, "float16", "H200", strategy=name[5:], **kind)
        kept = row["plans"][name]
        assert kept["predicted_seconds"] == expected["predicted_seconds"]
        speed = expected["device_memory_bytes"] / TIMES[name] / 1e3
        assert kept["gigabytes_per_second"] == pytest.approx(speed)
    assert row["auto"] == planning.plan(LARGE.shape, "float16", "H200", **kind)["strategy"]
    passes = {"forward": 2, "backward": 3}[direction]
    speed = passes * LARGE.bytes / TIMES["copy"] / 1e3
    assert row["copy_gigabytes_per_second"] == pytest.approx(speed)


def test_report_of_timings(planned):
    found = [one_row(ROWS[0], direction=d, **{"cuda resident": 0.0})[0] for d in rows.ALONE]
    found[0]["contestants"]["eager"]["no_graph"] = "operation not permitted"
    lines = list(report.SECTIONS["timings"]({"rows": found}))
    titles = [line for line in lines if line.startswith("## ")]
    assert titles == ["## Targets", "## Forward", "## Backward"]
    assert tables.timing_table(found[1:], "backward") in lines
    missing = "cuda resident is missing: RuntimeError: too large"
    assert [line for line in lines if line.startswith("- ")] == [
        f"- Forward: {missing}",
        "- Forward: eager is not in a graph: operation not permitted",
        f"- Backward: {missing}",
    ]


def test_rows_without_a_plan_keep_their_times(monkeypatch):
    def plan(*_, **__):
        raise ValueError("no such device")

    monkeypatch.setattr(rows, "plan", plan)
    (row,) = one_row(ROWS[0])
    assert row["missing"] == {"plan": "ValueError: no such device"}
    assert cells_of(tables.timing_table([row], "forward"))[9:11] == ["20.0", "-"]
    assert cells_of(tables.sweep_table([row]))[6:] == ["20.0", "resident", *"-----"]


def test_rows_of_variants(monkeypatch):
    def medians(problem, device, mode, seconds):
        assert device.type == "cuda"
        return {"plain": 60.0, "fused": 20.0 if mode.training else 15.0, "fused without": 10.0}

    monkeypatch.setattr(variants, "medians", medians)
    (problem, *_) = in_stages(32)
    found = variants_on_gpu.take(problem, 10.0)
    assert [row["mode"] for row in found] == list(variants.MODES)
    found.append({"name": "32x2048x7x7 float32 contiguous", "error": "out of memory"})
    text = "\n".join(report.SECTIONS["variants"]({"rows": found}))
    assert all(f"| {mode} " in text for mode in variants.MODES)
    for ratio in ("4.00", "3.00"):
        assert text.count(ratio) == 4  # of both rows, and their means
    assert "7x7" not in text  # the summary of the step says why
    assert next(iter(report.SECTIONS["variants"]({}))).startswith("## ")
