"""``python -m benchmarks`` as a program, with tiny shapes; the guard of CI, and the targets."""

from __future__ import annotations

import json
from io import StringIO

import pytest
import torch
from rich.console import Console
from test_bench_results import TINY, row

from benchmarks import __main__ as bench
from benchmarks import block, guard, plots, problems, progress, targets, variants
from benchmarks.problems import Problem


def small(monkeypatch):
    monkeypatch.setattr(bench, "QUICK", (TINY, TINY._replace(layout="channels_last")))
    monkeypatch.setattr(bench, "in_stages", lambda *_: [TINY])
    monkeypatch.setattr(bench, "QUICK_EACH", 0.01)


def test_end_to_end(monkeypatch, tmp_path, capsys):
    small(monkeypatch)
    folder = bench.main(["--quick", "--compile", "none", "--output", str(tmp_path)]).folder.path
    found = json.loads((folder / "block.json").read_text())
    assert [(r["layout"], r["direction"]) for r in found["rows"]] == [
        (layout, way) for layout in problems.LAYOUTS for way in block.DIRECTIONS
    ]
    assert found["ended"]
    assert f"-{found['environment']['cpu_target']}-threads-" in folder.name
    assert {"commit", "date", "device", "torch", "command"} <= set(found["environment"])
    step = found["rows"][1]
    assert {"copy", "eager", "tuned", "fused"} <= set(step["contestants"])
    assert 0 < step["memory"]["fused"]["saved_bytes"] < step["memory"]["eager"]["saved_bytes"]
    report = (folder / "report.md").read_text()
    printed = capsys.readouterr().out
    assert report in printed
    assert "2x16x6x5 float32 contiguous  step" in printed
    for name in plots.PICTURES:
        if name not in plots.FILES:
            assert (folder / f"{name}.svg").stat().st_size > 5000
            assert f"({name}.svg)" in report


def test_quick_leaves_a_full_run_alone(monkeypatch, tmp_path):
    small(monkeypatch)
    monkeypatch.setattr(bench, "problems", lambda on_gpu: iter([TINY]))
    monkeypatch.setattr(bench.network, "settings", list)
    monkeypatch.setattr(bench, "EACH", 0.01)
    arguments = ["--compile", "none", "--output", str(tmp_path)]
    full = bench.main(arguments).folder.path
    before = {file.name: file.read_bytes() for file in full.iterdir()}
    assert {"block.json", "network.json", "report.md", "speed.svg"} <= set(before)
    quick = bench.main(["--quick", *arguments]).folder.path
    assert quick.name == f"{full.name}-quick"
    assert {file.name: file.read_bytes() for file in full.iterdir()} == before


def test_a_run_forgets_only_what_it_takes(monkeypatch, tmp_path):
    small(monkeypatch)
    arguments = ["--quick", "--compile", "none", "--output", str(tmp_path)]
    folder = bench.main(arguments).folder.path
    failed = {"name": "training", "error": "of an earlier run"}
    (folder / "network.json").write_text(
        json.dumps({"environment": {}, "rows": [failed], "skipped": []})
    )
    before = (folder / "block.json").read_text()
    assert bench.run([*arguments, "--only", "block", "network"]) == 0
    assert (folder / "network.json").exists()
    assert (folder / "block.json").read_text() != before


@pytest.fixture
def ten_seconds_a_row(monkeypatch, tmp_path):
    """By a faked clock, on what passes for a GPU; gives a run of so many seconds."""
    now = [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(bench.facts, "collect", lambda: {"device": "a GPU"})
    monkeypatch.setattr(bench, "too_large", lambda problem: None)

    def time_row(thing, *_):
        now[0] += 10.0
        return [{"name": str(thing), "error": "none"}]

    monkeypatch.setattr(bench.timings, "time_row_and_memory", time_row)
    monkeypatch.setattr(bench.network, "time_setting", time_row)

    def run(seconds):
        options = ["--seconds", str(seconds), "--compile", "none", "--output", str(tmp_path)]
        found = bench.Bench(bench.parse(options), torch.device("cuda"), lambda what, rows: None)
        found.run()
        return found

    return run


def test_large_batches_take_a_gpu_no_longer(ten_seconds_a_row):
    """Their rows are not left out because those of small ones took as long."""
    found = ten_seconds_a_row(200).folder.read("block")["rows"]
    assert len(found) == 17
    assert "256x256x56x56 float16 contiguous" in [row["name"] for row in found]


def test_time_is_kept_for_the_files_after(ten_seconds_a_row):
    """None is begun that would end too late."""
    run = ten_seconds_a_row(100)
    counts = {name: len(run.folder.read(name)["rows"]) for name in run.files}
    assert counts == {"block": 8, "network": 2}
    assert run.folder.read("block")["skipped"][0]["reason"] == "no time left"
    assert run.folder.read("block")["seconds"] == 80.0


def test_rows_before_a_lost_device_are_reported(monkeypatch, tmp_path):
    small(monkeypatch)

    def too_large(problem):
        return None if problem == TINY else 1 / 0

    monkeypatch.setattr(block, "too_large", too_large)
    with pytest.raises(ZeroDivisionError):
        bench.main(["--quick", "--compile", "none", "--output", str(tmp_path)])
    (report,) = tmp_path.glob("*/report.md")
    assert "| 2x16x6x5 | float32 | contiguous |" in report.read_text()


def test_what_the_time_does_not_suffice_for_is_said(monkeypatch, tmp_path):
    small(monkeypatch)
    run = bench.main(["--quick", "--seconds", "1", "--only", "block", "--output", str(tmp_path)])
    folder = run.folder.path
    report = (folder / "report.md").read_text()
    assert "no time left: 2x16x6x5 float32 contiguous, 2x16x6x5 float32 channels_last" in report


def test_rows_say_how_often_processors_were_taken_away(monkeypatch):
    taken, now = iter([100, 130, 200, 200]), iter([0.0, 2.0, 5.0, 6.0])
    monkeypatch.setattr(block, "preemptions", lambda: next(taken))
    monkeypatch.setattr(block.time, "monotonic", lambda: next(now))
    found = block.time_row(TINY, 0.001, plain=["eager"])
    assert [row["preempted"] for row in found] == [15.0, 0.0]


def test_threads_of_the_cpu(tmp_path):
    before = torch.get_num_threads()
    found = list(block.time_threads(TINY, 0.01))
    assert torch.get_num_threads() == before
    counts = sorted({row["threads"] for row in found})
    assert counts[0] == 1
    assert counts[-1] == before
    assert len(found) == 2 * len(counts)
    plots.draw("threads", found, tmp_path / "threads.svg")
    assert "as many times" in (tmp_path / "threads.svg").read_text()


def test_memory_is_looked_at_before_a_row_is_made():
    assert block.too_large(TINY) is None
    assert block.too_large(Problem((1 << 20, 1024, 1024, 64))) == "does not fit into memory"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal):
    stream = StringIO()
    console = Console(file=stream, force_terminal=terminal, width=150)
    with progress.shown(10.0, console) as say:
        say("block: tiny", [])
        say("block: tiny", [row(), {"name": "plain", "milliseconds": 2.0}])
        say("block: bad", [{"name": "bad", "error": "off by 1"}])
    shown = stream.getvalue()
    for part in ("2x16x6x5 float32 contiguous", "5.00", "2.0 ms", "off by 1"):
        assert part in shown
    assert ("\x1b[" in shown) == terminal


def test_the_bar_stays_on_a_low_terminal():
    stream = StringIO()
    console = Console(file=stream, force_terminal=True, width=150, height=12)
    with progress.shown(10.0, console) as say:
        for index in range(20):
            say("block: the last", [{**row(), "name": f"row {index}"}])
    last = stream.getvalue().rpartition("block: the last")[2]
    assert [index for index in range(20) if f"row {index} " in last] == [14, 15, 16, 17, 18, 19]


def test_targets(monkeypatch, capsys):
    """Every line is made, of tiny problems; those that are missed are marked."""
    monkeypatch.setattr(targets, "in_stages", lambda *_, **__: [TINY] * 4)
    monkeypatch.setattr(targets, "SMALL", TINY.shape)
    monkeypatch.setattr(targets, "LARGE", TINY)
    monkeypatch.setattr(targets, "SIZES", (TINY,))
    monkeypatch.setattr(targets, "SECONDS", 0.01)
    monkeypatch.setattr(targets, "THREADS", torch.get_num_threads())
    plain = block.time_row
    monkeypatch.setattr(
        block, "time_row", lambda problem, seconds, compiled, plain_names: plain(problem, 0.01)
    )
    assert targets.main(seconds=0.01) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) > 30
    assert any("missed" in line for line in lines)
    assert targets.Line("", 2.0, 2.5, True).cells[-1] == ""
    assert targets.Line("", 2.0, 2.5, False).cells[-1] == "missed"
    assert targets.Line("", 2.0, None, False).cells[-2:] == ["-", "missed"]


@pytest.mark.parametrize(("slow", "code"), [(0, 0), (1, 0), (2, 0), (9, 1)])
def test_guard_fails_only_where_it_is_slow_each_time(monkeypatch, capsys, slow, code):
    tries = []

    def time_row(problem, seconds, plain):
        tries.append(problem)
        fused = 200.0 if len(tries) > slow else 1000.0
        # One direction is disturbed in the first try, the other in the second.
        disturbed = [fused if slow > 2 or len(tries) % 2 == i else 200.0 for i in range(2)]
        ways = zip(block.DIRECTIONS, disturbed, strict=True)
        return [row(direction=way, fused=time) for way, time in ways]

    monkeypatch.setattr(block, "time_row", time_row)
    assert guard.main({TINY: guard.Expected(5.0, 5.0)}) == code
    assert len(tries) == {0: 1, 1: 2, 2: 2, 9: guard.TRIES}[slow]
    assert capsys.readouterr().out.count("GROSS LOSS") == 2 * code


@pytest.mark.parametrize(("expected", "code"), [(0.01, 0), (1e9, 1)])
def test_guard(monkeypatch, capsys, expected, code):
    monkeypatch.setattr(guard, "SECONDS", 0.01)
    assert guard.main({TINY: guard.Expected(expected, expected)}) == code
    assert capsys.readouterr().out.count("GROSS LOSS") == 2 * code


def test_variants(capsys):
    assert variants.main([TINY], seconds=0.01) == 0
    printed = capsys.readouterr().out
    assert all(f"| {mode} " in printed for mode in variants.MODES)
    assert printed.count(str(TINY)) == len(variants.MODES)


@pytest.mark.parametrize("mode", variants.MODES)
def test_variants_compute_the_same(mode):
    training, blocks = variants.MODES[mode]
    device = torch.device("cpu")
    found = blocks(TINY, device)
    x = problems.draw(*TINY, device, 0)
    plain, fused, *_ = (block.train(training)(x) for block in found.values())
    torch.testing.assert_close(fused, plain)
    if "ReLU" in mode:
        torch.testing.assert_close([*found.values()][2](x), plain)
