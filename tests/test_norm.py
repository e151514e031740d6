"""Batch normalisation between the convolution and the sigmoid of the spatial gate."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import DTYPES, device_of
from tolerance import assert_as_good_as_eager
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cbam_cuda import CBAM, functional, reference

SHAPES = {1: (3, 32, 50), 2: (3, 32, 12, 9), 3: (3, 32, 5, 6, 4)}


@pytest.fixture(autouse=True)
def nothing_warned_of(monkeypatch):
    monkeypatch.setattr(functional, "_warned", set())


def pair(dim: int = 2, **options) -> tuple[CBAM, reference.CBAM]:
    """The fused module and the plain one, with weights and statistics as after training."""
    torch.manual_seed(0)
    plain = reference.CBAM(32, 4, 3, dim=dim, norm=True, **options)
    with torch.no_grad():
        for tensor in plain.norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.3, 1.5)
    ours = CBAM(32, 4, 3, dim=dim, norm=True, **options)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours.eval(), plain.eval()


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_known_statistics(backend, dtype, conv_bias, dim):
    """Values and all gradients, also those of the norm's weight and bias."""
    ours, plain = pair(dim, conv_bias=conv_bias)
    device = device_of(backend)
    ours, eager = (m.to(device, dtype) for m in (ours, plain))
    truth = copy.deepcopy(eager).to("cpu", torch.float64)
    x = torch.randn(SHAPES[dim], dtype=dtype, device=device)
    grad = torch.randn_like(x)
    found = differentiated(ours, x, grad)
    plain = differentiated(eager, x, grad)
    backwards = differentiated(eager, x.flip(0), grad.flip(0))
    exact = differentiated(truth, x.to("cpu", torch.float64), grad.to("cpu", torch.float64))
    for name, value in found.items():
        other = backwards[name].flip(0) if name in ("out", "x") else backwards[name]
        assert_as_good_as_eager(name, value, plain[name], exact[name], other)


def differentiated(module, x, grad) -> dict[str, torch.Tensor]:
    leaf, weights = x.detach().requires_grad_(), dict(module.named_parameters())
    out = module(leaf)
    gradients = torch.autograd.grad(out, [leaf, *weights.values()], grad)
    return dict(zip(["out", "x", *weights], [out.detach(), *gradients], strict=True))


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"eps": 0.5}, {"track_running_stats": False}]
)
def test_other_norms(options):
    ours, plain = pair()
    ours.norm = plain.norm = nn.BatchNorm2d(1, **options).eval()
    x = torch.randn(SHAPES[2])
    if "track_running_stats" in options:
        with pytest.warns(UserWarning, match="form as norm takes its statistics from the batch"):
            out = ours(x)
    else:
        out = ours(x)
    torch.testing.assert_close(out, plain(x))


def test_training_takes_the_plain_form_and_says_so_once(recwarn):
    ours, plain = pair()
    for _ in range(3):
        x = torch.randn(SHAPES[2])
        torch.testing.assert_close(ours.train()(x), plain.train()(x))
    assert ours.norm.num_batches_tracked == plain.norm.num_batches_tracked
    torch.testing.assert_close(ours.norm.running_var, plain.norm.running_var)
    (warning,) = (w for w in recwarn if "cbam_cuda" in str(w.message))
    assert warning.filename == torch.nn.modules.module.__file__ or warning.filename == __file__


def test_training_is_an_error_where_a_backend_is_named(backend):
    ours, _ = pair(device=device_of(backend))
    ours.backend = backend
    ours(torch.randn(SHAPES[2], device=device_of(backend)))
    with pytest.raises(
        RuntimeError, match=f"'{backend}' cannot be used: norm takes its statistics"
    ):
        ours.train()(torch.randn(SHAPES[2], device=device_of(backend)))


def test_statistics_that_change_are_the_ones_used():
    ours, plain = pair()
    x = torch.randn(SHAPES[2])
    before = ours(x)
    for module in (ours, plain):
        module.norm.running_mean.data.add_(1.0)  # which counts as no change of the tensor
    torch.testing.assert_close(ours(x), plain(x))
    assert not torch.allclose(ours(x), before)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: m.norm.register_forward_hook(lambda *_: None), "norm"),
        (lambda m: setattr(m, "norm", nn.Identity()), "norm"),
    ],
)
@pytest.mark.filterwarnings("ignore:cbam_cuda runs its plain")
def test_norms_that_are_more_than_weights_are_called(change, name):
    ours, plain = pair()
    for module in (ours, plain):
        change(module)
        assert module.layer_to_call() == name
    x = torch.randn(SHAPES[2])
    assert torch.equal(ours(x), plain(x))


def test_what_torch_folds_for_inference():
    ours, plain = pair()
    ours.conv, ours.norm = fuse_conv_bn_eval(ours.conv, ours.norm), None
    x = torch.randn(SHAPES[2])
    assert ours.layer_to_call() is None
    torch.testing.assert_close(ours(x), plain(x))


def test_synchronized():
    ours, plain = pair()
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert type(ours.norm) is nn.SyncBatchNorm
    assert ours.layer_to_call() is None
    x = torch.randn(SHAPES[2])
    torch.testing.assert_close(ours(x), plain(x))


def test_autocast(backend):
    ours, plain = pair(device=device_of(backend))
    x = torch.randn(SHAPES[2], device=device_of(backend))
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        out, eager = ours(x), plain(x)
    assert out.dtype == eager.dtype
    assert_as_good_as_eager("out", out, eager, plain.double()(x.double()))


def test_compiled(backend):
    torch.compiler.reset()
    ours, _ = pair(device=device_of(backend))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(SHAPES[2], device=device_of(backend), requires_grad=True)
    torch.testing.assert_close(compiled(x), ours(x))
    for module in (compiled, ours):
        module(x).square().sum().backward()
    first, second = (p.grad for p in (ours.norm.weight, ours.norm.bias))
    assert first.abs() > 0
    assert second.abs() > 0


def test_traced():
    """Statistics stay tensors of the module, which may change."""
    ours, _ = pair()
    network = nn.Sequential(nn.Conv2d(3, 32, 3), ours).eval()
    graph, x = torch.fx.symbolic_trace(network), torch.randn(2, 3, 9, 7)
    assert torch.equal(graph(x), network(x))
    ours.norm.running_mean += 1.0
    assert torch.equal(graph(x), network(x))
    with torch.no_grad():
        traced = torch.jit.trace(network, x)
        assert torch.equal(traced(x), network(x))


@pytest.mark.parametrize("hidden", [1, 7, 64])
def test_hidden_channels(hidden):
    block = CBAM(32, 999, hidden=hidden)
    assert block.fc1.weight.shape[:2] == (hidden, 32)
    assert block.fc2.weight.shape[:2] == (32, hidden)
    with pytest.raises(ValueError, match="hidden: expected at least 1, got 0"):
        CBAM(32, hidden=0)
    with pytest.raises(TypeError, match="hidden: expected an int, got float"):
        CBAM(32, hidden=2.0)
