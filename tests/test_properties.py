"""Shapes, strides, dtypes and flags that nobody chose, against the reference."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, Case, gradients, leaves, make_weights, make_x
from conftest import FUSED, why_not
from tolerance import assert_as_good_as_eager

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = [name for name in FUSED if why_not(name) is None]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dim = draw(st.integers(1, 3))
    samples, channels = draw(st.integers(0, 4)), draw(st.integers(1, 40))
    space = draw(st.lists(st.integers(1, 24 // dim), min_size=dim, max_size=dim))
    kernel = draw(st.lists(st.sampled_from([1, 3, 5, 7, 9]), min_size=dim, max_size=dim))
    return Case("drawn", (samples, channels, *space), draw(st.integers(1, 9)), tuple(kernel))


def scrambled(x: torch.Tensor, order: list[int]) -> torch.Tensor:
    """The same values with the dimensions in another order in memory."""
    back = [order.index(i) for i in range(x.dim())]
    return x.permute(order).contiguous().permute(back)


@settings(max_examples=200)
@given(case=cases(), data=st.data())
def test_any_shape_stride_dtype_and_flag(case, data):
    backend = data.draw(st.sampled_from(BACKENDS))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    x, grad = make_x(case, dtype, backend), make_x(case, dtype, backend, seed=2)
    layout = data.draw(st.sampled_from(["scrambled", *LAYOUTS]))
    if layout == "scrambled":
        x = scrambled(x, data.draw(st.permutations(range(x.dim()))))
    else:
        x = LAYOUTS[layout](x)
    weights = make_weights(case, dtype, backend, bias=data.draw(st.booleans()))
    tensors = leaves(x, weights)
    needed = data.draw(st.lists(st.booleans(), min_size=7, max_size=7).filter(any))
    truths = leaves(x, weights, torch.float64)
    for t, truth, need in zip(tensors, truths, needed, strict=True):
        if t is not None:
            t.requires_grad_(need)
            truth.requires_grad_(need)
    if not any(t is not None and t.requires_grad for t in tensors):
        return
    fused, eager = gradients(backend, tensors, grad), None
    if case.shape[0]:  # some of PyTorch's own operators refuse an empty batch
        eager = gradients("reference", tensors, grad)
        truth = gradients("reference", truths, grad.double())
        for i, three in enumerate(zip(fused, eager, truth, strict=True)):
            if three[2] is not None:
                assert_as_good_as_eager(f"result {i}", *three)
    assert fused[0].stride() == torch.empty_like(x).stride()
