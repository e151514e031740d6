"""What ``python -m benchmarks`` compares, on what, and how it measures time and memory."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from test_bench_results import TINY
from torch import nn

import cbam_cuda
from benchmarks import block, contestants, memory, problems, stamp, timing, truth
from benchmarks.problems import Problem

CPU = torch.device("cpu")
KINDS = [
    TINY,
    TINY._replace(layout="channels_last"),
    Problem((2, 16, 9)),
    Problem((2, 16, 3, 4, 5)),
]


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
    others = {
        Problem(shape, dtype, layout)
        for shape in problems.OTHERS
        for dtype in problems.DTYPES
        for layout in problems.LAYOUTS
        if len(shape) > 3 or layout == "contiguous"
    }
    assert others <= set(found)
    assert not any(len(p.shape) == 3 and p.layout == "channels_last" for p in found)
    assert found.index(Problem((256, 2048, 7, 7))) < 24


@pytest.mark.parametrize("problem", KINDS, ids=str)
@pytest.mark.parametrize("name", ["tuned", "fused"])
def test_contestants_compute_the_same(name, problem):
    x, grad = (problems.draw(*problem, CPU, seed) for seed in (0, 1))
    made = contestants.make_block(name, x.shape[1], problem.dtype, CPU, x.dim() - 2)
    truth.Truth(problem, x, grad).assert_right(name, made, x, grad)


@pytest.mark.parametrize("wrong", ["x", "fc1.weight", "conv.bias"])
@pytest.mark.parametrize("name", ["fused", "tuned"])
def test_truth_notices_a_wrong_gradient(name, wrong):
    made = contestants.make_block("eager", 16, TINY.dtype, CPU)

    def worse(leaf):
        if leaf.requires_grad:
            leaf.register_hook(lambda grad: grad * 1.001)

    if wrong == "x":
        made.register_forward_pre_hook(lambda module, inputs: worse(inputs[0]))
    else:
        worse(made.get_parameter(wrong))
    x, grad = (problems.draw(*TINY, CPU, seed) for seed in (0, 1))
    with pytest.raises(AssertionError, match=rf"{name}, gradient of {wrong}: (norm )?off by"):
        truth.Truth(TINY, x, grad).assert_right(name, made, x, grad)


@pytest.mark.parametrize("part", [1, 2 * 16 * 30, 1 << 20])  # elements: of 1, 2 and all samples
def test_truth_looks_at_every_sample(monkeypatch, part):
    monkeypatch.setattr(truth, "PART", part)
    problem = TINY._replace(shape=(5, *TINY.shape[1:]))
    x, grad = (problems.draw(*problem, CPU, seed) for seed in (0, 1))
    known = truth.Truth(problem, x, grad)
    known.assert_right("fused", contestants.make_block("fused", 16, TINY.dtype, CPU), x, grad)
    for sample in range(5):
        for what in (truth.OUT, truth.DX):
            found = known.eager[what].clone()
            found[sample, 3, 2, 1] += 1e-3
            with pytest.raises(AssertionError, match="mine: off by"):
                known.judge("mine", what, found, by_element=True)


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


def test_timm_itself():
    pytest.importorskip("timm")
    problem = Problem((2, 16, 6, 5), torch.float16)
    assert block.Contestants(problem, ["timm", "fused"]).missing == {}


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
    found = timing.time_together(fns, CPU, 0.1)
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


def test_the_command_says_not_where_things_stand_on_this_machine(monkeypatch):
    words = ["python", "-m", "benchmarks", "--out", "/home/me/now", "--output=/home/me/now/", "a/b"]
    monkeypatch.setattr(stamp.sys, "orig_argv", words)
    expected = "python -m benchmarks --out now --output=now a/b"
    assert stamp.environment(CPU)["command"] == expected
