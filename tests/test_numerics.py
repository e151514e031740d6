"""Ties, NaN, infinities, autocast: where implementations of the same formula differ."""

from __future__ import annotations

import pytest
import torch
from cases import (
    DTYPES,
    FEW_CASES,
    LAYOUTS,
    NATIVE_LAYOUTS,
    Case,
    device_of,
    gradients,
    leaves,
    make_weights,
    make_x,
    operators,
)
from tolerance import assert_as_good_as_eager

from cbam_cuda import CBAM, cbam, reference


def output(x, weights, backend, keeps):
    """The output of the forward that keeps what backward needs, or of the one that does not."""
    out = cbam(x, *weights, backend=backend, return_attention=keeps)
    return out[0] if keeps else out


TIED = Case("ties", (3, 40, 9, 9), 4, (7, 7))


def tied_inputs():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(-2, 3, TIED.shape, generator=generator).double()
    return {
        "constant": torch.full(TIED.shape, 0.75, dtype=torch.float64),
        "zeros": torch.zeros(TIED.shape, dtype=torch.float64),
        "after a ReLU": torch.randn(TIED.shape, generator=generator, dtype=torch.float64).relu(),
        "few values": coarse,
        "all minus infinity in a channel": coarse.index_fill(1, torch.tensor([3]), -torch.inf),
    }


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("name", list(tied_inputs())[:-1])
def test_first_of_equals_takes_the_gradient(backend, name, layout):
    """As in AdaptiveMaxPool and torch.max(dim). float64, so that both see the same ties."""
    x = LAYOUTS[layout](tied_inputs()[name].to(device_of(backend)))
    weights = make_weights(TIED, torch.float64, backend)
    # Equal gates make ties across channels as well.
    weights = weights._replace(
        fc2_weight=torch.zeros_like(weights.fc2_weight), fc2_bias=torch.zeros_like(weights.fc2_bias)
    )
    grad = make_x(TIED, torch.float64, backend, seed=2)
    fused = gradients(backend, leaves(x, weights), grad)
    eager = gradients("reference", leaves(x, weights), grad)
    for a, b in zip(fused, eager, strict=True):
        assert_as_good_as_eager(name, a, b, b)


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
def test_positions_of_the_maxima(backend, layout):
    x = LAYOUTS[layout](tied_inputs()["few values"].float().to(device_of(backend)))
    weights = make_weights(TIED, torch.float32, backend)
    weights = weights._replace(
        fc2_weight=torch.zeros_like(weights.fc2_weight), fc2_bias=torch.zeros_like(weights.fc2_bias)
    )
    *_, pixel_argmax, channel_argmax = operators(backend).forward_train(x, *weights)
    flat = x.flatten(2)
    first_pixel = (flat == flat.amax(2, keepdim=True)).int().argmax(2)
    first_channel = (flat == flat.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(pixel_argmax.long(), first_pixel)
    assert torch.equal(channel_argmax.long(), first_channel)


@pytest.mark.parametrize("keeps", [False, True], ids=["inference", "keeps"])
@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [(1, 0, 0, 0), (1, 39, 8, 8), (1, 17, 4, 5)], ids=str)
def test_one_nan_spoils_its_sample_and_no_other(backend, place, dtype, layout, keeps):
    x = make_x(TIED, dtype, backend)
    weights = make_weights(TIED, dtype, backend)
    clean = cbam(x, *weights, backend=backend)
    x[place] = torch.nan
    out = output(LAYOUTS[layout](x), weights, backend, keeps)
    assert out[1].isnan().all()
    for other in (0, 2):
        torch.testing.assert_close(out[other], clean[other], rtol=0.05, atol=0.05)
        assert not out[other].isnan().any()


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
def test_nan_takes_the_place_of_the_maximum(backend, layout):
    x = make_x(TIED, torch.float32, backend)
    x[0, 7, 2, 3] = x[0, 7, 5, 5] = x[0, 9, 2, 3] = torch.nan
    x[0, 7, 0, 0] = torch.inf
    *_, pooled, _, _, pixel_argmax, channel_argmax = operators(backend).forward_train(
        LAYOUTS[layout](x), *make_weights(TIED, torch.float32, backend)
    )
    assert pooled[0, 1, 7].isnan()
    assert pixel_argmax[0, 7] == 2 * 9 + 3
    # The gates of the sample are NaN, so each pixel's first channel is its first NaN.
    assert torch.equal(channel_argmax[0], torch.zeros_like(channel_argmax[0]))


@pytest.mark.parametrize("keeps", [False, True], ids=["inference", "keeps"])
@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("values", [[torch.inf], [-torch.inf], [torch.inf, -torch.inf]], ids=str)
def test_infinities_go_where_they_go_in_the_reference(backend, values, layout, keeps):
    x = make_x(TIED, torch.float64, backend)
    for i, value in enumerate(values):
        x[0, 5 + i, 3, 3] = value
    weights = make_weights(TIED, torch.float64, backend)
    eager = cbam(x, *weights, backend="reference")
    out = output(LAYOUTS[layout](x), weights, backend, keeps)
    torch.testing.assert_close(out, eager, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e4, 1e18])
def test_small_and_large_values(backend, scale):
    x, weights = (
        make_x(TIED, torch.float32, backend) * scale,
        make_weights(TIED, torch.float32, backend),
    )
    out = cbam(x, *weights, backend=backend)
    eager = cbam(x, *weights, backend="reference")
    truth = cbam(x.double(), *[w.double() for w in weights], backend="reference")
    assert_as_good_as_eager("out", out, eager, truth)


def test_gates_that_saturate_are_zero_and_one(backend):
    case = Case("", (1, 32, 6, 6), 2, (3, 3))
    weights = make_weights(case, torch.float32, backend)
    bias = torch.linspace(-120, 120, 32, device=device_of(backend))
    weights = weights._replace(
        fc2_weight=torch.zeros_like(weights.fc2_weight),
        fc2_bias=bias / 2,
        conv_weight=torch.zeros_like(weights.conv_weight),
    )
    x = make_x(case, torch.float32, backend)
    _, channel_gate, spatial_gate = cbam(x, *weights, backend=backend, return_attention=True)
    torch.testing.assert_close(channel_gate.flatten(), torch.sigmoid(bias), rtol=1e-6, atol=1e-37)
    expected = torch.sigmoid(weights.conv_bias).expand(36)
    torch.testing.assert_close(spatial_gate.flatten(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_value_of_16_bits_survives(backend, dtype):
    """With both gates at 1, out is x, value by value: no conversion loses or moves one."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    # Larger ones of bfloat16 would overflow the sum.
    values = values[values.abs() < 1e30].to(device_of(backend))
    case = Case("", (1, 1, values.numel()), 1, (1,))
    weights = make_weights(case, torch.float32, backend)
    # All weights zero and large biases: both sigmoids are exactly 1.
    weights = type(weights)(
        *(torch.full_like(w, 60.0 if i % 2 else 0.0) for i, w in enumerate(weights))
    )
    out = cbam(values.view(1, 1, -1), *weights, backend=backend)
    assert torch.equal(out.flatten().view(torch.int16), values.view(torch.int16))


@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF], ids=hex)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_nan_with_all_bits_set_is_not_rounded_to_a_number(backend, dtype, bits):
    case = Case("", (1, 3, 5, 7), 1, (3, 3))
    weights = make_weights(case, torch.float32, backend)
    nan = torch.full_like(weights.fc2_bias, bits, dtype=torch.int32).view(torch.float32)
    x = make_x(case, dtype, backend)
    assert cbam(x, *weights._replace(fc2_bias=nan), backend=backend).isnan().all()


# PyTorch's own concatenation refuses x of the 16-bit dtype that autocast does not use.
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_dtype_that_eager_gives(backend, dtype, weight_dtype, autocast):
    case = FEW_CASES[0]
    x = make_x(case, dtype, backend).requires_grad_()
    ours = CBAM(64, 16, dtype=weight_dtype, device=device_of(backend), backend=backend)
    plain = reference.CBAM(64, 16, dtype=weight_dtype, device=device_of(backend))
    plain.load_state_dict(ours.state_dict())
    with torch.autocast(device_of(backend), dtype=autocast):
        out, eager = ours(x), plain(x)
    assert out.dtype == eager.dtype
    torch.testing.assert_close(out, eager, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == weight_dtype for p in ours.parameters())


def test_autocast_leaves_float64_alone(backend):
    case = FEW_CASES[0]
    x, weights = make_x(case, torch.float64, backend), make_weights(case, torch.float64, backend)
    expected = cbam(x, *weights, backend=backend)
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        assert torch.equal(cbam(x, *weights, backend=backend), expected)


def test_backward_inside_autocast_is_that_outside(backend, cuda_autocast):
    """Nothing in the backward is cast: torch.autocast around it has no say."""
    case = FEW_CASES[0]
    weights = make_weights(case, torch.float32, backend)
    grad = make_x(case, torch.float32, backend, seed=2)
    results = []
    for enabled in (False, True):
        tensors = leaves(make_x(case, torch.float32, backend), weights)
        out = cbam(*tensors, backend=backend)
        with torch.autocast(device_of(backend), dtype=torch.bfloat16, enabled=enabled):
            (dx,) = torch.autograd.grad(out, tensors[:1], grad, create_graph=True)
            second = torch.autograd.grad(dx.square().sum(), tensors)
        results.append((dx, *second))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_deterministic_algorithms_are_accepted(backend):
    x = make_x(FEW_CASES[0], torch.float32, backend)
    weights = make_weights(FEW_CASES[0], torch.float32, backend)
    torch.use_deterministic_algorithms(True)
    try:
        gradients(backend, leaves(x, weights), x)
    finally:
        torch.use_deterministic_algorithms(False)
