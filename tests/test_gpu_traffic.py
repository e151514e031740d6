"""Bytes of the device's memory, counted by ncu: its logic, without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.gpu import counted, report, strategies, traffic
from benchmarks.gpu.commands import Finished
from benchmarks.outcome import FAILED, PASSED, SKIPPED, Folder
from benchmarks.problems import Problem

CALLS = """\
==PROF== Connected to process 7 (/usr/bin/python3.12)
counted: {"name": "a", "direction": "forward", "strategy": "streaming", "kernels": 2, \
"planned_bytes": 4000}
counted: {"name": "a", "direction": "forward", "strategy": "resident", "kernels": 1, \
"planned_bytes": 2000}
"""
TABLE = """\
==PROF== Disconnected from process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","pool(Pool<float, 3>)","dram__bytes_read.sum","byte","2,000"
"0","7","pool(Pool<float, 3>)","dram__bytes_write.sum","byte","100"
"1","7","last","dram__bytes_read.sum","byte","1,000"
"1","7","last","dram__bytes_write.sum","byte","1,100"
"2","7","resident","dram__bytes_read.sum","byte","1000"
"2","7","resident","dram__bytes_write.sum","byte","900"
"""
WHOLE = f"{CALLS}{counted.FINISHED}\n{TABLE}==WARNING== said last\n"


def finished(text, code=0, timed_out=False):
    return Finished(code, text, 12.0, timed_out)


def test_bytes_of_each_call():
    outcome = traffic.judge(finished(WHOLE))
    assert outcome.state == PASSED
    assert outcome.summary == "2 calls, 0.95 to 1.05 of what is planned"
    streaming, resident = outcome.details["rows"]
    assert (streaming["read"], streaming["written"], streaming["of_planned"]) == (3000, 1200, 1.05)
    assert [kernel["name"] for kernel in streaming["kernels"]] == ["pool(Pool<float, 3>)", "last"]
    assert resident["of_planned"] == 0.95
    lines = "\n".join(report.SECTIONS["traffic"](outcome.as_json()))
    cells = [line.replace(" ", "") for line in lines.splitlines()]
    assert "|a|forward|resident|0.0|0.0|0.0|0.95|" in cells


DIED = "==ERROR== The application returned an error code (1).\n"
REFUSED = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n"


@pytest.mark.parametrize(
    ("done", "state", "summary"),
    [
        (finished(f"{REFUSED}{WHOLE[: WHOLE.index(TABLE)]}"), SKIPPED, "ncu: ERR_NVGPUCTRPERM"),
        (finished(f"{REFUSED}", code=1), SKIPPED, "ncu: ERR_NVGPUCTRPERM"),
        (finished(CALLS, code=1), FAILED, "exit code 1: counted: "),
        (finished(f"{CALLS}{DIED}", code=1), FAILED, "exit code 1: ==ERROR== The application"),
        (finished(CALLS, timed_out=True), FAILED, "timeout: counted: "),
        (finished(WHOLE.replace('"kernels": 2', '"kernels": 3')), FAILED, "3 kernels, 4 planned"),
        (finished(WHOLE.replace('"kernels": 2', '"kernels": 1')), FAILED, "3 kernels, 2 planned"),
        (finished(WHOLE[: WHOLE.index(TABLE)]), FAILED, "0 kernels, 3 planned"),
    ],
)
def test_what_is_no_count(done, state, summary):
    outcome = traffic.judge(done)
    assert outcome.state == state
    assert outcome.summary.startswith(summary)


def test_without_ncu(monkeypatch, tmp_path):
    monkeypatch.setattr(traffic, "find_tool", lambda _: None)
    outcome = traffic.step(1, Folder(tmp_path))
    assert (outcome.state, outcome.summary) == (SKIPPED, "ncu is not installed")


def test_ncu_is_run_over_the_calls(monkeypatch, tmp_path):
    tool = tmp_path / "ncu"
    tool.write_text(f"#!/bin/sh\nif [ $1 = --csv ]; then cat <<'X'\n{WHOLE}X\nfi\n")
    tool.chmod(0o755)
    monkeypatch.setattr(traffic, "find_tool", lambda _: str(tool))
    assert traffic.step(20, Folder(tmp_path)).state == PASSED


def test_each_call_is_counted_once_of_two(monkeypatch):
    """Under each strategy that has a plan, in the order in which it is planned."""
    seen, counting = [], [False]
    for name, value in (("start", True), ("stop", False)):
        monkeypatch.setattr(
            torch.cuda.profiler, name, lambda value=value: counting.__setitem__(0, value)
        )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def called(direction):
        strategy = os.environ[strategies.VARIABLE]
        if (direction, strategy) == ("backward", "resident"):
            raise ValueError("strategy: expected one that is possible, got resident: too large")
        seen.append((direction, strategy, counting[0]))

    directions = ("forward", "backward")
    monkeypatch.setattr(counted, "calls", lambda *_: {d: lambda d=d: called(d) for d in directions})
    found = {"stages": [{}, {}], "group": 1, "summing_launches": 1, "device_memory_bytes": 5}
    monkeypatch.setattr(counted, "plan", lambda *_, **__: found)
    lines = list(counted.run([Problem((2, 16, 4, 4), torch.float32)], "cpu"))
    expected = [("forward", "streaming"), ("forward", "resident"), ("backward", "streaming")]
    assert [(line["direction"], line["strategy"]) for line in lines] == expected
    assert seen == [(*call, counts) for call in expected for counts in (False, True)]
    assert lines[0]["kernels"] == 2 * 2 + 1
    assert lines[0]["planned_bytes"] == 5


def test_what_is_counted_fills_the_cache_many_times():
    assert all(problem.bytes > 400e6 for problem in counted.PROBLEMS)
