"""Layers of a module that are more than their weights, so that they must be called."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from cbam_cuda import CBAM, CBAM1d, choice, reference


def add_hook(block):
    block.conv.register_forward_hook(lambda *_: None)


def prune_weights(block):
    prune.l1_unstructured(block.fc1, "weight", amount=0.5)


def normalise_weights(block):
    """As torch did before there were parametrizations: by a hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(block.fc1)


def wrap_forward(block):
    """As those do who bring weights to a device for the time of a call."""
    plain = block.fc2.forward
    block.fc2.forward = lambda pooled: plain(pooled)


class Adapted(nn.Module):
    """A layer and a small one beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, maps):
        return self.layer(maps) + self.scale * maps.mean(1, keepdim=True)


class Rounded(nn.Conv2d):
    """As layers do that learn to be quantized."""

    def forward(self, pooled):
        return self._conv_forward(pooled, self.weight.round(decimals=1), self.bias)


def replace_layer(block):
    block.conv = Adapted(block.conv)


def replace_class(block):
    block.fc1.__class__ = Rounded


def exchange(**settings):
    """For a layer of the standard class that pads or strides in another way."""

    def change(block):
        block.conv = nn.Conv2d(2, 1, block.conv.kernel_size, **settings)

    return change


class Averaged(nn.Conv2d):
    """As layers do that keep forward and its checks."""

    def _conv_forward(self, maps, weight, bias):
        return super()._conv_forward(maps, weight - weight.mean(), bias)


def replace_inner(block):
    block.conv.__class__ = Averaged


MORE = {
    "hook": ("conv", add_hook),
    "pruning": ("fc1", prune_weights),
    "weight norm": ("fc1", normalise_weights),
    "wrapped forward": ("fc2", wrap_forward),
    "adapter": ("conv", replace_layer),
    "subclass": ("fc1", replace_class),
    "what forward calls": ("conv", replace_inner),
    "padding": ("conv", exchange(padding=1, padding_mode="reflect")),
    "dilation": ("conv", exchange(padding=2, dilation=2)),
}


@pytest.fixture(autouse=True)
def nothing_warned_of(monkeypatch):
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.delenv("CBAM_CUDA_BACKEND", raising=False)


def by_layers(block, x):
    """CBAM as it is commonly written."""

    def mlp(pooled):
        return block.fc2(torch.relu(block.fc1(pooled)))

    y = x * torch.sigmoid(mlp(x.mean((2, 3), keepdim=True)) + mlp(x.amax((2, 3), keepdim=True)))
    maps = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
    return y * torch.sigmoid(block.conv(maps))


@pytest.mark.parametrize("kind", [CBAM, reference.CBAM])
@pytest.mark.parametrize("what", MORE)
@pytest.mark.filterwarnings("ignore:cbam_cuda runs its plain")
def test_layers_are_called_where_they_are_more_than_weights(what, kind):
    name, change = MORE[what]
    block, x = kind(16, 4, 3), torch.randn(2, 16, 6, 5)
    assert block.layer_to_call() is None
    change(block)
    assert block.layer_to_call() == name
    for _ in range(2):  # a step of training, and what it changed
        out = block(x)
        torch.testing.assert_close(out, by_layers(block, x))
        out.square().sum().backward()
        with torch.no_grad():
            for parameter in block.parameters():
                parameter -= 0.1 * parameter.grad
        block.zero_grad()


def test_padding_by_name_is_the_same():
    block, x = CBAM(16, 4, 3, backend="cpu"), torch.randn(2, 16, 6, 5)
    exchange(padding="same")(block)
    torch.testing.assert_close(block(x), by_layers(block, x))


def test_hooks_are_called():
    block, seen = CBAM(16, 4, 3, backend="reference"), []
    for layer in (block.fc1, block.fc2, block.conv):
        layer.register_forward_hook(lambda *_: seen.append("forward"))
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    block(torch.randn(2, 16, 6, 5)).sum().backward()
    assert seen.count("forward") == seen.count("backward") == 5


@pytest.mark.filterwarnings("ignore:cbam_cuda runs its plain")
def test_layers_of_float32_beside_16_bits():
    block, x = CBAM(16, 4, 3), torch.randn(2, 16, 6, 5, dtype=torch.bfloat16)
    expected = reference.cbam(x, *block.weights())
    add_hook(block)
    assert block(x).dtype == torch.bfloat16
    torch.testing.assert_close(block(x), expected)


class Counted(nn.Module):
    """A layer whose weights are integers, as those of a quantized one."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        steps = (layer.weight.detach() * 100).round().to(torch.int8)
        self.weight = nn.Parameter(steps, requires_grad=False)

    def forward(self, maps):
        return nn.functional.conv2d(maps, self.weight.to(maps.dtype) / 100, padding=1)


@pytest.mark.filterwarnings("ignore:cbam_cuda runs its plain")
def test_layers_of_integers():
    block, x = CBAM(16, 4, 3), torch.randn(2, 16, 6, 5)
    block.conv = Counted(block.conv)
    torch.testing.assert_close(block(x), by_layers(block, x))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 8, 6, 5), ValueError, r"x: expected 16 channels, got shape \[2, 8, 6, 5\]"),
        (torch.zeros(2, 16, 6, 5).int(), TypeError, "x: expected float32, .* got int32"),
        (torch.zeros(2, 16, 6), ValueError, "x: expected .* with 2 spatial dimensions"),
    ],
)
@pytest.mark.filterwarnings("ignore:cbam_cuda runs its plain")
def test_what_is_wrong_with_x_is_said_as_without(x, error, message):
    block = CBAM(16, 4, 3)
    add_hook(block)
    with pytest.raises(error, match=message):
        block(x)


def test_says_so_once_and_where_the_call_is():
    block, x = CBAM(16, 4, 3), torch.randn(2, 16, 6, 5)
    add_hook(block)
    with pytest.warns(UserWarning, match="runs its plain PyTorch form as conv has hooks") as told:
        block(x)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(x)


def test_a_named_backend_is_never_left_silently():
    block, x = CBAM(16, 4, 3, backend="cpu"), torch.randn(2, 16, 6, 5)
    add_hook(block)
    with pytest.raises(RuntimeError, match="backend: 'cpu' cannot be used: conv has hooks"):
        block(x)


def test_the_environment_may_name_one_too(monkeypatch):
    block, x = CBAM(16, 4, 3), torch.randn(2, 16, 6, 5)
    add_hook(block)
    monkeypatch.setenv("CBAM_CUDA_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="CBAM_CUDA_BACKEND: 'cpu' cannot be used: conv has"):
        block(x)


@pytest.mark.filterwarnings("ignore:cbam_cuda runs its plain")
def test_compiles():
    torch.compiler.reset()
    block, x = CBAM(16, 4, 3), torch.randn(2, 16, 6, 5)
    replace_layer(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), by_layers(block, x))


def test_a_sequence_takes_them_as_well():
    block, x = CBAM1d(16, 4, 3, backend="reference"), torch.randn(2, 16, 9)
    expected = block(x)
    add_hook(block)
    torch.testing.assert_close(block(x), expected)


def test_a_layer_without_them_is_fused_again():
    block = CBAM(16, 4, 3)
    prune_weights(block)
    assert block.layer_to_call() == "fc1"
    prune.remove(block.fc1, "weight")
    assert block.layer_to_call() is None
    assert copy.deepcopy(block).layer_to_call() is None
