"""``python -m benchmarks``: contestants, measurements, tables and pictures, with tiny shapes."""

from __future__ import annotations

import json
import sys
import types
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import cbam_cuda
from benchmarks import __main__ as bench
from benchmarks import (
    block,
    compare,
    contestants,
    guard,
    memory,
    plots,
    problems,
    progress,
    rows,
    stamp,
    tables,
    targets,
    text,
    timing,
    truth,
)
from benchmarks.problems import Problem

CPU = torch.device("cpu")
TINY = Problem((2, 16, 6, 5))
KINDS = [
    TINY,
    TINY._replace(layout="channels_last"),
    Problem((2, 16, 9)),
    Problem((2, 16, 3, 4, 5)),
]


def timed(**medians):
    return {n: {"launched": timing.as_found([m, m, m])} for n, m in medians.items()}


def row(problem=TINY, direction="forward", missing=(), **medians):
    times = {"copy": 100.0, "eager": 1000.0, "compile": 400.0, "fused": 200.0} | medians
    found = timed(**{name: time for name, time in times.items() if name not in missing})
    return rows.describe(
        problem, direction, found, dict.fromkeys(missing, "no compiler"), ["fused"]
    )


# Problems and contestants.


def test_problems_are_what_is_promised():
    found = list(problems.problems())
    assert len(found) == len(set(found))
    stages = {
        Problem((n, *shape), dtype, layout)
        for n in (1, 8, 32, 256)
        for shape in problems.BLOCKS
        for dtype in problems.DTYPES
        for layout in problems.LAYOUTS
    }
    assert stages <= set(found)
    assert {len(p.shape) for p in found} == {3, 4, 5}
    assert Problem((1, 64, 512, 512)) in found


@pytest.mark.parametrize("problem", KINDS, ids=str)
@pytest.mark.parametrize("name", ["tuned", "fused"])
def test_contestants_compute_the_same(name, problem):
    x, grad = (problems.draw(*problem, CPU, seed) for seed in (0, 1))
    made = contestants.make_block(name, x.shape[1], problem.dtype, CPU, x.dim() - 2)
    truth.Truth(problem, x, grad).assert_right(name, made, x, grad)


@pytest.mark.parametrize("name", ["fused", "tuned"])
def test_truth_notices_a_wrong_gradient(name):
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = contestants.make_block("eager", 16, TINY.dtype, CPU)

        def forward(self, x):
            return self.block(x) + (x - x.detach()) * 1e-3

    x, grad = (problems.draw(*TINY, CPU, seed) for seed in (0, 1))
    with pytest.raises(AssertionError, match=r"gradient of x: (norm )?off by"):
        truth.Truth(TINY, x, grad).assert_right(name, Wrong(), x, grad)


def test_truth_notices_a_wrong_block():
    x, grad = (problems.draw(*TINY, CPU, seed) for seed in (0, 1))
    made = contestants.make_block("fused", 16, TINY.dtype, CPU)
    with torch.no_grad():
        made.conv.bias += 1e-3
    with pytest.raises(AssertionError, match="fused, inference: off by"):
        truth.Truth(TINY, x, grad).assert_right("fused", made, x, grad)


class Timm(nn.Module):
    """Stands for timm's module: the same parts under the same names, with a norm."""

    def __init__(self, channels, rd_channels, spatial_kernel_size, mlp_bias):
        super().__init__()
        self.channel, self.spatial = nn.Module(), nn.Module()
        self.channel.fc1 = nn.Conv2d(channels, rd_channels, 1, bias=mlp_bias)
        self.channel.fc2 = nn.Conv2d(rd_channels, channels, 1, bias=mlp_bias)
        self.spatial.conv = nn.Sequential(
            nn.Conv2d(2, 1, spatial_kernel_size, padding=3, bias=False), nn.BatchNorm2d(1)
        )

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        logits = [self.channel.fc2(self.channel.fc1(vector).relu()) for vector in pooled]
        y = x * sum(logits).sigmoid()
        maps = torch.cat((y.mean(1, keepdim=True), y.amax(1, keepdim=True)), 1)
        return y * self.spatial.conv(maps).sigmoid()


def test_timm_without_its_norm(monkeypatch):
    module = types.SimpleNamespace(CbamModule=Timm)
    for name in ("timm", "timm.layers", "timm.layers.cbam"):
        monkeypatch.setitem(sys.modules, name, module)
    found = block.Contestants(TINY, ["timm", "fused"])
    assert (list(found.blocks), found.missing) == (["timm", "fused"], {})
    assert not any(isinstance(part, nn.BatchNorm2d) for part in found.blocks["timm"].modules())
    missing = block.Contestants(Problem((2, 16, 9)), ["timm", "fused"]).missing
    assert missing == {"timm": "ValueError: expected 2 dimensions, got 1"}


def test_contestants_that_are_not_there_are_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.layers.cbam", None)
    monkeypatch.setitem(contestants.COMPILED_ON_CUDA, "compile", contestants.Compiled("none"))
    found = block.Contestants(TINY, ["timm", "compile", "fused"])
    assert list(found.blocks) == ["fused"]
    assert found.missing["timm"].startswith("ModuleNotFoundError")
    assert found.missing["compile"].startswith("ValueError: expected one of eager")


# Time and memory.


def test_summary_is_median_and_quartiles():
    assert timing.summarize([4.0, 1.0, 2.0, 3.0, 5.0])[:3] == (3.0, 2.0, 4.0)
    assert timing.summarize([7.0]) == timing.Timing(7.0, 7.0, 7.0, 1)


def test_contestants_take_turns():
    order = []
    fns = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = timing.time_together(fns, CPU, 0.01)
    turns = [name for name, last in zip(order, [None, *order], strict=False) if name != last]
    assert turns == ["a", "b"] * (1 + timing.ROUNDS)
    assert len(found["a"]["raw"]) == found["a"]["samples"] >= timing.ROUNDS


def test_a_slow_contestant_gets_fewer_turns(monkeypatch):
    monkeypatch.setattr(timing, "time_once", lambda fn, device, calls=1: fn())
    fns = {"slow": lambda: 1e6, "fast": lambda: 10.0}
    found = timing.time_together(fns, CPU, 0.05)
    assert found["slow"]["samples"] == 1
    assert found["fast"]["samples"] == timing.ROUNDS * timing.MOST_SAMPLES


def test_memory_of_known_tensors():
    x = torch.randn(1000, requires_grad=True)
    assert memory.saved_bytes(lambda: x * 2, [x]) == 0
    assert memory.saved_bytes(lambda: (x * 2).exp(), [x]) == 4000
    assert memory.saved_bytes(lambda: (x * x).exp().exp(), []) == 3 * 4000

    def call():
        with torch.no_grad():
            y = x + 1
            del y
            return x + 1 + 1

    assert 8000 <= memory.peak_bytes(call, CPU) < 8100  # numbers are tensors too


def test_environment_says_where_numbers_come_from():
    facts = stamp.environment(CPU)
    assert {"device", "threads", "torch", "cbam_cuda", "command"} <= set(facts)
    assert facts["cbam_cuda"] == cbam_cuda.__version__


# Rows and tables.


def test_ratios_are_to_the_fused_block():
    found = row()
    assert (rows.speedup(found, "eager"), tables.best(found)) == (5.0, 2.0)
    assert found["fraction_of_copy"] == {"fused": 0.5}
    assert found["copy_gigabytes_per_second"] == pytest.approx(2 * TINY.bytes / 100e-6 / 1e9)
    assert rows.speedup(row(missing=["compile"]), "compile") is None
    on_gpu = {**row(), "auto": "resident"}
    on_gpu["contestants"]["cuda resident"] = on_gpu["contestants"].pop("fused")
    assert rows.speedup(on_gpu, "eager") == 5.0


def test_geometric_mean_passes_over_what_is_missing():
    assert rows.geometric_mean([2.0, None, 8.0]) == pytest.approx(4.0)
    assert rows.geometric_mean([None]) is None


def test_table_says_what_is_missing():
    lines = tables.block_table([row(), row(missing=["compile"])]).splitlines()
    assert lines[2].startswith("| 2x16x6x5 ")
    assert [cell.strip() for cell in lines[3].split("|")][6] == "-"
    assert lines[-1].startswith("| geometric mean")
    assert len({len(line) for line in lines}) == 1


def test_losses_are_shown():
    (line,) = tables.losses([row(), row(compile=150.0)])
    assert line == "2x16x6x5 float32 contiguous, forward: compile takes 0.75 of our time"


def test_threads_are_compared_with_one():
    one = {**row(), "threads": 1}
    two = {**row(copy=50.0, fused=125.0), "threads": 2}
    cells = [c.strip() for c in tables.threads_table([one, two]).splitlines()[3].split("|")]
    assert cells[3:8] == ["2", "50.0", "125", "2.00", "1.60"]


@pytest.mark.parametrize(
    ("name", "file"), [("AMD EPYC (2x)", "amd-epyc-2x"), ("NVIDIA H100 80GB", "nvidia-h100-80gb")]
)
def test_file_names(name, file):
    assert text.slugify(name) == file


# The program.


def small(monkeypatch):
    monkeypatch.setattr(bench, "QUICK", (TINY, TINY._replace(layout="channels_last")))
    monkeypatch.setattr(bench, "in_stages", lambda *_: [TINY])
    monkeypatch.setattr(bench, "QUICK_EACH", 0.01)


def test_end_to_end(monkeypatch, tmp_path, capsys):
    small(monkeypatch)
    folder = bench.main(["--quick", "--compile", "none", "--output", str(tmp_path)])
    found = json.loads((folder / "block.json").read_text())
    assert [(r["layout"], r["direction"]) for r in found["rows"]] == [
        (layout, way) for layout in problems.LAYOUTS for way in block.DIRECTIONS
    ]
    assert found["ended"]
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


def test_what_the_time_does_not_suffice_for_is_said(monkeypatch, tmp_path):
    small(monkeypatch)
    folder = bench.main(["--quick", "--seconds", "1", "--only", "block", "--output", str(tmp_path)])
    report = (folder / "report.md").read_text()
    assert "no time left: 2x16x6x5 float32 contiguous, 2x16x6x5 float32 channels_last" in report


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


# Comparing and guarding.


def written(folder: Path, *found) -> Path:
    folder.mkdir()
    (folder / compare.FILE).write_text(json.dumps({"rows": found}))
    return folder


def test_compare(tmp_path, capsys):
    old = written(tmp_path / "old", row(), row(direction="step"), row(Problem((1, 2, 3))))
    new = written(tmp_path / "new", row(fused=300.0), row(direction="step", fused=150.0))
    assert compare.main([str(old), str(new)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[2].split("|")][6:8] == ["1.50", compare.SLOWER]
    assert "faster" in lines[3]
    assert "eager: 1.000 of the old time, geometric mean" in lines
    assert compare.main([str(old), str(old)]) == 0
    with pytest.raises(SystemExit, match=r"expected a folder with block\.json"):
        compare.main([str(tmp_path), str(new)])


def test_noise_is_no_regression():
    old, new = row(), row()
    new["contestants"]["fused"]["launched"] = timing.as_found([190.0, 230.0, 260.0])
    (change,) = [c for c in compare.changes([old], [new]) if c.contestant == "fused"]
    assert change.verdict == compare.SLOWER
    old["contestants"]["fused"]["launched"] = timing.as_found([180.0, 200.0, 240.0])
    (change,) = [c for c in compare.changes([old], [new]) if c.contestant == "fused"]
    assert change.verdict == compare.SAME


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


@pytest.mark.parametrize(("expected", "code"), [(0.01, 0), (1e9, 1)])
def test_guard(monkeypatch, capsys, expected, code):
    monkeypatch.setattr(guard, "SECONDS", 0.01)
    assert guard.main({TINY: guard.Expected(expected, expected)}) == code
    assert capsys.readouterr().out.count("GROSS LOSS") == 2 * code
