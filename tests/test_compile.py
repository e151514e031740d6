"""torch.compile, tracing and opcheck."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from cases import FEW_CASES, LAYOUTS, Case, device_of, leaves, make_weights, make_x, operators
from torch import library

from cbam_cuda import CBAM, cbam

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
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
        more = torch.randn(5, 32, 9, 7, device=device_of(backend))
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
