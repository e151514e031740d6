"""Other people's modules become fused ones, and come back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import device_of
from torch import nn
from variants import (
    KNOWN,
    Block,
    Official,
    Pair,
)

import cbam_cuda
from cbam_cuda import CBAM, choice, reference

CHANNELS = 32
SHAPES = {"volume": (2, CHANNELS, 4, 6, 5), "late": (2, CHANNELS, 7, 7)}


@pytest.fixture(autouse=True)
def nothing_warned_of(monkeypatch):
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.delenv("CBAM_CUDA_BACKEND", raising=False)


def filled(block: nn.Module) -> nn.Module:
    """With statistics and weights as after training."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in block.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor) * 0.3)
            if name.endswith("running_var"):
                tensor.copy_(tensor.abs() + 0.5)
    return block


def known(name: str, **place) -> tuple[nn.Module, torch.Tensor]:
    block = filled(KNOWN[name](CHANNELS)).to(**place)
    return block, torch.randn(SHAPES.get(name, (2, CHANNELS, 9, 6)), **place)


@pytest.mark.parametrize("name", KNOWN)
def test_computes_the_same(backend, name):
    block, x = known(name, device=device_of(backend))
    block.eval()
    expected = block(x)
    model = nn.Sequential(nn.Identity(), block, nn.ReLU())
    assert cbam_cuda.convert(model) is model
    assert isinstance(model[1], CBAM)
    assert not model[1].training
    model[1].backend = backend
    torch.testing.assert_close(model[1](x), expected)
    out, channel_gate, _ = model[1](x, return_attention=True)
    torch.testing.assert_close(out, expected)
    assert channel_gate.shape == (2, CHANNELS, *(1 for _ in x.shape[2:]))


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.filterwarnings("error:cbam_cuda runs its plain")
def test_trains_alike(name):
    """The same gradients, statistics and, after each step, outputs."""
    block, _ = known(name, dtype=torch.float64)
    model = nn.Sequential(copy.deepcopy(block))
    cbam_cuda.convert(model)
    pair = (block, model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in pair]
    for _ in range(3):
        x = torch.randn(SHAPES.get(name, (2, CHANNELS, 9, 6)), dtype=torch.float64)
        outs = [m(x) for m in pair]
        torch.testing.assert_close(outs[1], outs[0])
        for out, optimizer in zip(outs, optimizers, strict=True):
            optimizer.zero_grad()
            out.square().sum().backward()
            optimizer.step()
    cbam_cuda.revert(model)
    for key, value in block.state_dict().items():
        torch.testing.assert_close(model.state_dict()[f"0.{key}"], value, msg=key)


@pytest.mark.parametrize("name", KNOWN)
def test_comes_back(name):
    """Class, state and what is frozen; also after the block has moved to another dtype."""
    block, x = known(name)
    block.eval().requires_grad_(False)
    values, expected = block.state_dict(), block(x)
    fused = cbam_cuda.convert(block)
    assert fused is not block
    assert not any(p.requires_grad for p in fused.parameters())
    back = cbam_cuda.revert(fused)
    assert type(back) is type(block)
    assert not back.training
    assert list(back.state_dict()) == list(values)
    assert all(torch.equal(back.state_dict()[key], value) for key, value in values.items())
    assert not any(p.requires_grad for p in back.parameters())
    assert torch.equal(back(x), expected)
    double = cbam_cuda.revert(cbam_cuda.convert(back).double())
    assert double(x.double()).dtype == torch.float64


def test_halves_in_one_module_are_known():
    """What the message about them advises."""

    class Better(Block):
        def __init__(self, channels):
            super().__init__(channels)
            self.cbam = Pair(channels)
            del self.ca, self.sa

        def forward(self, x):
            return x + self.cbam(self.conv1(x))

    block, x = Better(CHANNELS), torch.randn(2, CHANNELS, 9, 6)
    expected = block(x)
    torch.testing.assert_close(cbam_cuda.convert(block)(x), expected)
    assert isinstance(block.cbam, CBAM)


def test_all_in_a_network_are_swapped_wherever_they_are_used():
    shared = Official(CHANNELS)
    model = nn.Sequential(
        shared, nn.Conv2d(CHANNELS, 16, 1), nn.Sequential(Pair(16, 4)), nn.Conv2d(16, CHANNELS, 1)
    )
    model.add_module("again", shared)
    model.eval()
    x = torch.randn(2, CHANNELS, 9, 6)
    expected = model(x)
    cbam_cuda.convert(model)
    assert model[0] is model.again
    assert sum(isinstance(m, CBAM) for m in model.modules()) == 2
    torch.testing.assert_close(model(x), expected)
    assert cbam_cuda.convert(model) is model  # nothing is left to do
    cbam_cuda.revert(model)
    assert model[0] is model.again
    assert type(model[0]) is Official
    torch.testing.assert_close(model(x), expected)


def test_hidden_channels_are_those_of_the_weights():
    block = Pair(CHANNELS)
    block.ca.fc[0], block.ca.fc[2] = nn.Conv2d(CHANNELS, 5, 1), nn.Conv2d(5, CHANNELS, 1)
    x = torch.randn(2, CHANNELS, 9, 6)
    expected, fused = block(x), cbam_cuda.convert(block)
    assert fused.fc1.weight.shape[:2] == (5, CHANNELS)
    torch.testing.assert_close(fused(x), expected)


def test_parameters_that_fit_are_the_same():
    """So that an optimizer that has them goes on."""
    block = Pair(CHANNELS)
    fused = cbam_cuda.convert(block)
    assert fused.fc1.weight is block.ca.fc[0].weight
    assert fused.conv.weight is block.sa.conv1.weight


def test_modes_and_frozen_statistics_are_kept():
    block = Official(CHANNELS)
    block.SpatialGate.spatial.bn.eval()
    fused = cbam_cuda.convert(block)
    assert fused.training
    assert not fused.norm.training
    assert fused.norm.momentum == 0.01
    back = cbam_cuda.revert(fused)
    assert back.training
    assert not back.SpatialGate.spatial.bn.training


def test_synchronized_norms_are_kept():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(Official(CHANNELS)).eval()
    x = torch.randn(2, CHANNELS, 9, 6)
    expected, fused = block(x), cbam_cuda.convert(block)
    assert type(fused.norm) is nn.SyncBatchNorm
    torch.testing.assert_close(fused(x), expected)


def test_on_meta_and_filled_later():
    with torch.device("meta"):
        model = nn.Sequential(Official(CHANNELS))
    cbam_cuda.convert(model)
    assert model[0].conv.weight.is_meta
    source = nn.Sequential(cbam_cuda.convert(filled(Official(CHANNELS))))
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, CHANNELS, 9, 6)
    torch.testing.assert_close(model.eval()(x), source.eval()(x))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_can_be_reverted(copied):
    block = filled(Official(CHANNELS))
    other = cbam_cuda.revert(copied(cbam_cuda.convert(copy.deepcopy(block))))
    assert type(other) is Official
    for key, value in block.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


def test_checkpoints_have_the_names_of_this_package():
    fused, file = cbam_cuda.convert(filled(Official(CHANNELS))), io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    other = CBAM(CHANNELS, conv_bias=False, norm=True)
    other.load_state_dict(torch.load(file), strict=True)
    x = torch.randn(2, CHANNELS, 9, 6)
    torch.testing.assert_close(other.eval()(x), fused.eval()(x))


def test_random_numbers_of_the_caller_are_left_alone():
    block = Pair(CHANNELS)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    cbam_cuda.convert(block)
    assert torch.equal(torch.rand(4), expected)


def test_one_in_several_containers_stays_one():
    block = Pair(CHANNELS)
    model = cbam_cuda.convert(nn.Sequential(block, nn.Sequential(block), nn.Sequential(block)))
    assert type(model[1]) is nn.Sequential
    assert model[0] is model[1][0] is model[2][0]


def test_gradients_that_are_there_go_along():
    block = Official(CHANNELS)
    block(torch.randn(2, CHANNELS, 9, 6)).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in block.named_parameters()}
    back = cbam_cuda.revert(cbam_cuda.convert(block))
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter.grad, expected[name])


def test_where_tensors_are_made_elsewhere():
    with torch.device("meta"):
        model = cbam_cuda.convert(nn.Sequential(Official(CHANNELS)))
        assert model[0].conv.weight.is_meta
    with torch.inference_mode():
        assert isinstance(cbam_cuda.convert(Pair(CHANNELS)), CBAM)


@pytest.mark.parametrize("name", ["official", "own norm"])
def test_norms_that_have_changed_stay_so(name):
    block, x = known(name)
    fused = cbam_cuda.convert(block.eval())
    fused.norm.eps, fused.norm.momentum = 0.5, None
    expected, back = fused(x), cbam_cuda.revert(fused)
    torch.testing.assert_close(back(x), expected)
    (norm,) = (m for m in back.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.momentum is None


def test_norms_that_are_synchronized_since_stay_so():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(cbam_cuda.convert(Official(CHANNELS)).eval())
    back = cbam_cuda.revert(block)
    assert type(back.SpatialGate.spatial.bn) is nn.SyncBatchNorm
    assert not back.SpatialGate.spatial.bn.training


def test_converting_the_reference_and_back():
    plain, x = reference.CBAM(CHANNELS), torch.randn(2, CHANNELS, 9, 6)
    expected, fused = plain(x), cbam_cuda.convert(plain)
    torch.testing.assert_close(fused(x), expected)
    assert type(cbam_cuda.revert(fused)) is reference.CBAM


def test_timm():
    contestants = pytest.importorskip("benchmarks.contestants")
    contestants._make_torchvision_importable()
    cbam = pytest.importorskip("timm.layers.cbam")
    block = filled(cbam.CbamModule(40)).eval()  # 40 / 16 is rounded, to 2
    x = torch.randn(2, 40, 9, 6)
    expected, fused = block(x), cbam_cuda.convert(block)
    torch.testing.assert_close(fused(x), expected)
    assert type(cbam_cuda.revert(fused)) is cbam.CbamModule
    with pytest.raises(ValueError, match=r"LightCbamModule\): expected an MLP"):
        cbam_cuda.convert(cbam.LightCbamModule(40))


def test_a_network_of_timm():
    """All of its blocks, in a step of training and in inference."""
    contestants = pytest.importorskip("benchmarks.contestants")
    contestants._make_torchvision_importable()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", block_args={"attn_layer": "cbam"}).double()
    for name, parameter in plain.named_parameters():
        if name.endswith("bn2.weight"):  # 0 at first, which hides what comes before
            nn.init.uniform_(parameter, 0.2, 0.6)
    fused = cbam_cuda.convert(copy.deepcopy(plain))
    assert sum(isinstance(m, CBAM) for m in fused.modules()) == 8
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for network in (plain, fused):
        network(x).square().sum().backward()
    cbam_cuda.revert(fused)
    gradients = [{name: p.grad for name, p in m.named_parameters()} for m in (fused, plain)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(cbam_cuda.convert(fused.eval())(x), plain.eval()(x))
