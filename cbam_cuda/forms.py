"""What other people's CBAM modules compute, and the block of this package that computes the same.

No list of the implementations that there are: a module is known by its layers, the two of the MLP
and the convolution over two maps, and what it makes of them is tried. A copy of it gets random
weights and must agree with `CBAM` in float64, with layers and maps in one order or the other, with
x added or not, in inference and in training: in the output, the gradient of x, whether each weight
has one, and the statistics that a norm keeps. So what only looks alike is told apart.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from . import reference
from .arguments import check_residual
from .module import CBAM

torch.fx.wrap("check_residual")  # one node of a traced graph

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Kept as they are; what is derived from them may do more.
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_SPACES = ((7, 6, 5), (7, 7, 7))  # the second for pools that take one side for all
_ROWS, _LEAST_SAMPLES, _MOST_SAMPLES = 4096, 6, 18  # rows are samples by channels
_LARGE = 1e4
_TOLERANCE = 1e-9  # in float64, where other orders of the sums are within 1e-13


class ResidualCBAM(CBAM):
    """x + CBAM of x, as blocks have it that stand on their own."""

    def forward(
        self,
        x: Tensor,
        return_attention: bool = False,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """As `CBAM`, with x added to out, and to a residual."""
        if residual is not None:
            check_residual(x, residual)
        both = x if residual is None else x + residual
        return super().forward(x, return_attention, residual=both, activation=activation)


class Form(NamedTuple):
    """What may differ between modules that have the same layers."""

    fc2_first: bool  # of the layers, in the order in which the module has them
    maximum_first: bool  # of the two maps
    residual: bool


class Layers(NamedTuple):
    """The layers of a CBAM, whatever else is around them."""

    fc1: Any  # weight [hidden, C, ...]
    fc2: Any  # weight [C, hidden, ...]
    conv: Any  # weight [1, 2, odd, ...]
    norm: Any | None  # of one map

    def ordered(self, form: Form) -> Layers:
        """With the MLP's layers one after the other."""
        return self._replace(fc1=self.fc2, fc2=self.fc1) if form.fc2_first else self


def layers_of(module: nn.Module) -> Layers | None:
    """The layers of a CBAM in a module's order, if nothing else in it has weights."""
    parts = with_weights(module)
    convs = [m for m in parts if is_spatial([m])]
    norms = [m for m in parts if _is_norm(m)]
    mlp = [m for m in parts if m not in convs and m not in norms]
    if not is_mlp(mlp) or len(convs) != 1 or len(norms) > 1:
        return None
    fc1, fc2 = mlp
    return Layers(fc1, fc2, convs[0], norms[0] if norms else None)


def layers_of_block(block: CBAM) -> Layers | None:
    """Those of a block of this package, if they have not become others."""
    layers = Layers(block.fc1, block.fc2, block.conv, block.norm)
    known = layers.norm is None or _is_norm(layers.norm)
    return layers if known and is_mlp([*layers[:2]]) and is_spatial([layers.conv]) else None


def with_weights(module: nn.Module) -> list[nn.Module]:
    """The modules in it that have parameters or buffers of their own."""

    def has(m: nn.Module) -> bool:
        own = (*m._parameters.values(), *m._buffers.values())
        return is_parametrized(m) or any(t is not None for t in own)

    lists = [m for m in module.modules() if isinstance(m, ParametrizationList)]
    of_layers = {part for m in lists for part in m.modules()}
    return [m for m in module.modules() if m not in of_layers and has(m)]


def is_mlp(layers: list[nn.Module]) -> bool:
    """Whether these take each position by itself, from C channels to hidden ones and back."""
    if len(layers) != 2 or not all(isinstance(m, (nn.Linear, *CONVOLUTIONS)) for m in layers):
        return False
    one, other = map(_channels, layers)
    return one == other[::-1] and all(map(_is_pointwise, layers))


def _is_pointwise(layer: Any) -> bool:
    return bool(layer.weight.shape[2:].numel() == 1)


def is_spatial(layers: list[nn.Module]) -> bool:
    """Whether these are a convolution from two maps to one, and possibly its normalisation."""
    if not layers or len(layers) > 2 or not all(map(_is_norm, layers[1:])):
        return False
    return isinstance(layers[0], CONVOLUTIONS) and _channels(layers[0]) == (1, 2)


def _is_norm(layer: Any) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.num_features == 1


def _channels(layer: Any) -> tuple[int, int]:
    """Output and input channels; of a layer that does not say, what fits no other."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or is_lazy(weight) or weight.dim() < 2:
        return (0, -1)
    out, into = weight.shape[:2]
    return out, into


def form_of(module: nn.Module, layers: Layers) -> Form:
    """The form that computes what a module does from its layers.

    Raises:
        ValueError: there is none, or the module fails; it says which.
    """
    if layers.fc1.weight.numel() == 0:
        raise ValueError("its MLP has no hidden channels")
    if type(layers.norm) not in NORMS and re.search("sync", type(layers.norm).__name__, re.I):
        name = type(layers.norm).__name__
        raise ValueError(f"{name} is a synchronized norm other than torch.nn.SyncBatchNorm")
    takes = list(inspect.signature(module.forward).parameters)
    if len(takes) != 1 and type(module).forward is not reference.CBAM.forward:
        raise ValueError(
            f"its forward takes {', '.join(takes)}, and a block of this package x alone"
        )
    # Whatever mode, default device and random numbers the caller has.
    with torch.device("cpu"), torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        return _form_by_trial(module, layers)


def _form_by_trial(module: nn.Module, layers: Layers) -> Form:
    tried, given, expected = _run(module, layers)
    found = layers_of(tried)
    assert found is not None
    for form in itertools.starmap(Form, itertools.product((False, True), repeat=3)):
        if _channels(found.ordered(form).fc1)[1] != given[0].shape[1]:
            continue
        block = block_of(found, form)
        block.backend = "reference"
        got = [_tried(block, *given, training) for training in (False, True)]
        if all(map(_agree, got, expected)):
            return form
    raise ValueError("it computes something else than CBAM from its layers")


_Input = tuple[Tensor, Tensor]  # x and a gradient of out
_Result = tuple[Tensor, ...]


def _run(module: nn.Module, layers: Layers) -> tuple[nn.Module, _Input, list[_Result]]:
    """A copy with random weights, random numbers that it takes, and what it makes of them."""
    dim = len(layers.conv.kernel_size)
    failure: Exception | None = None
    try:
        tried = _with_random_weights(module)
        for first, space in itertools.product((layers.fc1, layers.fc2), _SPACES):
            given = _random_input(_channels(first)[1], space[:dim])
            try:
                return tried, given, [_tried(tried, *given, mode) for mode in (False, True)]
            except Exception as error:  # whatever other people's code raises
                failure = failure or error
    except Exception as error:
        failure = error
    raise ValueError(f"it cannot be tried on random numbers: {failure}") from failure


def _with_random_weights(module: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, in which no two terms of the formula are alike."""
    other = copy.deepcopy(module).to(torch.float64).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in itertools.chain(other.named_parameters(), other.named_buffers()):
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.5
            positive = name.endswith("running_var") or not tensor.is_floating_point()
            tensor.copy_(values.abs() + 1 if positive else values * scale)
    return other


def _tried(module: nn.Module, x: Tensor, cotangent: Tensor, training: bool) -> _Result:
    """The output, the gradient of x, whether all weights have one, and the norm's statistics."""
    module = copy.deepcopy(module).train(training)
    weights = [p.requires_grad_() for p in module.parameters()]
    torch.default_generator.manual_seed(0)  # that of the CPU alone
    before = torch.get_rng_state()
    with torch.enable_grad():
        out = module(x)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"expected one tensor like x, {list(x.shape)}, got {got}")
        dx, *others = torch.autograd.grad(out, [x, *weights], cotangent, allow_unused=True)
    if not torch.equal(torch.get_rng_state(), before):
        raise ValueError("it draws random numbers")
    norms: list[Any] = [m for m in module.modules() if _is_norm(m)]
    statistics = [t for m in norms for t in (m.running_mean, m.running_var) if t is not None]
    return out.detach(), dx, torch.tensor([None not in others]).to(x.dtype), *statistics


def _random_input(channels: int, space: tuple[int, ...]) -> _Input:
    """Of so many channels.

    Channels of a sample differ more than positions do, and samples in how much these do, so that
    hidden channels which the ReLU leaves at 0 in some samples, of either pool, are not in others.
    The last two are large in a corner, with opposite signs, for what clips: everywhere, and a
    spatial gate of 0 would hide it.
    """
    generator = torch.Generator().manual_seed(1)
    samples = min(max(_ROWS // channels, _LEAST_SAMPLES), _MOST_SAMPLES)
    shape, ones = (samples, channels, *space), (1,) * len(space)
    values, means, spread, cotangent = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in (shape, (samples, channels, *ones), (samples, 1, *ones), shape)
    )
    x = values * spread + 4 * means
    x[-2] = x[-1]
    corners = x.flatten(2)[..., 0]  # a view
    corners[-2] *= _LARGE
    corners[-1] *= -_LARGE
    return x.requires_grad_(), cotangent


def _agree(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(
        torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
        for a, b in zip(got, expected, strict=True)
    )


def block_of(layers: Layers, form: Form, kind: type[CBAM] = CBAM) -> CBAM:
    """A fused module with the layers' weights: the same parameters where shape and order fit.

    It is of this kind, or a `ResidualCBAM`.
    """
    layers = layers.ordered(form)
    norm, kernel = layers.norm, layers.conv.kernel_size
    hidden, channels = _channels(layers.fc1)
    sizes = {"kernel_size": kernel, "dim": len(kernel), "hidden": hidden, "norm": norm is not None}
    block = (ResidualCBAM if form.residual else kind)(channels, **sizes, device="meta")
    if norm is not None and type(norm) in NORMS:
        block.norm = norm
    elif norm is not None:
        affine, tracks = norm.weight is not None, norm.running_mean is not None
        block.norm = type(block.norm)(1, norm.eps, norm.momentum, affine, tracks, device="meta")
    made = layers_of_block(block)
    assert made is not None
    give_weights(made, layers, form)
    return block


def give_weights(to: Layers, layers: Layers, form: Form) -> None:
    """Let layers have the weights of others, between a block's and those of a module of a form."""
    _give(to.fc1, layers.fc1, flip=False)
    _give(to.fc2, layers.fc2, flip=False)
    _give(to.conv, layers.conv, flip=form.maximum_first)
    if to.norm is not None and layers.norm is not None and to.norm is not layers.norm:
        to.norm._parameters = dict(layers.norm._parameters)
        to.norm._buffers = dict(layers.norm._buffers)


def _give(to: Any, layer: Any, *, flip: bool) -> None:
    """The weight in the shape that is there already, and the bias."""
    weight, shape = layer.weight, to.weight.shape
    if flip or weight.shape != shape:

        def moved(t: Tensor) -> Tensor:
            return t.detach().reshape(shape).flip(1) if flip else t.detach().reshape(shape)

        weight = nn.Parameter(moved(layer.weight), requires_grad=layer.weight.requires_grad)
        if layer.weight.grad is not None:
            weight.grad = moved(layer.weight.grad)
    to.weight, to.bias = weight, layer.bias
