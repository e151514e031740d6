"""The operators of a step's parts: together they are the whole."""

from __future__ import annotations

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    LAYOUTS,
    NATIVE_LAYOUTS,
    Case,
    device_of,
    make_weights,
    make_x,
    operators,
    step_by_parts,
)
from tolerance import assert_as_good_as_eager, assert_strategies_agree
from torch import library

CASE = Case("small", (2, 8, 6, 5), 2, (3, 3))


@pytest.fixture(autouse=True)
def streamed(strategy):
    """As parts are, so that sums are made in the same order."""
    strategy("streaming")


def given(case: Case, dtype: torch.dtype, backend: str, layout: str = "contiguous"):
    """x, the weights, and a gradient of the output."""
    x, grad = (LAYOUTS[layout](make_x(case, dtype, seed=seed)) for seed in (1, 2))
    device = device_of(backend)
    weights = make_weights(case, dtype)
    return x.to(device), type(weights)(*(w.to(device) for w in weights)), grad.to(device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_are_the_whole(backend, case, layout):
    for dtype in (torch.float32, torch.float64):
        x, weights, grad = given(case, dtype, backend, layout)
        assert_whole(operators(backend), x, weights, grad)


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_every_dtype(backend, dtype, layout):
    case = Case("wide", (3, 40, 20, 24), 5, (7, 7))
    x, weights, grad = given(case, dtype, backend, layout)
    assert_whole(operators(backend), x, weights, grad)
    if x.element_size() == 2:
        wide = type(weights)(*(w.float() for w in weights))
        assert_whole(operators(backend), x, wide, grad)


def assert_whole(run, x, weights, grad) -> None:
    out, channel_gate, gate, *others = run.forward_train(x, *weights)
    saved = channel_gate, gate, *others
    parts = step_by_parts(run, x, weights, grad)
    assert torch.equal(parts[1], channel_gate)
    for part, whole in zip(parts[3 : 3 + len(others)], others, strict=True):
        assert torch.equal(part, whole)
    assert torch.equal(parts[0], out)
    torch.testing.assert_close(torch.sigmoid(parts[2]), gate)
    for part, known in zip(run.scale(x, channel_gate, parts[2]), (out, gate), strict=True):
        assert torch.equal(part, known)
        assert part.stride() == known.stride()
    of_gates = run.scale_backward(grad, x, channel_gate, gate)
    acc, space = gate.dtype, tuple(range(2, x.dim()))
    for sums, factor, over in ((of_gates[0], gate, space), (of_gates[1], channel_gate, 1)):
        eager = (grad.to(acc) * x.to(acc) * factor).sum(over, keepdim=True)
        exact = (grad.double() * x.double() * factor).sum(over, keepdim=True)
        assert_as_good_as_eager("sums", sums, eager, exact)

    mask = [True] * 7
    whole = run.backward(grad, None, None, x, *weights, *saved, mask)
    of_logits = of_gates[1] * gate * (1 - gate)
    found = run.logits_backward(grad, of_gates[0], of_logits, x, *weights, *saved, mask)
    assert found[0].stride() == whole[0].stride()
    if x.dtype != torch.float64:  # whose gradients of weights may be sums that cancel
        return assert_strategies_agree("dx", found[0], whole[0], x.dtype)
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_reaches_the_gates(backend):
    x, weights, grad = given(CASE, torch.float32, backend)
    run = operators(backend)
    saved = run.forward_train(x, *weights)[1:]
    found = run.logits_backward(grad, None, None, x, *weights, *saved, [True] * 7)
    logits = run.logits(x, *weights)[1]
    torch.testing.assert_close(found[0], run.scale(grad, saved[0], logits)[0])
    assert all((gradient == 0).all() for gradient in found[1:])


def test_no_samples(backend):
    x, weights, _ = given(CASE, torch.float32, backend)
    parts = step_by_parts(operators(backend), x[:0], weights, x[:0])
    assert parts[0].shape == x[:0].shape
    for gradient, w in zip(parts[-6:], weights, strict=True):
        assert gradient.shape == w.shape
        assert (gradient == 0).all()


def test_any_number_of_threads_gives_the_same(threads):
    for shape in ((1, 64, 40, 40), (3, 64, 40, 40), (5, 2048, 3, 3)):
        found = []
        for count in (1, 2, 3):
            threads(count)
            x, weights, grad = given(Case("", shape, 8, (7, 7)), torch.float32, "cpu")
            found.append(step_by_parts(torch.ops.cbam_cuda, x, weights, grad))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_operators_are_what_they_say(backend):
    x, weights, grad = given(CASE, torch.float16, backend, "channels_last")
    run = operators(backend)
    library.opcheck(run.logits.default, (x, *weights))
    saved = run.logits(x, *weights)
    library.opcheck(run.scale.default, (x, *saved[:2]))
    library.opcheck(run.scale_backward.default, (grad, x, *saved[:2]))
    mask = [True, False] * 3 + [True]
    library.opcheck(run.logits_backward.default, (grad, *saved[:2], x, *weights, *saved, mask))


GATES = torch.zeros(2, 8, 1, 1), torch.zeros(2, 1, 6, 5)
WRONG = {
    "x of two dimensions": (torch.zeros(2, 8), *GATES, "x: expected 3, 4 or 5 dimensions, got 2"),
    "no pixels": (torch.zeros(2, 8, 0, 5), *GATES, "x: expected no empty channel or spatial"),
    "another channel_gate": (
        torch.zeros(2, 8, 6, 5),
        GATES[0][:1],
        GATES[1],
        r"channel_gate: expected shape \[2, 8, 1, 1\], got \[1, 8, 1, 1\]",
    ),
    "others of space": (
        torch.zeros(2, 8, 6, 5),
        GATES[0],
        GATES[1].transpose(2, 3),
        r"(logits|spatial_gate): expected shape \[2, 1, 6, 5\], got \[2, 1, 5, 6\]",
    ),
    "a gate in half": (torch.zeros(2, 8, 6, 5), GATES[0].half(), GATES[1], "channel_gate: .*dtype"),
}


@pytest.mark.parametrize(("x", "channel_gate", "spatial", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(x, channel_gate, spatial, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cbam_cuda.scale(x, channel_gate, spatial)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cbam_cuda.scale_backward(x, x, channel_gate, spatial)


def test_gradients_of_another_shape_are_refused():
    x, weights, _ = given(CASE, torch.float32, "cpu")
    run = torch.ops.cbam_cuda
    with pytest.raises(RuntimeError, match="grad_out: expected shape"):
        run.scale_backward(x[:1], x, *GATES)
    saved = run.logits(x, *weights)
    with pytest.raises(RuntimeError, match="grad_logits: expected shape"):
        run.logits_backward(x, None, GATES[0], x, *weights, *saved, [True] * 7)
