"""What ``python -m benchmarks.gpu`` finds of the host's time, on a CPU in place of a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import why_not
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import host, report
from benchmarks.gpu.strategies import STRATEGIES, VARIABLE
from benchmarks.outcome import Folder
from benchmarks.problems import Problem

IMPOSSIBLE = ValueError("strategy: expected one that is possible, got resident: too large")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(host, "PROBLEM", Problem((1, 16, 6, 5), torch.float32))


def test_works_are_those_of_the_fused_block_and_its_rivals(tiny):
    if reason := why_not("cpu"):
        pytest.skip(reason)
    works = host.works(torch.device("cpu"))
    assert next(iter(works)) == "torch.mul"
    results = {name: work(0) for name, work in works.items()}
    out, gradients = results["forward + backward"]
    assert torch.equal(results["forward"], results["operator forward"])
    assert torch.equal(out, results["operator forward_train"][0])
    assert all(map(torch.equal, gradients, results["operator backward"]))
    assert not results["forward"].requires_grad
    assert len(results["eager forward + backward"][1]) == len(gradients) == 7


def test_samples_begin_with_an_idle_device(monkeypatch):
    events = []
    monkeypatch.setattr(host.time, "perf_counter", lambda: float(len(events)))
    found = host.time_host(lambda i: events.append("call"), lambda: events.append("wait"))
    assert found == [1e6] * host.SAMPLES  # a second a call
    one = ["wait"] + ["call"] * host.CALLS
    assert events == one * (host.WARM_UPS + host.SAMPLES)


class Counter(TorchDispatchMode):
    """Counts operators, of which most are one launch on a GPU, and none more than a few."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        return operator(*args, **(kwargs or {}))


def test_calls_wait_for_no_device(tiny):
    """A stream keeps about a thousand launches."""
    if reason := why_not("cpu"):
        pytest.skip(reason)
    for name, work in host.works(torch.device("cpu")).items():
        with Counter() as counter:
            work(0)
        assert counter.count > 0
        assert 2 * host.CALLS * counter.count < 1000, name


def test_a_row_keeps_what_its_strategy_cannot_do(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)

    def work(i):
        if os.environ[VARIABLE] == "resident":
            raise IMPOSSIBLE

    rows = [host.time_row(s, {"forward": work}, lambda: None) for s in (*STRATEGIES, host.AUTO)]
    assert [list(row["contestants"]) for row in rows] == [["forward"], [], ["forward"]]
    assert rows[1]["missing"] == {"forward": f"ValueError: {IMPOSSIBLE}"}


def test_a_broken_work_breaks_its_row():
    def work(i):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        host.time_row("streaming", {"forward": work}, lambda: None)


def test_report(tmp_path):
    median = {"launched": {"median": 12.34}}
    row = {"problem": "1x16x6x5 float32 contiguous", "method": "launched", "missing": {}}
    rows = [
        {**row, "name": "streaming", "contestants": {"torch.mul": median, "forward": median}},
        {**row, "name": "resident", "contestants": {"torch.mul": median}},
        {"name": "auto", "error": "RuntimeError: out of memory"},
    ]
    rows[1]["missing"] = {"forward": str(IMPOSSIBLE)}
    folder = Folder(tmp_path)
    folder.write("host", {"state": "passed", "summary": "", "problems": [], "rows": rows})
    text = report.render({"host": folder.read("host")})
    lines = [line.replace(" ", "") for line in text.splitlines()]
    assert "|1x16x6x5float32contiguous|streaming|resident|" in lines
    assert "|forward|12.3|-|" in lines
    assert f"- resident: forward is missing: {IMPOSSIBLE}" in text
    assert report.HOST_NOTE in text
