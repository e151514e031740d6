"""What is not converted, or reverted, and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from variants import REFUSED, ChannelAttention, Official, Optional, Pair, SpatialAttention

import cbam_cuda
from cbam_cuda import CBAM

CHANNELS = 32


@pytest.mark.parametrize("name", REFUSED)
def test_what_computes_something_else_is_refused(name):
    make, reason = REFUSED[name]
    model = nn.Sequential(Pair(CHANNELS), nn.ModuleDict({"inner": make(CHANNELS)}))
    before = list(model.modules())
    with pytest.raises(ValueError, match=rf"(?s)got\n- 1\.inner.*{reason}") as refused:
        cbam_cuda.convert(model)
    assert str(refused.value).count("\n") == 1
    assert list(model.modules()) == before
    cbam_cuda.convert(model, strict=False)
    assert isinstance(model[0], CBAM)
    assert refused_ones(model) == refused_ones(nn.ModuleList([before[0], model[1]]))


def refused_ones(model: nn.Module) -> list[str]:
    with pytest.raises(ValueError, match="that are known") as refused:
        cbam_cuda.convert(model)
    return [line.partition("(")[2] for line in str(refused.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("channels", "ratio"), [(1, 1), (2, 2), (4, 4), (16, 16), (33, 16), (64, 64), (512, 16)]
)
def test_random_numbers_tell_pools_apart(channels, ratio):
    """Also where a ReLU could hide the whole MLP."""
    cbam_cuda.convert(Official(channels, ratio))
    for pools in (("avg", "lse"), ("avg",), ("max",), ("max", "max")):
        with pytest.raises(ValueError, match="computes something else"):
            cbam_cuda.convert(Official(channels, ratio, pools))


@pytest.mark.parametrize("channels", [16, 64])
@pytest.mark.parametrize("most", [6.0, 20.0, 100.0])
def test_large_numbers_tell_what_clips(channels, most):
    """What clips beyond makes gates that are 0 or 1 as well."""
    block = Pair(channels)
    cbam_cuda.convert(block)
    block.ca.fc[1] = nn.Hardtanh(0.0, most)
    with pytest.raises(ValueError, match="computes something else"):
        cbam_cuda.convert(block)


def hook(block):
    block.ca.register_forward_hook(lambda *_: None)


def parametrize(block):
    nn.utils.parametrizations.weight_norm(block.sa.conv1)


def hook_weight(block):
    block.sa.conv1.weight.register_hook(lambda grad: grad)


def hook_gradient(block):
    block.sa.conv1.weight.register_post_accumulate_grad_hook(lambda weight: None)


def tie_inside(block):
    block.ca.fc[0], block.ca.fc[2] = (nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(2))
    block.ca.fc[2].weight = block.ca.fc[0].weight


LOST = {
    "hook": (hook, "ChannelAttention has hooks or parametrizations, which would be lost"),
    "parametrization": (parametrize, "ParametrizedConv2d has hooks or parametrizations"),
    "hook of a weight": (hook_weight, "a weight has hooks"),
    "hook of a gradient": (hook_gradient, "a weight has hooks"),
    "more tensors": (
        lambda block: block.ca.fc[0].register_buffer("more", torch.zeros(1)),
        "Conv2d has other tensors than weight and bias",
    ),
    "tied layers": (tie_inside, "two of its layers share weights"),
    "compiled": (lambda block: block.compile(), "it is under torch.compile"),
}


@pytest.mark.parametrize("what", LOST)
def test_what_would_be_lost_is_refused(what):
    change, reason = LOST[what]
    block = Pair(CHANNELS)
    change(block)
    with pytest.raises(ValueError, match=rf"are known .*, got\n- 0 \(Pair\): {reason}"):
        cbam_cuda.convert(nn.Sequential(block, Pair(CHANNELS)))


def test_what_is_in_common_with_others_is_refused():
    tied, other, part, whole = (Pair(CHANNELS) for _ in range(4))
    other.sa.conv1.weight = tied.sa.conv1.weight
    with pytest.raises(ValueError, match=r"(?s)0 \(Pair\): it shares weights.*1 \(Pair\)"):
        cbam_cuda.convert(nn.Sequential(tied, other))
    with pytest.raises(
        ValueError, match=r"0 \(Pair\): its Channel.* is used by a module outside of it too"
    ):
        cbam_cuda.convert(nn.Sequential(part, nn.ModuleDict({"gate": part.ca})))
    with pytest.raises(ValueError, match=r"it is under torch\.compile"):
        cbam_cuda.convert(nn.Sequential(torch.compile(whole)))


def test_other_layers_in_a_model_are_no_matter():
    class Odd(nn.Conv2d):
        """As layers are whose weights are made when they are called."""

        def __init__(self):
            super().__init__(3, 4, 1)
            del self.weight

    flat, lazy = nn.Conv2d(3, 4, 1), nn.LazyConv2d(4, 1)
    flat.weight = nn.Parameter(torch.empty(0))
    model = nn.Sequential(Odd(), flat, lazy, CbamInName(), Pair(CHANNELS))
    cbam_cuda.convert(model)
    assert [type(m) for m in model][3:] == [CbamInName, CBAM]


class CbamInName(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_a_list_of_one_that_is_refused_is_none():
    with pytest.raises(ValueError, match=r"0 \(Optional\): its forward takes x, spatial, and a"):
        cbam_cuda.convert(nn.Sequential(Optional(CHANNELS)))


def test_parametrizations_with_tensors_are_refused_too():
    block = Pair(CHANNELS)
    nn.utils.parametrizations.spectral_norm(block.ca.fc[0])
    with pytest.raises(ValueError, match="ParametrizedConv2d has hooks or parametrizations"):
        cbam_cuda.convert(nn.Sequential(block, Pair(CHANNELS)))


def test_blocks_that_have_changed_are_not_reverted_silently():
    hooked, folded, other = (cbam_cuda.convert(Official(CHANNELS)) for _ in range(3))
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"0 \(CBAM\): CBAM has hooks"):
        cbam_cuda.revert(nn.Sequential(hooked))
    folded.norm = None
    with pytest.raises(ValueError, match=r"its layers were .*BatchNorm2d, now they are "):
        cbam_cuda.revert(folded)
    other.fc1 = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"its layers were Linear, .*now they are Linear, "):
        cbam_cuda.revert(other)


def test_without_hidden_channels_it_is_refused():
    with pytest.warns(UserWarning, match="zero-element"):
        block = Official(8, ratio=16)
    with pytest.raises(ValueError, match="its MLP has no hidden channels"):
        cbam_cuda.convert(block)


@pytest.mark.parametrize("swap", [cbam_cuda.convert, cbam_cuda.revert])
def test_what_is_no_model_or_has_none_in_it(swap):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn.Module, got dict"):
        swap({})
    gates = nn.ModuleList([ChannelAttention(CHANNELS), nn.Conv2d(3, 4, 1)])
    with pytest.raises(ValueError, match="got none in ModuleList"):
        swap(gates)
    with pytest.raises(ValueError, match="got none in SpatialAttention"):
        swap(SpatialAttention())
