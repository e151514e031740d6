"""What follows the block in its last pass: a residual, and a ReLU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from cases import (
    CASES,
    DTYPES,
    FEW_CASES,
    LARGE_CASES,
    LAYOUTS,
    NATIVE_LAYOUTS,
    Case,
    device_of,
    leaves,
    make_weights,
    make_x,
    operators,
)
from conftest import why_not
from regimes import SPLITS, plan_of
from tolerance import assert_as_good_as_eager, assert_strategies_agree
from torch import library

from cbam_cuda import CBAM, ResidualCBAM, cbam, choice, reference

CASE = Case("small", (3, 32, 9, 7), 4, (3, 3))
ENDINGS = {"residual": (True, None), "ReLU": (False, "relu"), "both": (True, "relu")}


def given(case, dtype, backend, layout="contiguous"):
    """x, the weights, and a residual like x."""
    x, residual = (LAYOUTS[layout](make_x(case, dtype, backend, seed)) for seed in (1, 2))
    return x, make_weights(case, dtype, backend), residual


def check(backend, case, dtype, layout="contiguous", ending="both"):
    x, weights, residual = given(case, dtype, backend, layout)
    adds, activation = ENDINGS[ending]

    def run(kind, dtype):
        wide = (None if w is None else w.to(dtype) for w in weights)
        added = residual.to(dtype) if adds else None
        return cbam(x.to(dtype), *wide, residual=added, activation=activation, backend=kind)

    out = run(backend, dtype)
    assert out.stride() == x.stride()
    truth = run("reference", torch.float64)
    assert_as_good_as_eager("out", out, run("reference", dtype), truth)


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(backend, case, layout):
    check(backend, case, torch.float32, layout)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_each_by_itself(backend, case, dtype, ending):
    check(backend, case, dtype, ending=ending)


def test_the_reference_is_the_formula():
    x, weights, residual = given(CASE, torch.float32, "reference")
    out = reference.cbam(x, *weights)
    found = reference.cbam(x, *weights, residual=residual, activation="relu")
    assert torch.equal(found, F.relu(out + residual))
    assert torch.equal(reference.cbam(x, *weights, residual=residual), out + residual)
    assert torch.equal(reference.cbam(x, *weights, activation="relu"), F.relu(out))


@pytest.mark.parametrize("ending", ["ReLU", "both"])
@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_past_the_caches_of_the_cpu(case, layout, ending):
    check("cpu", case, torch.float32, layout, ending)


@pytest.mark.skipif(why_not("emulated") is not None, reason="make emulator builds it")
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_of_samples_on_the_chip(case, layout, split, strategy):
    dtype = torch.float16  # float32 is part of the digests in test_emulated.py
    try:
        plan_of(case, dtype, layout, strategy=split)
    except ValueError as error:
        pytest.skip(str(error))
    x, weights, residual = given(case, dtype, "emulated", layout)
    found = []
    for name in ("streaming", split):
        strategy(name)
        for run in (operators("emulated").forward, operators("emulated").forward_train):
            out = run(x, *weights, residual, True)
            found.append(out if isinstance(out, torch.Tensor) else out[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert_strategies_agree("out", found[2], found[0], dtype)


EXPANDED = {  # over what it is the same
    "all samples": lambda t: t[:1],
    "all channels": lambda t: t[:, :1],
    "all positions": lambda t: t[:, :, :1, :1],
}


@pytest.mark.parametrize("of_residual", [*LAYOUTS, *EXPANDED])
@pytest.mark.parametrize("layout", [*NATIVE_LAYOUTS, "space transposed"])
def test_a_residual_of_any_strides(backend, layout, of_residual, strategy):
    strategy("streaming")
    x, weights, residual = given(FEW_CASES[0], torch.float16, backend, layout)
    if of_residual in LAYOUTS:
        other = LAYOUTS[of_residual](residual)
    else:
        other = EXPANDED[of_residual](residual).expand_as(residual)
        residual = other.contiguous()
    found, same = (
        cbam(x, *weights, residual=r, activation="relu", backend=backend) for r in (other, residual)
    )
    assert torch.equal(found, same)
    assert found.stride() == torch.empty_like(x).stride()


def test_nan_passes(backend):
    """As through torch's ReLU, from either side."""
    x, weights, residual = given(CASE, torch.float32, backend)
    x[0, 3, 2, 1] = torch.nan
    residual[1, 2, 3, 4] = torch.nan
    found = cbam(x, *weights, residual=residual, activation="relu", backend=backend)
    eager = cbam(x, *weights, residual=residual, activation="relu", backend="reference")
    assert torch.equal(found.isnan(), eager.isnan())
    assert found[1].isnan().sum() == 1


def test_no_samples(backend):
    x, weights, residual = given(CASE, torch.float32, backend)
    given_grads = leaves(x[:0], weights)
    r = residual[:0].requires_grad_()
    out = cbam(*given_grads, residual=r, activation="relu", backend=backend)
    assert out.shape == x[:0].shape
    assert torch.autograd.grad(out.sum(), r)[0].shape == r.shape


# Gradients


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
def test_gradients_are_those_of_the_block(backend, layout, dtype, ending, norm):
    """From what passes the ReLU: where out is more than zero."""
    adds, activation = ENDINGS[ending]
    x, _, residual = given(CASE, dtype, backend, layout)
    x.requires_grad_()
    residual.requires_grad_()
    block = CBAM(32, 4, norm=norm, backend=backend, device=x.device, dtype=dtype)
    grad = LAYOUTS[layout](make_x(CASE, dtype, backend, seed=5))
    inputs = [x, *block.parameters(), *([residual] if adds else [])]
    ended = block(x, residual=residual if adds else None, activation=activation)
    found = torch.autograd.grad(ended, inputs, grad)
    passes = (ended > 0) if activation else torch.ones_like(ended)
    of_block = torch.autograd.grad(block(x), inputs[: len(inputs) - adds], grad * passes)
    expected = (*of_block, *([grad * passes] if adds else []))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def test_only_what_is_asked_for(backend):
    x, weights, residual = given(CASE, torch.float32, backend)
    r = residual.clone().requires_grad_()
    out = cbam(x, *weights, residual=r, backend=backend)
    (of_residual,) = torch.autograd.grad(out, r, residual)
    assert torch.equal(of_residual, residual)
    x.requires_grad_()
    out = cbam(x, *weights, residual=residual, activation="relu", backend=backend)
    (of_x,) = torch.autograd.grad(out, x, residual)
    assert of_x.shape == x.shape
    _, channel_gate, _ = cbam(x, *weights, residual=r, return_attention=True, backend=backend)
    of_x, of_residual = torch.autograd.grad(channel_gate.sum(), (x, r), allow_unused=True)
    assert of_residual is None
    assert (of_x != 0).any()


@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_a_residual_alone_behind_a_norm(backend, form):
    block = CBAM(32, 4, norm=True, backend=backend, device=device_of(backend)).requires_grad_(False)
    x, _, residual = given(CASE, torch.float32, backend)
    r = residual.clone().requires_grad_()
    called = block if form == "eager" else torch.compile(block, backend="aot_eager")
    out = called(x, residual=r, activation="relu")
    (of_residual,) = torch.autograd.grad(out, r, residual)
    assert torch.equal(of_residual, residual * (out > 0))


def test_x_may_be_the_residual(backend):
    x, weights, _ = given(CASE, torch.float32, backend)
    x.requires_grad_()
    out = cbam(x, *weights, residual=x, backend=backend)
    plain = cbam(x, *weights, backend=backend) + x
    torch.testing.assert_close(out, plain)
    grads = (torch.autograd.grad(o.square().sum(), x)[0] for o in (out, plain))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_second_derivatives(backend, norm):
    case = Case("", (2, 3, 3, 2), 1, (3, 3))
    block = CBAM(
        3, 3, 3, norm=norm, backend=backend, device=device_of(backend), dtype=torch.float64
    )
    x, residual = (make_x(case, torch.float64, backend, seed).requires_grad_() for seed in (1, 2))

    def ended(x, residual):
        return block(x, residual=residual, activation="relu")

    assert torch.autograd.gradcheck(ended, (x, residual))
    assert torch.autograd.gradgradcheck(ended, (x, residual))


# What torch makes of it


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_one_graph(backend, training, norm):
    torch.compiler.reset()
    block = CBAM(32, 4, norm=norm, device=device_of(backend)).train(training)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def ended(x, residual):
        return block(x, residual=residual, activation="relu")

    compiled = torch.compile(ended, fullgraph=True, dynamic=True, backend=counter)
    for samples in (2, 3, 5):
        shape = (samples, 32, 9, 7)
        inputs = [
            torch.randn(shape, device=device_of(backend), requires_grad=training) for _ in "xr"
        ]
        with torch.set_grad_enabled(training):
            found, expected = compiled(*inputs), ended(*inputs)
            assert torch.equal(found, expected)
        if training:
            grad = torch.randn_like(found)
            gradients = (torch.autograd.grad(out, inputs, grad) for out in (found, expected))
            assert all(map(torch.equal, *gradients))
    assert counter.frame_count == 1 + (norm and training)  # as in test_norm.py


def test_graphs_of_fx_and_jit(backend):
    class Ended(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cbam = CBAM(32, 4)

        def forward(self, x, residual):
            return self.cbam(x, residual=residual, activation="relu")

    block = Ended().to(device_of(backend))
    x, residual = (torch.randn(2, 32, 9, 7, device=device_of(backend)) for _ in "xr")
    graph = torch.fx.symbolic_trace(block)
    trained = torch.jit.trace(block, (x, residual), check_trace=False)
    gradients = []
    for form in (block, graph, trained):
        leaf = residual.clone().requires_grad_()
        out = form(x, leaf)
        gradients.append(torch.autograd.grad(out.square().sum(), [leaf, *form.parameters()]))
    assert all(map(torch.equal, gradients[0], gradients[1]))
    assert all(map(torch.equal, gradients[0], gradients[2]))
    with torch.no_grad():
        traced = torch.jit.trace(block, (x, residual))
        for form in (graph, traced):
            assert torch.equal(form(x, residual), block(x, residual))
        assert "aten::relu" not in str(traced.inlined_graph)


def test_operators_are_what_they_say(backend):
    x, weights, residual = given(CASE, torch.float32, backend, "channels_last")
    run = operators(backend)
    library.opcheck(run.forward.default, (x, *weights, residual, True))
    tensors = [t.detach().requires_grad_() for t in (x, *weights, residual)]
    library.opcheck(run.forward_train.default, (*tensors, True))
    channel_gate, logits, *_ = run.logits(x, *weights)
    library.opcheck(run.scale.default, (x, channel_gate, logits, residual, True))


def test_operators_can_do_without(backend):
    x, weights, _ = given(CASE, torch.float32, backend)
    tensors = leaves(x, weights)
    out = operators(backend).forward_train(*tensors)[0]
    assert torch.equal(out, operators(backend).forward(x, *weights))
    assert all(g is not None for g in torch.autograd.grad(out.sum(), tensors))


def test_meta():
    x = torch.empty(2, 32, 9, 7, device="meta")
    block = CBAM(32, 4, device="meta")
    assert block(x, residual=x, activation="relu").shape == x.shape
    with pytest.raises(ValueError, match="residual: expected shape"):
        block(x, residual=x[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_autocast_gives_the_dtype_of_the_plain_form(backend, norm, dtype):
    """A residual that PyTorch would widen to what x becomes is widened."""
    device = device_of(backend)
    block = CBAM(32, 4, norm=norm, device=device)
    x, residual = (torch.randn(2, 32, 9, 7, device=device).to(dtype) for _ in "xr")
    plain = reference.CBAM(32, 4, norm=norm, device=device)
    plain.load_state_dict(block.state_dict())
    ending = {"residual": residual.to(torch.bfloat16), "activation": "relu"}
    truth = copy.deepcopy(plain).double()(
        x.double(), residual=ending["residual"].double(), activation="relu"
    )
    # PyTorch's own cat refuses bfloat16 under autocast to float16.
    for kind in {torch.bfloat16, torch.float16 if dtype == torch.float32 else dtype}:
        with torch.autocast(device, dtype=kind):
            found, eager = block(x, **ending), plain(x, **ending)
        assert_as_good_as_eager("out", found, eager, truth)


def test_plain_form_of_layers_with_hooks(monkeypatch):
    monkeypatch.setattr(choice, "_warned", set())
    block = CBAM(32, 4)
    x, residual = (torch.randn(2, 32, 9, 7) for _ in "xr")
    fused = block(x, residual=residual, activation="relu")
    block.fc1.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="plain PyTorch form as fc1 has hooks"):
        plain = block(x, residual=residual, activation="relu")
    torch.testing.assert_close(plain, fused)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_a_narrower_residual_is_widened(backend, narrow):
    x, weights, residual = given(CASE, torch.float32, backend)
    found = cbam(x, *weights, residual=residual.to(narrow), backend=backend)
    wide = cbam(x, *weights, residual=residual.to(narrow).float(), backend=backend)
    assert torch.equal(found, wide)


def test_of_a_block_with_a_residual_of_its_own(backend):
    block = ResidualCBAM(32, 4, device=device_of(backend))
    x, residual = (torch.randn(2, 32, 9, 7, device=device_of(backend)) for _ in "xr")
    out = cbam(x, *block.weights())
    torch.testing.assert_close(block(x), out + x)
    torch.testing.assert_close(
        block(x, residual=residual, activation="relu"), F.relu(out + x + residual)
    )


def test_any_number_of_threads_gives_the_same(threads):
    for shape in ((1, 64, 40, 40), (3, 64, 40, 40)):
        found = []
        for count in (1, 2, 3):
            threads(count)
            x, weights, residual = given(Case("", shape, 8, (7, 7)), torch.float32, "cpu")
            found.append(cbam(x, *weights, residual=residual, activation="relu", backend="cpu"))
        assert all(torch.equal(found[0], other) for other in found[1:])


# What is refused

X = torch.zeros(2, 32, 9, 7)
WRONG = {
    "no tensor": (1.0, None, TypeError, "residual: expected a Tensor or None, got float"),
    "shape": (X[:1], None, ValueError, r"residual: expected shape \[2, 32, 9, 7\], got \[1, 32"),
    "dtype": (X.double(), None, TypeError, "residual: expected float32, .*, got float64"),
    "numbers": (X.int(), None, TypeError, "residual: expected float32, .*, got int32"),
    "device": (X.to("meta"), None, ValueError, "residual: expected device cpu, .*, got meta"),
    "layout": (X.to_sparse(), None, TypeError, "residual: expected a strided tensor"),
    "activation": (X, "gelu", ValueError, "activation: expected None or 'relu', got 'gelu'"),
    "no name": (None, F.relu, ValueError, "activation: expected None or 'relu', got <function"),
}


def _with_a_hook():
    block = CBAM(32, 4, backend="reference")
    block.fc1.register_forward_hook(lambda *_: None)
    return block


BLOCKS = {
    "fused": lambda: CBAM(32, 4),
    "plain": lambda: CBAM(32, 4, backend="reference"),
    "with a hook": _with_a_hook,
    "with a norm": lambda: CBAM(32, 4, norm=True),
    "the reference's layers": lambda: reference.CBAM(32, 4, norm=True),
    "with x added": lambda: ResidualCBAM(32, 4),
}


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize(("residual", "activation", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(residual, activation, error, message, make):
    with pytest.raises(error, match=message):
        make()(X, residual=residual, activation=activation)


@pytest.mark.parametrize("residual", [X[:1], X.half()], ids=["shape", "dtype"])
def test_operators_refuse_the_same(residual):
    weights = make_weights(CASE, torch.float32)
    with pytest.raises(RuntimeError, match="residual: expected"):
        torch.ops.cbam_cuda.forward(X, *weights, residual)
