"""Plans that the CUDA backend keeps from one call to the next, on the emulator: each serves what it
was made for alone."""

from __future__ import annotations

import itertools

import pytest
import torch

import cbam_cuda

SHAPE = (2, 16, 8, 8)


def problem(offset: int, training: bool):
    """x whose first element stands `offset` elements behind a multiple of 16 bytes, and weights."""
    module = cbam_cuda.CBAM(SHAPE[1]).requires_grad_(training)
    memory = torch.randn(2 * torch.Size(SHAPE).numel())
    size = torch.Size(SHAPE).numel()
    return memory[offset : offset + size].view(SHAPE).requires_grad_(training), module


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_plan_is_kept_for_its_problem_alone(monkeypatch, strategy, emulator, training):
    """Same sizes and strides, one after the other: a vector load where x is not aligned, or a
    launch of the other strategy, would show."""
    torch.manual_seed(0)
    calls = list(itertools.product((0, 1), ("streaming", "auto", "resident")))
    for offset, name in [*calls, *reversed(calls)]:
        if (offset, name) == (1, "resident"):  # there are no whole vectors
            continue
        x, module = problem(offset, training)
        strategy(name)
        before = emulator.emulator_launches()
        monkeypatch.setenv("CBAM_CUDA_BACKEND", "emulated")
        out = module(x)
        launches = emulator.emulator_launches() - before
        monkeypatch.setenv("CBAM_CUDA_BACKEND", "reference")
        torch.testing.assert_close(out, module(x))
        if name != "auto":
            assert launches == (1 if name == "resident" else 5)
