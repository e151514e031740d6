"""torch.compile, tracing and opcheck."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from cases import FEW_CASES, LAYOUTS, Case, device_of, leaves, make_weights, make_x, operators
from torch import library

from cbam_cuda import CBAM, cbam, choice, ops, reference

CASE = Case("", (3, 32, 9, 7), 4, (7, 7))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_one_graph_for_every_batch_size(backend, training):
    torch.compiler.reset()
    module = CBAM(32, 4, device=device_of(backend))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for samples in (2, 3, 5, 9):
        x = torch.randn(samples, 32, 9, 7, device=device_of(backend), requires_grad=training)
        out = compiled(x)
        assert torch.equal(out, module(x))
        if training:
            dx = torch.autograd.grad(out.sum(), x)[0]
            assert torch.equal(dx, torch.autograd.grad(module(x).sum(), x)[0])
    assert counter.frame_count == 1


def test_one_graph_for_every_size(backend):
    torch.compiler.reset()
    module = CBAM(32, 4, device=device_of(backend))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 32, 9, 7), (3, 32, 12, 8), (5, 32, 6, 14)):
        x = torch.randn(shape, device=device_of(backend))
        assert torch.equal(compiled(x), module(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_transforms_inside_are_those_of_the_plain_form(frozen):
    """Nothing may be lost silently: the operator has no derivative that they would see."""
    torch.compiler.reset()
    module, plain = CBAM(32, 4).requires_grad_(not frozen), reference.CBAM(32, 4)
    plain.load_state_dict(module.state_dict())
    x, t = torch.randn(2, 32, 9, 7), torch.randn(2, 32, 9, 7)

    def jvp(block):
        return lambda v, w: torch.func.jvp(block, (v,), (w,))[1]

    def grad(block):
        return torch.func.grad(lambda v: block(v).square().sum())

    compiled = torch.compile(jvp(module), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t), jvp(plain)(x, t))
    compiled = torch.compile(grad(module), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), grad(plain)(x))


def test_transforms_outside_are_those_of_the_plain_form():
    torch.compiler.reset()
    module, plain = CBAM(32, 4).requires_grad_(False), reference.CBAM(32, 4)
    plain.load_state_dict(module.state_dict())
    x, t = torch.randn(2, 32, 9, 7), torch.randn(2, 32, 9, 7)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x)  # a graph without them is there already
    forward_mode = torch.autograd.forward_ad
    with forward_mode.dual_level():
        try:
            out = compiled(forward_mode.make_dual(x, t))
        except torch._dynamo.exc.Unsupported:
            pytest.skip("this torch compiles nothing in forward mode")
        tangent = forward_mode.unpack_dual(out).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(plain, (x,), (t,))[1])


def test_the_plain_form_is_taken_and_said_while_tracing(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(ops, "_KERNELS", {ops.FUSED: frozenset()})
    monkeypatch.setattr(choice, "_warned", set())
    module, x = CBAM(32, 4), torch.randn(2, 32, 9, 7)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="plain PyTorch form on cpu: this build has no fused"):
        out = compiled(x)
    torch.testing.assert_close(out, reference.cbam(x, *module.weights()))


def test_what_a_gpu_lacks_is_a_constant_of_the_graph(monkeypatch):
    """It is asked for while tracing, of the device that x is on."""
    torch.compiler.reset()
    monkeypatch.setattr(ops._C, "cuda_problem", lambda index: f"device {index} is too old")
    monkeypatch.setattr(ops, "_cuda_problems", {})
    monkeypatch.setattr(ops, "_KERNELS", {ops.FUSED: frozenset(("cuda",))})

    @torch.compile(fullgraph=True, backend="eager")
    def block(x):
        return x + (ops.missing("cuda", 1) == "device 1 is too old")

    assert block(torch.zeros(1)) == 1
    assert ops.missing("cuda") == "device -1 is too old"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inductor_gives_the_same(backend, layout):
    torch.compiler.reset()
    module = CBAM(32, 4, device=device_of(backend))
    x = LAYOUTS[layout](torch.randn(3, 32, 9, 7, device=device_of(backend)))

    def block(x):
        return torch.relu(module(x * 2.0) + x)

    results = []
    for function in (block, torch.compile(block, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        out = function(leaf)
        out.square().sum().backward()
        results.append([out.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_with_attention_and_autocast(backend):
    torch.compiler.reset()
    module = CBAM(32, 4, device=device_of(backend))
    x = torch.randn(2, 32, 9, 7, device=device_of(backend))

    def function(x):
        with torch.autocast(device_of(backend), dtype=torch.bfloat16):
            return module(x.bfloat16(), return_attention=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x), function(x), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_exports(backend):
    module = CBAM(32, 4, device=device_of(backend)).eval()
    x = torch.randn(3, 32, 9, 7, device=device_of(backend))
    with torch.no_grad():
        sizes = {0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim("height")}
        program = torch.export.export(module, (x,), dynamic_shapes=(sizes,))
        more = torch.randn(5, 32, 11, 7, device=device_of(backend))
        assert torch.equal(program.module()(more), module(more))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_opcheck_of_the_forward(backend, case, layout):
    x = LAYOUTS[layout](make_x(case, torch.float32, backend))
    weights = make_weights(case, torch.float32, backend)
    library.opcheck(operators(backend).forward.default, (x, *weights))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_opcheck_of_training(backend, case, dtype, bias):
    weights = make_weights(case, dtype, backend, bias=bias)
    tensors = leaves(make_x(case, dtype, backend), weights)
    library.opcheck(operators(backend).forward_train.default, tuple(tensors))


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_opcheck_of_the_backward(backend, case):
    x = make_x(case, torch.float64, backend)
    weights = make_weights(case, torch.float64, backend)
    _, *saved = operators(backend).forward_train(x, *weights)
    grad = make_x(case, torch.float64, backend, seed=2)
    arguments = (grad, None, None, x, *weights, *saved, [True, False] + [True] * 5)
    library.opcheck(operators(backend).backward.default, arguments)
    # Static shapes: PyTorch cannot trace second derivatives of a convolution with symbolic ones.
    arguments = (grad.requires_grad_(), None, None, *leaves(x, weights), *saved, [True] * 7)
    library.opcheck(
        operators(backend).backward.default,
        arguments,
        test_utils=[
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_static",
        ],
    )


@pytest.mark.parametrize("samples", [0, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tracing_describes_what_comes_out(backend, dtype, layout, samples):
    x = LAYOUTS[layout](make_x(CASE, dtype, backend)[:samples])
    weights = make_weights(CASE, dtype, backend)
    real = operators(backend).forward_train(x, *weights)
    mode = torch._subclasses.FakeTensorMode()
    fake = operators(backend).forward_train(*(mode.from_tensor(t) for t in (x, *weights)))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        # torch.empty_like itself traces other strides than it gives to empty tensors.
        assert samples == 0 or a.stride() == b.stride()


def test_tracing_refuses_what_running_refuses():
    weights = make_weights(CASE, torch.float32, "meta")
    with pytest.raises(ValueError, match="fc1_weight: expected"):
        cbam(torch.empty(3, 31, 9, 7, device="meta"), *weights)
