"""Plans that the CUDA backend keeps from one call to the next, on the emulator: each serves what it
was made for alone. Sizes and strides are the same throughout."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import LAYOUTS, Case, gradients, leaves, make_weights, make_x
from tolerance import assert_as_good_as_eager

from cbam_cuda import cbam

CASE = Case("aligned and not", (2, 16, 8, 8), 4, (7, 7))
# A vector load where a tensor is not aligned would show.
ALIGNED = {"contiguous": True, "odd offset": False}
# There and back again, so that each comes behind others.
CALLS = list(itertools.product(ALIGNED, ("streaming", "auto", "resident")))
CALLS += reversed(CALLS)
NO_VECTORS = "got resident: rows of x.* no whole vectors"


@pytest.fixture
def launches(strategy, emulator):
    """Calls by a strategy; what that gave, and how many launches it took."""

    def called(name: str, call):
        strategy(name)
        before = emulator.emulator_launches()
        return call(), emulator.emulator_launches() - before

    return called


def test_forwards(launches):
    weights = make_weights(CASE, torch.float32)
    for place, name in CALLS:
        x = LAYOUTS[place](make_x(CASE, torch.float32))

        def call(x=x):
            return cbam(x, *weights, backend="emulated")

        if name == "resident" and not ALIGNED[place]:
            with pytest.raises(ValueError, match=NO_VECTORS):
                launches(name, call)
            continue
        out, count = launches(name, call)
        truth = cbam(x.double(), *(w.double() for w in weights), backend="reference")
        assert_as_good_as_eager("out", out, cbam(x, *weights, backend="reference"), truth)
        assert count == {"streaming": 4, "resident": 1}.get(name, count)


def test_forwards_with_a_residual(launches):
    """The same of what is added to out."""
    x, weights = make_x(CASE, torch.float32), make_weights(CASE, torch.float32)
    for place, name in CALLS:
        residual = LAYOUTS[place](make_x(CASE, torch.float32, seed=2))

        def call(residual=residual):
            return cbam(x, *weights, residual=residual, backend="emulated")

        if name == "resident" and not ALIGNED[place]:
            with pytest.raises(ValueError, match=NO_VECTORS):
                launches(name, call)
            continue
        out, count = launches(name, call)
        plain = cbam(x, *weights, backend="emulated") + residual
        torch.testing.assert_close(out, plain)
        assert count == {"streaming": 4, "resident": 1}.get(name, count)


@pytest.mark.parametrize("wanted", [slice(0, 1), slice(1, None), slice(None)], ids=str)
def test_backwards(launches, wanted):
    """The same of out's gradient, with some gradients asked for or all."""
    x, weights = make_x(CASE, torch.float32), make_weights(CASE, torch.float32)

    def tensors(dtype: torch.dtype = torch.float32):
        found = leaves(x, weights, dtype)
        for t in {*range(len(found))} - {*range(len(found))[wanted]}:
            found[t].requires_grad_(False)
        return found

    for place, name in CALLS:
        grad = LAYOUTS[place](make_x(CASE, torch.float32, seed=2))
        if name == "resident" and not ALIGNED[place]:
            with pytest.raises(ValueError, match=NO_VECTORS):
                launches(name, lambda grad=grad: gradients("emulated", tensors(), grad))
            continue
        fused, count = launches(name, lambda grad=grad: gradients("emulated", tensors(), grad))
        eager = gradients("reference", tensors(), grad)
        truth = gradients("reference", tensors(torch.float64), grad.double())
        for number, three in enumerate(zip(fused, eager, truth, strict=True)):
            if three[2] is not None:
                assert_as_good_as_eager(f"gradient {number}", *three)
        assert name == "auto" or (count <= 4) == (name == "resident")
