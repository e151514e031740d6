"""The modules as people use them: checkpoints, copies, devices, pickles."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import device_of
from torch import nn

import cbam_cuda
from cbam_cuda import CBAM, CBAM1d, CBAM2d, CBAM3d, CBAM_Module, reference


class Published(nn.Module):
    """The module that users have, as it is commonly written."""

    def __init__(self, dim: int, in_channels: int, ratio: int, kernel_size: int) -> None:
        super().__init__()
        conv = getattr(nn, f"Conv{dim}d")
        self.avg_pool = getattr(nn, f"AdaptiveAvgPool{dim}d")(1)
        self.max_pool = getattr(nn, f"AdaptiveMaxPool{dim}d")(1)
        self.fc1 = conv(in_channels, in_channels // ratio, 1)
        self.relu = nn.ReLU()
        self.fc2 = conv(in_channels // ratio, in_channels, 1)
        self.conv = conv(2, 1, kernel_size, padding=kernel_size // 2)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        avg = self.fc2(self.relu(self.fc1(self.avg_pool(x))))
        top = self.fc2(self.relu(self.fc1(self.max_pool(x))))
        x = x * self.sigmoid(avg + top)
        maps = [x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]]
        return x * self.sigmoid(self.conv(torch.cat(maps, 1)))


SHAPES = {1: (2, 32, 50), 2: (2, 32, 12, 9), 3: (2, 32, 5, 6, 4)}


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_replaces_the_published_module(backend, dim):
    """Checkpoints both ways, the same numbers, the same initial weights from the same seed."""
    torch.manual_seed(0)
    published = Published(dim, 32, 8, 7).to(device_of(backend))
    torch.manual_seed(0)
    ours = CBAM_Module(dim, 32, 8, 7, device=device_of(backend))
    for name, value in published.state_dict().items():
        if backend == "cpu":
            assert torch.equal(ours.state_dict()[name], value)
    torch.manual_seed(1)
    published = Published(dim, 32, 8, 7).to(device_of(backend))
    ours.load_state_dict(published.state_dict(), strict=True)
    published.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(SHAPES[dim], device=device_of(backend))
    torch.testing.assert_close(ours(x), published(x))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_reference_is_the_published_module(dim):
    published, plain = Published(dim, 32, 8, 7), reference.CBAM(32, 8, dim=dim)
    plain.load_state_dict(published.state_dict(), strict=True)
    x = torch.randn(SHAPES[dim])
    assert torch.equal(plain(x), published(x))


@pytest.mark.parametrize(("cls", "dim"), [(CBAM1d, 1), (CBAM2d, 2), (CBAM3d, 3)])
def test_classes_for_a_number_of_dimensions(backend, cls, dim):
    device = device_of(backend)
    module, general = cls(32, 4, 3, device=device), CBAM(32, 4, 3, dim=dim, device=device)
    general.load_state_dict(module.state_dict())
    x = torch.randn(SHAPES[dim], device=device_of(backend))
    assert torch.equal(module(x), general(x))


def test_defaults_are_those_of_the_paper():
    module = CBAM(64)
    assert module.fc1.weight.shape == (4, 64, 1, 1)
    assert module.conv.weight.shape == (1, 2, 7, 7)
    assert [name for name, _ in module.named_parameters()] == [
        f"{layer}.{kind}" for layer in ("fc1", "fc2", "conv") for kind in ("weight", "bias")
    ]


def test_without_biases(backend):
    module = CBAM(32, bias=False, conv_bias=False, device=device_of(backend))
    assert list(module.state_dict()) == ["fc1.weight", "fc2.weight", "conv.weight"]
    module(torch.randn(SHAPES[2], device=device_of(backend))).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("cls", [CBAM, CBAM2d, reference.CBAM])
def test_copies_give_the_same(cls, copied):
    module = cls(32, 4)
    x = torch.randn(SHAPES[2])
    other = copied(module)
    assert type(other) is cls
    assert torch.equal(other(x), module(x))
    assert other.fc1.weight.data_ptr() != module.fc1.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moves_to_another_dtype(backend, dtype):
    module = CBAM(32, 4, device=device_of(backend)).to(dtype)
    x = torch.randn(SHAPES[2], device=device_of(backend), dtype=dtype)
    assert module(x).dtype == dtype


def test_made_on_meta_and_filled_later(backend):
    module = CBAM(32, 4, device="meta")
    assert module(torch.empty(SHAPES[2], device="meta")).shape == SHAPES[2]
    filled = module.to_empty(device=device_of(backend))
    source = CBAM(32, 4, device=device_of(backend))
    filled.load_state_dict(source.state_dict())
    x = torch.randn(SHAPES[2], device=device_of(backend))
    assert torch.equal(filled(x), source(x))


def test_training_on_meta_describes_gradients():
    module = CBAM(32, 4, device="meta")
    x = torch.empty(SHAPES[2], device="meta", requires_grad=True)
    module(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in module.parameters())


def test_second_derivatives_on_meta_are_described():
    module = CBAM(32, 4, device="meta")
    x = torch.empty(SHAPES[2], device="meta", requires_grad=True)
    (dx,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    dx.sum().backward()
    assert x.grad.shape == x.shape
    assert module.conv.weight.grad.shape == module.conv.weight.shape


def test_functional_call(backend):
    module = CBAM(32, 4, device=device_of(backend), dtype=torch.float64)
    x = torch.randn(SHAPES[2], device=device_of(backend), dtype=torch.float64)
    others = {name: torch.randn_like(p) for name, p in module.named_parameters()}

    leaves = {name: p.requires_grad_() for name, p in others.items()}
    out = torch.func.functional_call(module, leaves, (x,))
    got = dict(
        zip(leaves, torch.autograd.grad(out.square().sum(), list(leaves.values())), strict=True)
    )
    plain = reference.CBAM(32, 4, device=device_of(backend), dtype=torch.float64)
    plain.load_state_dict(others)
    plain(x).square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


@pytest.mark.parametrize("frozen", [False, True])
def test_transforms_of_torch_func_take_the_plain_form(frozen):
    """They cannot pass through the operator; nothing may be lost silently."""
    module, plain = CBAM(32, 4).requires_grad_(not frozen), reference.CBAM(32, 4)
    plain.load_state_dict(module.state_dict())
    x, t = torch.randn(SHAPES[2]), torch.randn(SHAPES[2])
    expected = torch.func.jvp(plain, (x,), (t,))[1]
    assert expected.abs().sum() > 0
    torch.testing.assert_close(torch.func.jvp(module, (x,), (t,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = module(torch.autograd.forward_ad.make_dual(x, t))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, expected)
    gradient = torch.func.grad(lambda v: module(v).square().sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda v: plain(v).square().sum())(x))
    module.backend = "cpu"
    with pytest.raises(RuntimeError, match="backend: 'cpu' cannot be used under forward-mode"):
        torch.func.jvp(module, (x,), (t,))


def test_attention_is_differentiable(backend):
    module = CBAM(32, 4, device=device_of(backend), dtype=torch.float64)
    plain = reference.CBAM(32, 4, device=device_of(backend), dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(SHAPES[2], device=device_of(backend), dtype=torch.float64)
    for m in (module, plain):
        out, channel_gate, spatial_gate = m(x, return_attention=True)
        (out.sum() + channel_gate.square().sum() - spatial_gate.square().sum()).backward()
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_memory_format_is_kept(backend):
    x = torch.randn(SHAPES[2], device=device_of(backend)).to(memory_format=torch.channels_last)
    out = CBAM(32, 4, device=device_of(backend))(x)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_trains_beside_the_reference(backend):
    """Twenty steps of SGD on the same batches end in the same weights."""
    torch.manual_seed(0)
    ours = CBAM(16, 4, device=device_of(backend), dtype=torch.float64)
    plain = reference.CBAM(16, 4, device=device_of(backend), dtype=torch.float64)
    plain.load_state_dict(ours.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (ours, plain)]
    for _ in range(20):
        x = torch.randn(4, 16, 8, 8, device=device_of(backend), dtype=torch.float64)
        for module, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            (module(x) - x.relu()).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_that_are_computed_are_the_ones_used():
    """By a parametrization, or by hooks that put them in the place of parameters."""
    block, x = CBAM(16, ratio=4, backend="cpu"), torch.randn(2, 16, 6, 5)
    before = block(x)
    nn.utils.parametrizations.weight_norm(block.fc1)
    torch.testing.assert_close(block(x), before)
    with torch.no_grad():
        block.fc1.parametrizations.weight.original0 *= 3.0
    expected = reference.cbam(x, *block.weights())
    torch.testing.assert_close(block.weights().fc1_weight, block.fc1.weight)
    torch.testing.assert_close(block(x), expected)
    assert not torch.allclose(block(x), before)


def test_prints_its_settings():
    assert "dim=3, backend='cpu'" in repr(CBAM3d(32, backend="cpu"))
    assert "dim=2" in repr(reference.CBAM(32))


def test_public_names():
    assert {name for name in cbam_cuda.__all__ if not hasattr(cbam_cuda, name)} == set()
