"""Graphs that torch.fx and torch.jit make of a module."""

from __future__ import annotations

import io

import pytest
import torch
from cases import device_of
from torch import nn

from cbam_cuda import CBAM, ResidualCBAM, cbam, reference


@pytest.mark.parametrize("kind", [CBAM, reference.CBAM])
def test_fx(backend, kind):
    network = nn.Sequential(nn.Conv2d(3, 32, 3), kind(32, 4), nn.ReLU()).to(device_of(backend))
    x = torch.randn(2, 3, 9, 7, device=device_of(backend))
    graph = torch.fx.symbolic_trace(network)
    assert torch.equal(graph(x), network(x))
    gradients = []
    for module in (graph, network):
        network.zero_grad()
        module(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("kind", [CBAM, ResidualCBAM, reference.CBAM])
def test_fx_of_a_block_by_itself(kind):
    block = kind(32, 4)
    x, residual = (torch.randn(2, 32, 9, 7) for _ in "xr")
    graph = torch.fx.symbolic_trace(block, {"residual": None})
    assert torch.equal(graph(x), block(x))
    graph = torch.fx.symbolic_trace(block)
    ending = {"residual": residual, "activation": "relu"}
    assert torch.equal(graph(x, **ending), block(x, **ending))


def test_fx_of_the_function():
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = CBAM(32, 4)

        def forward(self, x):
            return cbam(x * 2, *self.block.weights(), residual=x)

    module, x = Calls(), torch.randn(2, 32, 9, 7)
    assert torch.equal(torch.fx.symbolic_trace(module)(x), module(x))


def test_jit_of_inference(backend):
    block = CBAM(32, 4, device=device_of(backend))
    x, other = (torch.randn(n, 32, 9, 7, device=device_of(backend)) for n in (2, 3))
    with torch.no_grad():
        traced = torch.jit.trace(block, x)
        assert torch.equal(traced(other), block(other))
    assert "forward_train" not in str(traced.inlined_graph)


def test_jit_of_training(backend):
    """From a file, as it would be on another machine."""
    block = CBAM(32, 4, device=device_of(backend))
    x, other = (torch.randn(n, 32, 9, 7, device=device_of(backend)) for n in (2, 3))
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(block, x, check_trace=False), file)
    file.seek(0)
    gradients = []
    for module in (torch.jit.load(file), block):
        leaf = other.clone().requires_grad_()
        module(leaf).square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in module.parameters())])
    assert all(map(torch.equal, *gradients))
