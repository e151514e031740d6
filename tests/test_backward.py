"""The backward against the reference and against finite differences."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    FEW_CASES,
    HEAVY_CASES,
    LARGE_CASES,
    LAYOUTS,
    NATIVE_LAYOUTS,
    Case,
    device_of,
    gradients,
    leaves,
    make_weights,
    make_x,
    operators,
    reordered_gradients,
)
from tolerance import assert_as_good_as_eager
from torch.profiler import ProfilerActivity, profile

from cbam_cuda import cbam
from cbam_cuda.arguments import Weights

NAMES = ("out", "x", *Weights._fields)


def check(backend, case, dtype, layout, grad_layout="contiguous", *, bias=True, weight_dtype=None):
    x = LAYOUTS[layout](make_x(case, dtype, backend))
    grad = LAYOUTS[grad_layout](make_x(case, dtype, backend, seed=2))
    weights = make_weights(case, weight_dtype or dtype, backend, bias=bias)
    fused = gradients(backend, leaves(x, weights), grad)
    eager = gradients("reference", leaves(x, weights), grad)
    truth = gradients("reference", leaves(x, weights, torch.float64), grad.double())
    reordered = reordered_gradients(leaves(x, weights), grad)
    for name, *four in zip(NAMES, fused, eager, truth, reordered, strict=True):
        if four[2] is not None:
            assert_as_good_as_eager(name, *four)
    return x, fused[1]


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(backend, case, dtype, layout):
    check(backend, case, dtype, layout, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_gives_the_same(backend, case, layout):
    x, dx = check(backend, case, torch.float32, layout, layout)
    assert dx.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_gradient_that_arrives_in_another_layout(backend, case, layout, grad_layout):
    check(backend, case, torch.float32, layout, grad_layout)


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_gradient_that_arrives_expanded(backend, case):
    """As after `out.sum().backward()`: one element, strides of 0."""
    x, weights = make_x(case, torch.float32, backend), make_weights(case, torch.float32, backend)
    one = torch.ones((), device=device_of(backend))
    expanded = gradients(backend, leaves(x, weights), one.expand_as(x))
    dense = gradients(backend, leaves(x, weights), torch.ones_like(x))
    for a, b in zip(expanded, dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_weights_in_float32_beside_x_of_16_bits(backend, case, dtype):
    check(backend, case, dtype, "contiguous", weight_dtype=torch.float32)


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_without_biases(backend, case):
    check(backend, case, torch.float32, "contiguous", bias=False)


TINY = {
    1: Case("tiny sequence", (2, 4, 5), 2, (3,)),
    2: Case("tiny image", (2, 4, 3, 4), 2, (3, 3)),
    3: Case("tiny volume", (1, 3, 2, 3, 2), 2, (3, 1, 3)),
}


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("dim", TINY)
def test_gradcheck_through_all_outputs(backend, dim, layout):
    x = LAYOUTS[layout](make_x(TINY[dim], torch.float64, backend))
    tensors = leaves(x, make_weights(TINY[dim], torch.float64, backend))

    def function(*tensors):
        return cbam(*tensors, backend=backend, return_attention=True)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("dim", TINY)
def test_gradgradcheck(backend, dim):
    if backend == "emulated" and dim != 2:
        pytest.skip("second derivatives are plain PyTorch's, whatever the backend")
    x = make_x(TINY[dim], torch.float64, backend)
    tensors = leaves(x, make_weights(TINY[dim], torch.float64, backend))
    grad = make_x(TINY[dim], torch.float64, backend, seed=2).requires_grad_()

    def function(*tensors):
        return cbam(*tensors, backend=backend)

    assert torch.autograd.gradgradcheck(function, tensors, [grad])


def test_gradgradcheck_through_the_gates(backend):
    x = make_x(TINY[2], torch.float64, backend)
    tensors = leaves(x, make_weights(TINY[2], torch.float64, backend))

    def function(*tensors):
        return cbam(*tensors, backend=backend, return_attention=True)[1:]

    assert torch.autograd.gradgradcheck(function, tensors)


def test_gradient_penalty_trains(backend):
    """A loss on a gradient, as in WGAN-GP: second derivatives by create_graph, frozen weights."""
    case = TINY[2]
    grads = {}
    for which in (backend, "reference"):
        x, *weights = leaves(
            make_x(case, torch.float64, backend), make_weights(case, torch.float64, backend)
        )
        weights[0].requires_grad_(False)
        out = cbam(x, *weights, backend=which)
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        trained = [x, *weights[1:]]
        grads[which] = torch.autograd.grad(dx.square().sum(), trained)
    for a, b in zip(grads[backend], grads["reference"], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=4)), ids=str)
def test_frozen_mixtures_give_the_same_gradients(backend, mask):
    """x, the first layer, the second layer, the convolution: any of them frozen."""
    case = FEW_CASES[0]
    x, weights = make_x(case, torch.float32, backend), make_weights(case, torch.float32, backend)
    if not any(mask):
        assert not cbam(x, *weights, backend=backend).requires_grad
        return
    grad = make_x(case, torch.float32, backend, seed=2)
    wanted = [mask[0], mask[1], mask[1], mask[2], mask[2], mask[3], mask[3]]
    tensors = [t.requires_grad_(w) for t, w in zip(leaves(x, weights), wanted, strict=True)]
    some = gradients(backend, tensors, grad)[1:]
    full = gradients(backend, leaves(x, weights), grad)[1:]
    for a, b, w in zip(some, full, wanted, strict=True):
        assert (a is not None) == w
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("index", range(7))
@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
def test_one_gradient_alone(backend, index, layout):
    case = FEW_CASES[0]
    x = LAYOUTS[layout](make_x(case, torch.float32, backend))
    weights, grad = make_weights(case, torch.float32, backend), torch.ones_like(x)
    tensors = leaves(x, weights)
    for i, t in enumerate(tensors):
        t.requires_grad_(i == index)
    alone = gradients(backend, tensors, grad)[1 + index]
    assert torch.equal(alone, gradients(backend, leaves(x, weights), grad)[1 + index])


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(backend, case, layout):
    x = LAYOUTS[layout](make_x(case, torch.float32, backend))[:0]
    weights = make_weights(case, torch.float32, backend)
    out, dx, *rest = gradients(backend, leaves(x, weights), x)
    assert dx.shape == out.shape == x.shape
    assert all(torch.equal(g, torch.zeros_like(w)) for g, w in zip(rest, weights, strict=True))
    tensors = leaves(x, weights)
    tensors[0].requires_grad_(False)
    rest = gradients(backend, tensors, x)[2:]
    assert all(torch.equal(g, torch.zeros_like(w)) for g, w in zip(rest, weights, strict=True))


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("case", [*CASES, *HEAVY_CASES], ids=str)
def test_bitwise_equal_for_every_number_of_threads(case, layout, threads):
    x = LAYOUTS[layout](make_x(case, torch.float32))
    grad = LAYOUTS[layout](make_x(case, torch.float32, seed=2))
    weights = make_weights(case, torch.float32)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(gradients("cpu", leaves(x, weights), grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*LARGE_CASES, *HEAVY_CASES], ids=str)
def test_a_large_batch_is_its_samples_to_the_bit(case, dtype, layout):
    """From some sizes on memory is treated, or work is shared, in another way."""
    samples, *sizes = case.shape
    whole = replace(case, shape=(samples * 4 // dtype.itemsize, *sizes))
    x, grad = (LAYOUTS[layout](make_x(whole, dtype, seed=seed)) for seed in (0, 2))
    weights = make_weights(whole, dtype)
    out, dx, *_ = gradients("cpu", leaves(x, weights), grad)
    for n in range(len(x)):
        alone = gradients("cpu", leaves(x[n : n + 1], weights), grad[n : n + 1])
        assert torch.equal(out[n : n + 1], alone[0])
        assert torch.equal(dx[n : n + 1], alone[1])


ORDERS = {
    "maps last": lambda w: w.movedim(1, -1).contiguous().movedim(-1, 1),
    "of more": lambda w: w.repeat_interleave(2, -1)[..., ::2],
    "space reversed in memory": lambda w: w.mT.contiguous().mT if w.dim() > 3 else w,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", [c for c in CASES if "dimension" in c.name or c in FEW_CASES], ids=str
)
def test_weights_of_the_convolution_in_any_order(backend, case, dtype, order):
    """Those of channels_last are read, and their gradient written, as they are."""
    x, grad = (make_x(case, dtype, backend, seed=seed) for seed in (0, 2))
    weights = make_weights(case, dtype, backend)
    expected = gradients(backend, leaves(x, weights), grad)
    conv = ORDERS[order](weights.conv_weight)
    assert torch.equal(conv, weights.conv_weight)
    got = gradients(backend, leaves(x, weights._replace(conv_weight=conv)), grad)
    assert all(map(torch.equal, expected, got))
    if order == "maps last":
        assert got[6].stride() == conv.stride()


BIASES = ("fc1_bias", "fc2_bias", "conv_bias")


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_other_weights_may_be_parts_of_larger_ones(backend, case):
    """As those are whose strides look like another order of memory, with gaps between."""
    x, grad = (make_x(case, torch.float32, backend, seed=seed) for seed in (0, 2))
    weights = make_weights(case, torch.float32, backend)
    expected = gradients(backend, leaves(x, weights), grad)
    wide = [torch.cat([w, w], 1)[:, : w.shape[1]] for w in (weights.fc1_weight, weights.fc2_weight)]
    parts = weights._replace(
        fc1_weight=wide[0],
        fc2_weight=wide[1],
        **{name: getattr(weights, name).repeat_interleave(2)[::2] for name in BIASES},
    )
    assert all(map(torch.equal, parts, weights))
    got = gradients(backend, leaves(x, parts), grad)
    assert all(map(torch.equal, expected, got))


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32], ids=str)
def test_operators_ask_torch_for_memory_alone(backend, weight_dtype, layout):
    """On CUDA a copy or a cast would be a launch of its own, which no plan counts."""
    case = FEW_CASES[0]
    x = LAYOUTS[layout](make_x(case, torch.float16, backend))
    weights, run = make_weights(case, weight_dtype, backend), operators(backend)
    if layout == "channels_last":  # as those of a network in that layout are
        last = weights.conv_weight.to(memory_format=torch.channels_last)
        weights = weights._replace(conv_weight=last)
        assert not weights.conv_weight.is_contiguous()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run.forward(x, *weights)
        out, *saved = run.forward_train(x, *weights)
        run.backward(out, None, None, x, *weights, *saved, [True] * 7)
    called = {event.name for event in profiler.events()}
    assert any(name.endswith("::backward") for name in called)
    assert not [n for n in called if re.match(r"aten::(?!(new_)?empty)", n)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 56, 56), (2, 256, 56, 56), (2, 512, 28, 28)], ids=str)
def test_little_is_saved_beside_x(backend, dtype, shape):
    case = Case("", shape, shape[1] // 16, (7, 7))
    x = make_x(case, dtype, backend).requires_grad_()
    weights = make_weights(case, dtype, backend)
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        cbam(x, *weights, backend=backend)
    given = [x, *weights]
    for t in given:
        storages.pop(t.untyped_storage().data_ptr(), None)
    assert sum(storages.values()) < 0.1 * x.untyped_storage().nbytes()
