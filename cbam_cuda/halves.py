"""Two gates that their parent calls one after the other and applies, as torch.fx reads it.

What stands in their places afterwards: `gates`.
"""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from .forms import is_mlp, is_spatial, with_weights
from .gates import AppliedCBAM, AppliedChannelPlace, ChannelPlace, GateCBAM


class Both(nn.Module):
    """The two gates as their parent calls them."""

    def __init__(
        self,
        channel: nn.Module,
        spatial: nn.Module,
        multiplies_channel: bool,
        multiplies_spatial: bool,
    ) -> None:
        super().__init__()
        self.channel, self.spatial = channel, spatial
        self.multiplies_channel, self.multiplies_spatial = multiplies_channel, multiplies_spatial
        self.training = spatial.training

    def forward(self, x: Tensor) -> Tensor:
        """CBAM of x, if they are what they look like."""
        y = self.channel(x) * x if self.multiplies_channel else self.channel(x)
        z: Tensor = self.spatial(y) * y if self.multiplies_spatial else self.spatial(y)
        return z

    def channel_place(self) -> nn.Module:
        """What stands for the channel gate once a block computes both."""
        place = ChannelPlace() if self.multiplies_channel else AppliedChannelPlace()
        return place.train(self.channel.training)

    def kind_of_block(self) -> type[AppliedCBAM]:
        """What stands for the spatial gate."""
        return GateCBAM if self.multiplies_spatial else AppliedCBAM


class Names(NamedTuple):
    """Those of a module's children that are halves of a CBAM."""

    channel: list[str]
    spatial: list[str]

    def __str__(self) -> str:
        return " and ".join((*self.channel, *self.spatial))


def halves_of(module: nn.Module) -> Names | None:
    """The children with a CBAM's layers, if there are such for both gates."""
    children = [(name, with_weights(child)) for name, child in module.named_children()]
    names = Names(
        [name for name, layers in children if is_mlp(layers)],
        [name for name, layers in children if is_spatial(layers)],
    )
    return names if all(names) else None


def applied_by(module: nn.Module, names: Names) -> list[Both]:
    """The gates that a module applies one after the other, in training as in inference.

    Raises:
        ValueError: it does something else with one of them, or what it does cannot be traced.
    """
    found, others = (_turns(_nodes_of(module, mode, {}), names) for mode in (True, False))
    if found != others:
        raise ValueError("not in the same way in training and in inference")
    taken = [
        Both(getattr(module, turn.channel), getattr(module, turn.spatial), *turn[2:])
        for turn in found
    ]
    # It may have them elsewhere as well, or ask what they are.
    places: dict[str, nn.Module] = {n: nn.Identity() for turn in found for n in turn[:2]}
    if any(_turns(_nodes_of(module, mode, places), names) != found for mode in (True, False)):
        raise ValueError("not in the same way with others in their places")
    return taken


class _Proxy(torch.fx.Proxy):
    """One for which ``x *= gate`` is not the same as ``x * gate``."""

    def __imul__(self, other: Any) -> torch.fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})


class _Shallow(torch.fx.Tracer):
    """Follows what a module itself does; its children are calls."""

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _nodes_of(
    module: nn.Module, training: bool, places: Mapping[str, nn.Module]
) -> list[torch.fx.Node]:
    """What a module does, with others in some places, all of which stays as it is."""
    if "forward" in vars(module):
        raise ValueError("its forward is its own, not its class's")
    states = torch.get_rng_state(), random.getstate()
    try:
        # But for the weights, of which there are many.
        traced = copy.deepcopy(module, {id(p): p for p in module.parameters()})
        traced._modules.update(places)
        traced.training = training
        nodes = list(_Shallow().trace(traced).nodes)
    except Exception as error:  # whatever other people's code raises
        raise ValueError(f"torch.fx cannot follow it: {error}") from error
    finally:
        drawn = not torch.equal(torch.get_rng_state(), states[0]) or random.getstate() != states[1]
        torch.set_rng_state(states[0])
        random.setstate(states[1])
    if drawn:
        raise ValueError("it draws random numbers")
    return nodes


class _Turn(NamedTuple):
    """A call of each gate, by name, and what the parent multiplies."""

    channel: str
    spatial: str
    multiplies_channel: bool
    multiplies_spatial: bool


def _turns(nodes: list[torch.fx.Node], names: Names) -> list[_Turn]:
    """All of a graph."""
    both = {*names.channel, *names.spatial}
    inner = tuple(f"{name}." for name in both)
    if any(n.op in ("call_module", "get_attr") and str(n.target).startswith(inner) for n in nodes):
        raise ValueError("it uses what is inside of one")
    calls = [n for n in nodes if n.op == "call_module" and n.target in both]
    if sorted(str(n.target) for n in calls) != sorted(both):
        raise ValueError("each of them is not called once")
    if [n.target in names.channel for n in calls] != [True, False] * (len(calls) // 2):
        raise ValueError("a channel gate and a spatial one do not take turns")
    return [_turn(nodes, *pair) for pair in zip(calls[::2], calls[1::2], strict=True)]


def _turn(nodes: list[torch.fx.Node], channel: torch.fx.Node, spatial: torch.fx.Node) -> _Turn:
    """The two gates that are called here, x by the one and what becomes of it by the other."""
    x = _argument(channel)
    y = _product(channel, x)
    out = _product(spatial, y)
    if _argument(spatial) is not y or set(y.users) != {spatial, out}:
        raise ValueError(f"{spatial.target} is not called with x times {channel.target} alone")
    # y becomes another name of x: whatever changes x meanwhile, by whichever name, changes both.
    meanwhile = nodes[nodes.index(channel) : nodes.index(out)]
    if not {channel, y, spatial}.issuperset(meanwhile):
        raise ValueError(f"it does something else between {channel.target} and {spatial.target}")
    targets = str(channel.target), str(spatial.target)
    return _Turn(*targets, y is not channel, out is not spatial)


def _argument(call: torch.fx.Node) -> torch.fx.Node:
    """What a module is called with, if that is all."""
    if call.kwargs or len(call.args) != 1 or not isinstance(call.args[0], torch.fx.Node):
        raise ValueError(f"{call.target} is not called with one tensor alone")
    return call.args[0]


def _product(gate: torch.fx.Node, x: torch.fx.Node) -> torch.fx.Node:
    """Where it is multiplied with x and no more, that; else itself."""
    users = list(gate.users)
    multiplied = len(users) == 1 and users[0].target in (operator.mul, torch.mul)
    alone = multiplied and not users[0].kwargs and set(users[0].args) == {gate, x}
    return users[0] if alone else gate
