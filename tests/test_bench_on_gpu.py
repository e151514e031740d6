"""What ``python -m benchmarks`` looks at before it times on a GPU, as far as a CPU can run it."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time

import pytest
import torch
from test_gpu_timings import Ticks, plan_on_record

from benchmarks import __main__ as bench
from benchmarks import network
from benchmarks.contestants import COMPILED_ON_CUDA, RIVALS, make_block
from benchmarks.gpu import measure, problems, rows, timings
from benchmarks.problems import Problem
from benchmarks.problems import problems as all_problems
from benchmarks.stamp import ROOT

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
    """Makes a row of compiled rivals, each of which takes a second to compile."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))

    class Compiled(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.new = block, True

        def forward(self, x):
            if self.new:
                time.sleep(1.0)
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


@pytest.mark.parametrize("limits", [(1.9,), (60.0, 1.9)])  # of any row; of what the run has left
def test_rivals_of_a_row_share_the_time_to_compile(compiling, limits):
    contestants, resets = compiling(*limits[:1], ["eager", *COMPILED], *limits[1:])
    assert resets == 1
    assert list(contestants.blocks) == ["eager", "compile", "fused"]
    for missing in contestants.missing.values():
        reasons = [missing[name] for name in COMPILED[1:]]
        assert reasons[0].startswith("TimeoutError: took more than")
        assert reasons[1:] == ["TimeoutError: no time left"] * 2


def test_what_a_row_compiled_stays_until_it_is_timed(compiling):
    """A reset between rivals would have those before compile again, outside of any limit."""
    assert compiling(60.0, COMPILED)[1] == 1
    assert compiling(60.0, ["eager"])[1] == 1


# The whole program, with everything but the device.

ALL = (PROBLEM, PROBLEM._replace(layout="channels_last"), Problem((2, 32, 9)))


@pytest.fixture
def gpu(monkeypatch, threads):
    """Has what would run on a GPU run on a thread; torch.compile gives back what it is given."""
    threads(1)
    made, on_cpu = problems.make_block, problems.Contestants

    def compiled(name, *sizes):
        return made(COMPILED_ON_CUDA[name].of if name in COMPILED_ON_CUDA else name, *sizes)

    def time_setting(setting, device):
        assert device.type == "cuda"
        each = {"plain": [3e3, 3e3], "fused": [2e3, 2e3]}
        return [network._row(setting, n, torch.float16, 64, 10**9, s) for n, s in each.items()]

    device = type("Device", (), {"L2_cache_size": 1})
    monkeypatch.setattr(bench, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(bench, "stream_of", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(bench.facts, "collect", lambda: {"device": "A GPU", "driver": "1.2"})
    monkeypatch.setattr(bench, "too_large", lambda problem: None)
    monkeypatch.setattr(bench, "problems", lambda on_gpu: iter(ALL) if on_gpu else None)
    monkeypatch.setattr(bench, "in_stages", lambda batch: [PROBLEM] * 2)
    monkeypatch.setattr(bench.network, "time_setting", time_setting)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(problems, "make_block", compiled)
    monkeypatch.setattr(timings, "Contestants", lambda *given: on_cpu(*given, device="cpu"))
    monkeypatch.setattr(timings, "Clock", lambda l2_bytes: Ticks())
    monkeypatch.setattr(measure, "_graph", lambda call, count: lambda: call(0))
    monkeypatch.setattr(measure, "WARM_UPS", 1)
    monkeypatch.setattr(measure, "SAMPLES_A_ROUND", 1)
    monkeypatch.setattr(rows, "plan", plan_on_record)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


def test_the_program_on_a_gpu(gpu, tmp_path, capsys):
    assert bench.run(["--output", str(tmp_path)]) == 0
    assert not torch.backends.cudnn.allow_tf32
    folder = tmp_path / "a-gpu"
    pictures = {f"{name}.svg" for name in ("speed", "bandwidth", "batch", "memory")}
    files = {"block.json", "network.json", "report.md", *pictures}
    assert {file.name for file in folder.iterdir()} == files
    found = json.loads((folder / "block.json").read_text())["rows"]
    ways = ("forward", "backward", "step")
    assert [(row["name"], row["direction"]) for row in found] == [
        (str(problem), way) for problem in ALL for way in ways
    ]
    for row, (problem, way) in zip(found, [(p, w) for p in ALL for w in ways], strict=True):
        rivals = {"eager", "tuned"} if problem != PROBLEM else set(RIVALS)
        rivals |= {"timm"} if len(problem.shape) == 4 else set()
        ours = {"fused"} if way == "step" else {"cuda streaming", "cuda resident"}
        assert set(row["contestants"]) | set(row["missing"]) >= {"copy", *rivals, *ours}
        assert set(row["missing"]) <= {"timm"}
        assert row["method"] == "graph"
    assert {"eager", "max-autotune", "fused"} <= set(found[2]["memory"])
    report = (folder / "report.md").read_text()
    for part in ("streaming", "max-autotune", "images/s", "TF32", "Memory of training", "1.50 |"):
        assert part in report
    assert "Failed:" not in report


def test_a_wrong_block_fails_the_program(gpu, monkeypatch, tmp_path, capsys):
    made = problems.make_block

    def wrong(name, *sizes):
        block = made(name, *sizes)
        if name == "fused":
            with torch.no_grad():
                block.conv.bias += 1e-3
        return block

    monkeypatch.setattr(problems, "make_block", wrong)
    assert bench.run(["--output", str(tmp_path), "--only", "block"]) == 1
    line = f"{PROBLEM}: AssertionError: fused, inference: off by"
    assert f"FAILED: {line}" in capsys.readouterr().err
    assert f"Failed:\n\n- {line}" in (tmp_path / "a-gpu" / "report.md").read_text()


def test_nothing_to_take_is_an_error(gpu, tmp_path):
    with pytest.raises(SystemExit, match="expected something that this run takes"):
        bench.run(["--output", str(tmp_path), "--only", "threads"])


def test_batches_that_a_gpu_is_for_come_early():
    first = list(all_problems(on_gpu=True))
    assert set(first) == set(all_problems())
    early = first[:24]
    assert {p.shape[0] for p in early if len(p.shape) == 4} == {1, 8, 32, 256}
    assert {p.dtype for p in early} == {torch.float32, torch.float16, torch.bfloat16}
    assert {p.layout for p in early} == {"contiguous", "channels_last"}
    assert {len(p.shape) for p in early} == {3, 4, 5}


def test_a_gpu_that_the_block_cannot_use_is_no_reason_to_take_the_cpu(monkeypatch):
    """As a report of the CPU would pass for one of the machine."""
    state = {"cpu": "available", "cuda": "this build has no fused kernels for cuda"}
    monkeypatch.setattr(bench.cbam_cuda, "info", lambda: {"backends": state})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="no fused block on cuda: this build has no fused kernels"):
        bench.pick_device("auto")
    assert bench.pick_device("cpu") == torch.device("cpu")
    state["cuda"] = "available"
    assert bench.pick_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.pick_device("auto") == torch.device("cpu")


def test_a_program_that_hangs_is_ended():
    program = """\
import time
from benchmarks.__main__ import ended_when_hung
with ended_when_hung(60.0):
    pass
with ended_when_hung(0.5):
    time.sleep(60)  # the kernel
"""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert 'File "<string>", line 6' in done.stderr
    assert time.monotonic() - begin < 50
