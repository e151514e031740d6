"""Gates that their parent calls and applies by itself are converted together, and come back."""

from __future__ import annotations

import copy
import functools
import pickle
import random

import pytest
import torch
from cases import device_of
from test_convert import CHANNELS, filled
from torch import nn
from variants import (
    Block,
    ChannelAttention,
    OfficialChannelGate,
    OfficialSpatialGate,
    Pair,
    SpatialAttention,
)

import cbam_cuda
from cbam_cuda import CBAM
from cbam_cuda.gates import GateCBAM

convert = functools.partial(cbam_cuda.convert, gates=True)


class Residual(Block):
    """As in a residual network: the tensor is the left factor, and ReLUs change theirs in place."""

    def __init__(self, channels):
        super().__init__(channels)
        self.bn, self.relu, self.downsample = nn.BatchNorm2d(channels), nn.ReLU(inplace=True), None

    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn(self.conv1(x)))
        out = out * self.ca(out)
        out = torch.mul(out, self.sa(out))
        out += residual
        return self.relu(out)


class Applied(Block):
    """Modules that apply themselves, with batch normalisation, the maximum first."""

    def __init__(self, channels):
        super().__init__(channels)
        self.ca, self.sa = OfficialChannelGate(channels, 16, ("avg", "max")), OfficialSpatialGate()

    def forward(self, x):
        return x + self.sa(self.ca(self.conv1(x)))


class Mixed(Applied):
    """One of each, and more that the input is used for."""

    def __init__(self, channels):
        super().__init__(channels)
        self.ca = ChannelAttention(channels)

    def forward(self, x):
        y = self.conv1(x)
        before = y.square()
        z = self.sa(torch.mul(y, self.ca(y)))
        return z + before + y


class Twice(Block):
    """Two pairs, as first and last of a network."""

    def __init__(self, channels):
        super().__init__(channels)
        self.ca1, self.sa1 = ChannelAttention(channels, 4), SpatialAttention(3)

    def forward(self, x):
        x = self.ca(x) * x
        x = self.sa(x) * x
        x = self.conv1(x)
        x = self.ca1(x) * x
        return self.sa1(x) * x


class Alone(nn.Module):
    """Both are all that it has, and it does more."""

    def __init__(self, channels):
        super().__init__()
        self.ca, self.sa = ChannelAttention(channels), SpatialAttention()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.ca(x) * x
        return self.drop(self.sa(x) * x)


PARENTS = (Block, Residual, Applied, Mixed, Twice, Alone)
each_parent = pytest.mark.parametrize("parent", PARENTS)


def input_of(**place) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, CHANNELS, 9, 6, **place)


def blocks_of(model: nn.Module) -> list[CBAM]:
    return [m for m in model.modules() if isinstance(m, CBAM)]


@each_parent
def test_computes_the_same(backend, parent):
    model = nn.Sequential(filled(parent(CHANNELS))).to(device_of(backend)).eval()
    x, class_ = input_of(device=device_of(backend)), type(model[0])
    expected = model(x)
    assert convert(model) is model
    assert type(model[0]) is class_
    assert len(blocks_of(model)) == (2 if parent is Twice else 1)
    for block in blocks_of(model):
        block.backend = backend
    torch.testing.assert_close(model(x), expected)
    assert convert(model) is model  # nothing is left to do


@each_parent
def test_trains_alike_and_comes_back(parent):
    plain, x = filled(parent(CHANNELS)).double(), input_of(dtype=torch.float64)
    model = copy.deepcopy(plain)
    convert(model)
    grads = []
    for network in (plain, model):
        given = x.clone().requires_grad_()
        torch.manual_seed(0)  # of dropout
        network(given).square().sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(*grads)
    cbam_cuda.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    gradients = [{name: p.grad for name, p in m.named_parameters()} for m in (model, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_come_back(copied):
    plain = filled(Block(CHANNELS))
    other = cbam_cuda.revert(copied(convert(copy.deepcopy(plain))))
    assert type(other.ca) is ChannelAttention
    torch.testing.assert_close(other.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_gates_and_weights_are_those_of_the_block():
    model, x = Block(CHANNELS), input_of()
    weight, y = model.ca.fc[0].weight, model.conv1(x)
    gate = model.ca(y)
    convert(model)
    assert type(model.sa) is GateCBAM
    assert model.sa.fc1.weight is weight
    assert not list(model.ca.parameters())
    _, channel_gate, _ = model.sa(model.ca(y) * y, return_attention=True)
    torch.testing.assert_close(channel_gate, gate)


@pytest.mark.parametrize("parent", [Block, Residual, Applied])
def test_graphs_are_whole(parent):
    model, x = filled(parent(CHANNELS)).eval(), input_of()
    expected = model(x)
    convert(model)
    with torch.no_grad():
        for graph in (
            torch.compile(model, fullgraph=True, backend="aot_eager"),
            torch.jit.trace(model, x),
            torch.export.export(model, (x,)).module(),
        ):
            torch.testing.assert_close(graph(x), expected)


@pytest.mark.parametrize("parent", [Block, Residual, Applied])
def test_training_is_one_graph(parent):
    torch.compiler.reset()
    model, x = convert(filled(parent(CHANNELS))), input_of()
    gradients = []
    for run in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


OTHERWISE = {
    "another factor": (lambda m, x: m.ca(x) * x.clone(), TypeError, "multiplied with what it was"),
    "no channel gate": (lambda m, x: m.sa(x) * x, TypeError, "got Tensor"),
    "no spatial gate": (lambda m, x: torch.relu(m.ca(x) * x), TypeError, "got relu"),
    "something in between": (lambda m, x: m.sa(m.ca(x) * x + 1), TypeError, "unsupported operand"),
    "a sum": (lambda m, x: m.ca(x) + x, TypeError, "unsupported operand"),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_whatever_else_a_parent_does_is_an_error(what):
    does, error, message = OTHERWISE[what]
    with pytest.raises(error, match=message):
        does(convert(Block(CHANNELS)), input_of())


@pytest.mark.parametrize("name", ["ca", "sa"])
def test_what_is_made_without_gradients_does_not_learn(name):
    model, x = convert(Block(CHANNELS)), input_of()
    gate = getattr(model, name)
    given = x if name == "ca" else model.ca(x) * x
    with torch.no_grad():
        made = gate(given)
        made * given
    with pytest.raises(RuntimeError, match="it was made under no_grad"):
        made * given


class Changed(Block):
    """What is multiplied changes before the second gate is, by another name."""

    def forward(self, x):
        y = self.conv1(x)
        same = y.flatten(1)
        z = self.ca(y) * y
        same.add_(1)
        return self.sa(z) * z


class InPlace(Block):
    """Whoever else has y has the product then."""

    def forward(self, x):
        y = self.conv1(x)
        y *= self.ca(y)
        return x + self.sa(y) * y


class Exchanged(Block):
    def forward(self, x):
        y = self.sa(x) * x
        return self.conv1(self.ca(y) * y)


class Apart(Block):
    """The second product is of something else."""

    def forward(self, x):
        y = self.ca(x) * x
        return self.conv1(self.sa(y) * x)


class Again(Block):
    def forward(self, x):
        y = self.ca(x) * x
        return self.conv1(self.sa(y) * y) * self.ca(x)


class Known(Block):
    """The first product is needed elsewhere as well."""

    def forward(self, x):
        y = self.ca(x) * x
        return self.conv1(self.sa(y) * y) + y


class Branching(Block):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class Training(Block):
    """Only in training it applies both."""

    def forward(self, x):
        return super().forward(x) if self.training else self.sa(x) * x


class Modes(Block):
    """Applies them in another way in training."""

    def forward(self, x):
        if self.training:
            return super().forward(x)
        x = self.ca(x) * x
        return self.sa(x)


class Named(Block):
    def forward(self, x):
        x = self.ca(x=x) * x
        return self.sa(x) * x


class Listed(Block):
    """What it calls is not what stands under the names."""

    def __init__(self, channels):
        super().__init__(channels)
        self.gates = [self.ca, self.sa]

    def forward(self, x):
        for gate in self.gates:
            x = gate(x) * x
        return self.conv1(x)


class ListedInInference(Listed):
    def forward(self, x):
        return Block.forward(self, x) if self.training else super().forward(x)


class Inside(Block):
    def forward(self, x):
        return super().forward(x) + self.ca.fc[0].weight.square().mean()


class Drawing(Block):
    def forward(self, x):
        return super().forward(x) * float(torch.rand(()))


class Another(Block):
    """A gate that looks the same and is not."""

    def __init__(self, channels):
        super().__init__(channels)
        self.ca.fc[1] = nn.SiLU()


ELSE = "sa is not called with x times ca alone"
REFUSED = {
    Changed: "it does something else between ca and sa",
    InPlace: ELSE,
    Exchanged: "a channel gate and a spatial one do not take turns",
    Apart: "it cannot be tried on random numbers: expected one tensor like x",
    Again: "each of them is not called once",
    Known: ELSE,
    Branching: "torch.fx cannot follow it: symbolically traced variables",
    Training: "each of them is not called once",
    Modes: "not in the same way in training and in inference",
    Named: "ca is not called with one tensor alone",
    Listed: "torch.fx cannot follow it: module is not installed as a submodule",
    ListedInInference: "torch.fx cannot follow it: module is not installed",
    Inside: "it uses what is inside of one",
    Drawing: "it draws random numbers",
    Another: "it computes something else than CBAM from its layers",
}


@pytest.mark.parametrize("parent", REFUSED)
def test_other_ways_are_refused(parent):
    model = nn.Sequential(parent(CHANNELS), Pair(CHANNELS))
    before = list(model.modules())
    with pytest.raises(
        ValueError, match=rf"0 \({parent.__name__}\): it calls ca and sa, the halves"
    ) as e:
        convert(model)
    assert f"in a way of its own ({REFUSED[parent]}" in str(e.value)
    assert list(model.modules()) == before


def test_what_would_be_lost_is_refused():
    hooked, shared, other = (Block(CHANNELS) for _ in range(3))
    hooked.sa.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="SpatialAttention has hooks"):
        convert(hooked)
    other.ca = shared.ca
    with pytest.raises(ValueError, match="its ChannelAttention is used by a module outside"):
        convert(nn.Sequential(shared, other))


def test_one_that_is_no_more_whole_does_not_come_back():
    model = convert(Block(CHANNELS))
    with pytest.raises(ValueError, match="its channel gate had a place of its own"):
        cbam_cuda.revert(copy.deepcopy(model.sa))


def test_tracing_leaves_nothing_behind():
    class Keeps(Block):
        def __init__(self, channels):
            super().__init__(channels)
            self.calls, self.seen = [], None
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.seen = x
            self.calls.append([x])
            self.conv1.seen = x
            random.random()
            self.steps += 1
            return super().forward(x)

    model, state = Keeps(CHANNELS), random.getstate()
    with pytest.raises(ValueError, match="it draws random numbers"):
        convert(model)
    assert (model.seen, model.calls, model.steps) == (None, [], 0)
    assert not hasattr(model.conv1, "seen")
    assert random.getstate() == state


def test_a_forward_of_one_module_is_not_that_of_its_class():
    model = Block(CHANNELS)
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="its forward is its own"):
        convert(model)


def test_only_when_asked():
    """What torch.fx sees of a parent may not be all that happens to its gates."""
    with pytest.raises(ValueError, match="applies both, or see `gates` of convert"):
        cbam_cuda.convert(Block(CHANNELS))


def test_hooks_of_either_are_not_lost():
    for name in ("ca", "sa"):
        model = convert(Block(CHANNELS))
        getattr(model, name).register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="has hooks"):
            cbam_cuda.revert(model)
