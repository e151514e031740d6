"""The forward against the reference, over shapes, dtypes, layouts and flags."""

from __future__ import annotations

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    FEW_CASES,
    HEAVY_CASES,
    LAYOUTS,
    NATIVE_LAYOUTS,
    device_of,
    make_weights,
    make_x,
)
from tolerance import assert_as_good_as_eager

from cbam_cuda import cbam


def in_float64(weights):
    return [None if w is None else w.double() for w in weights]


def check(backend, case, dtype, layout, *, bias=True, weight_dtype=None):
    x = LAYOUTS[layout](make_x(case, dtype, backend))
    weights = make_weights(case, weight_dtype or dtype, backend, bias=bias)
    out = cbam(x, *weights, backend=backend)
    eager = cbam(x, *weights, backend="reference")
    truth = cbam(x.double(), *in_float64(weights), backend="reference")
    assert_as_good_as_eager("out", out, eager, truth)
    return x, out


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(backend, case, dtype, layout):
    check(backend, case, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_gives_the_same(backend, case, layout):
    x, out = check(backend, case, torch.float32, layout)
    assert out.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_weights_in_float32_beside_x_of_16_bits(backend, case, dtype, layout):
    check(backend, case, dtype, layout, weight_dtype=torch.float32)


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_without_biases(backend, case):
    check(backend, case, torch.float32, "contiguous", bias=False)


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_weights_of_any_strides(backend, case):
    x = make_x(case, torch.float32, backend)
    weights = make_weights(case, torch.float32, backend)
    scattered = [w.unsqueeze(-1).repeat(*[1] * w.dim(), 2)[..., 0] for w in weights]
    assert torch.equal(cbam(x, *scattered, backend=backend), cbam(x, *weights, backend=backend))


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_linear_weights_are_taken_as_they_are(backend, case):
    x = make_x(case, torch.float32, backend)
    weights = make_weights(case, torch.float32, backend)
    linear = weights._replace(
        fc1_weight=weights.fc1_weight.flatten(1), fc2_weight=weights.fc2_weight.flatten(1)
    )
    assert torch.equal(cbam(x, *linear, backend=backend), cbam(x, *weights, backend=backend))


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_and_inference_agree_to_the_bit(backend, case, layout):
    """What is kept for backward, and for those who ask for the gates, changes nothing."""
    x = LAYOUTS[layout](make_x(case, torch.float32, backend))
    weights = make_weights(case, torch.float32, backend)
    kept, *_ = cbam(x, *weights, backend=backend, return_attention=True)
    assert torch.equal(kept, cbam(x, *weights, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_attention_is_that_of_the_reference(backend, case, dtype):
    x, weights = make_x(case, dtype, backend), make_weights(case, dtype, backend)
    results = cbam(x, *weights, backend=backend, return_attention=True)
    eager = cbam(x, *weights, backend="reference", return_attention=True)
    truth = cbam(x.double(), *in_float64(weights), backend="reference", return_attention=True)
    for name, *three in zip(["out", "channel", "spatial"], results, eager, truth, strict=True):
        assert_as_good_as_eager(name, *three)


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_empty_batch(backend, case, layout):
    x = LAYOUTS[layout](make_x(case, torch.float32, backend)[:0])
    weights = make_weights(case, torch.float32, backend)
    assert cbam(x, *weights, backend=backend).shape == x.shape
    out, channel_gate, spatial_gate = cbam(x, *weights, backend=backend, return_attention=True)
    assert out.shape == x.shape
    assert channel_gate.shape == (0, *x.shape[1:2], *(1 for _ in x.shape[2:]))
    assert spatial_gate.shape == (0, 1, *x.shape[2:])


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_neighbours_in_memory_are_left_alone(backend, case, layout):
    """The kernels read and write x's own elements: what lies around it is NaN, and stays."""
    n, c, *space = case.shape
    pad = torch.full((n + 2, c + 2, *(s + 2 for s in space)), torch.nan, device=device_of(backend))
    if layout == "channels_last":
        pad = LAYOUTS[layout](pad)
    inner = pad[(slice(1, -1),) * pad.dim()]
    x = make_x(case, torch.float32, backend)
    inner.copy_(x)
    weights = make_weights(case, torch.float32, backend)
    assert torch.equal(cbam(inner, *weights, backend=backend).isnan(), x.isnan())
    assert pad.isnan().sum() == pad.numel() - x.numel()


@pytest.mark.parametrize("case", [*CASES, *HEAVY_CASES], ids=str)
@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
def test_bitwise_equal_for_every_number_of_threads(case, layout, threads):
    x = LAYOUTS[layout](make_x(case, torch.float32))
    weights = make_weights(case, torch.float32)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(cbam(x, *weights, backend="cpu"))
    assert all(torch.equal(results[0], other) for other in results[1:])
