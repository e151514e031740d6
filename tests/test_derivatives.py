"""Derivatives where a graph, a transform or a loss does not ask as a plain step does."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import device_of
from torch import nn

from cbam_cuda import CBAM, reference

each_block = pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])


def pair(norm: bool, backend: str = "cpu") -> tuple[CBAM, reference.CBAM]:
    """In float64, with the same weights, training."""
    torch.manual_seed(0)
    place = {"dtype": torch.float64, "device": device_of(backend)}
    ours = CBAM(16, 4, 3, norm=norm, backend=backend, **place)
    plain = reference.CBAM(16, 4, 3, norm=norm, **place)
    plain.load_state_dict(ours.state_dict(), strict=True)
    return ours, plain


def input_of(block: nn.Module, *, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    weight = next(block.parameters())
    return torch.randn(2, 16, 5, 6, dtype=weight.dtype, device=weight.device)


@each_block
@pytest.mark.parametrize("activation", [None, "relu"])
def test_forward_mode_through_a_backward(backend, activation, norm):
    """What it meets is what PyTorch's own operators can pass on."""
    found = []
    for block in pair(norm, backend):
        x, cotangent, tangent = (input_of(block, seed=seed) for seed in range(3))
        x.requires_grad_()
        out = block(x, activation=activation)
        wanted = [x, *block.parameters()]

        def pulled(v, out=out, wanted=wanted):
            return torch.autograd.grad(out, wanted, v, retain_graph=True)

        ad = torch.autograd.forward_ad
        with ad.dual_level():
            duals = pulled(ad.make_dual(cotangent, tangent))
            found.append([ad.unpack_dual(dual).tangent for dual in duals])
        found[-1] += torch.func.jvp(pulled, (cotangent,), (tangent,))[1]
        assert not any(t.requires_grad for t in found[-1])
    torch.testing.assert_close(*found)


@each_block
def test_a_loss_of_the_channel_gate_leaves_what_is_behind_alone(backend, norm):
    for block in pair(norm, backend):
        _, channel_gate, _ = block(input_of(block), return_attention=True)
        channel_gate.sum().backward()
        names = {name for name, p in block.named_parameters() if p.grad is None}
        behind = {"conv.weight", "conv.bias"} | ({"norm.weight", "norm.bias"} if norm else set())
        assert names == behind


def graphs_of(network: nn.Module, x: torch.Tensor) -> list:
    torch.compiler.reset()
    return [
        torch.export.export(network, (x,)).module(),
        torch.jit.trace(network, x),
        torch.compile(network, fullgraph=True, backend="aot_eager"),
    ]


def test_graphs_that_were_made_without_gradients_have_them(backend):
    ours, plain = pair(False, backend)
    x = input_of(ours)
    frozen = nn.Sequential(nn.Tanh(), ours).requires_grad_(False)
    found = []
    for graph in (*graphs_of(frozen, x), nn.Sequential(nn.Tanh(), plain)):
        given = x.clone().requires_grad_()
        found += torch.autograd.grad(graph(given).sum(), given)
    for gradient in found[:-1]:
        torch.testing.assert_close(gradient, found[-1])
    with torch.no_grad():
        exported = torch.export.export(ours.requires_grad_(), (x,)).module()
    exported(x).sum().backward()
    plain(x).sum().backward()
    gradients = [[p.grad for p in block.parameters()] for block in (exported, plain)]
    torch.testing.assert_close(*gradients)


@each_block
def test_second_derivatives_of_graphs(backend, norm):
    ours, plain = pair(norm, backend)
    graphs = (
        torch.export.export(copy.deepcopy(ours), (input_of(ours),)).module(),
        torch.compile(ours, fullgraph=True, backend="eager"),
        plain,
    )
    found = []
    for graph in graphs:
        x = input_of(ours).requires_grad_()
        (first,) = torch.autograd.grad(graph(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, *graph.parameters()]))
    for second in found[:-1]:
        torch.testing.assert_close(second, found[-1])


@each_block
def test_exported_training_is_saved_and_loaded(norm):
    ours, _ = pair(norm)
    x, file = input_of(ours), io.BytesIO()
    torch.export.save(torch.export.export(copy.deepcopy(ours), (x,)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert torch.equal(loaded(x), ours(x))
    torch.testing.assert_close(loaded.state_dict(), ours.state_dict())
