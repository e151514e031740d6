"""Channel and spatial gates that their parent calls one after the other and applies by itself.

``y = self.ca(x) * x; out = self.sa(y) * y`` is CBAM of x, but neither of the two modules is. Where
the parent's code says so, as torch.fx reads it, a fused block can take the spatial gate's place: x
passes the place of the channel gate as it is, and what the block returns becomes CBAM of x by the
parent's own multiplication. Gates may as well be modules that apply themselves.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from .forms import is_mlp, is_spatial, with_weights
from .module import CBAM

_PRODUCTS = (operator.mul, torch.mul, torch.Tensor.mul)


class Gate:
    """What a parent takes for a gate of x: times x it is what is known to come out."""

    def __init__(self, x: Any, product: Any) -> None:
        self._x, self._product = x, product

    def __mul__(self, x: Any) -> Any:
        return self.times(x)

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        """The same where torch is asked: for a tensor on the left, and while it compiles."""
        if function not in _PRODUCTS:
            return NotImplemented
        one, other = arguments
        return one.times(other) if isinstance(one, Gate) else other.times(one)

    def times(self, x: Any) -> Any:
        """What is known, if x is the tensor that it is known of.

        Raises:
            TypeError: it is another one.
        """
        if x is not self._x:
            raise TypeError(
                "a gate that cbam_cuda.convert took: expected it to be multiplied with the tensor "
                "that it was called with, got another one"
            )
        return self._product


class ChannelPlace(nn.Module):
    """Where a channel gate was that the block behind it computes as well: x passes."""

    def forward(self, x: Tensor) -> Gate:
        """What is x, times x."""
        return Gate(x, x)


class GateCBAM(CBAM):
    """A `CBAM` in the place of a spatial gate, which its parent multiplies with x."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        return_attention: bool = False,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Gate | tuple[Tensor, Tensor, Tensor]:
        """What is CBAM of x, times x; with ``return_attention`` as `CBAM`."""
        made = super().forward(x, return_attention, residual=residual, activation=activation)
        return made if isinstance(made, tuple) else Gate(x, made)


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
        place = ChannelPlace() if self.multiplies_channel else nn.Identity()
        return place.train(self.channel.training)

    def kind_of_block(self) -> type[CBAM]:
        """What stands for the spatial gate."""
        return GateCBAM if self.multiplies_spatial else CBAM


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
    # Whether it calls what stands under these names, or has them elsewhere as well.
    places: dict[str, nn.Module] = {n: nn.Identity() for turn in found for n in turn[:2]}
    if _turns(_nodes_of(module, module.training, places), names) != found:
        raise ValueError("not by their names")
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
    traced = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, (list, dict, set)):
            traced.__dict__[name] = copy.copy(value)
    traced._buffers = {n: None if b is None else b.clone() for n, b in module._buffers.items()}
    traced._modules.update(places)
    traced.training = training
    before = torch.get_rng_state()
    try:
        with torch.random.fork_rng(devices=[]):
            nodes = list(_Shallow().trace(traced).nodes)
            drawn = not torch.equal(torch.get_rng_state(), before)
    except Exception as error:  # whatever other people's code raises
        raise ValueError(f"torch.fx cannot follow it: {error}") from error
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
