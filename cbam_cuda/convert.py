"""Swaps the CBAM modules of a model for this package's, and back."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from typing import NamedTuple

from torch import nn

from .forms import (
    NORMS,
    Form,
    Layers,
    block_of,
    form_of,
    give_weights,
    is_mlp,
    is_spatial,
    layers_of,
    layers_of_block,
    with_weights,
)
from .halves import Both, Names, applied_by, halves_of
from .module import CBAM
from .ties import Ties


class Origin(NamedTuple):
    """What a block was before it was converted."""

    module: nn.Module  # on the device "meta", without weights
    form: Form
    channel_place: nn.Module | None = None  # where the channel gate was, if `module` is two gates


class Refused(NamedTuple):
    """A module that looks like a CBAM and is not known."""

    path: str
    module: nn.Module
    reason: str

    def __str__(self) -> str:
        return f"{self.path or 'the model'} ({type(self.module).__name__}): {self.reason}"


def convert(model: nn.Module, *, strict: bool = True, gates: bool = False) -> nn.Module:
    """Swap each CBAM inside of a model for a fused one with the same weights, in place.

    Known is what computes `cbam_cuda.cbam`, under any names of classes and weights: with an MLP of
    linear layers or of convolutions, the maximum before the mean or after it, with or without
    biases, with batch normalisation of the convolution's map, with x added at the end. It is found
    out by trying a copy on random numbers. Not known is what draws random numbers itself, takes
    other arguments than x, has hooks or parametrizations, shares layers or weights with other
    modules, or is compiled. Where several elements are the maximum, the gradient of the fused block
    goes to the first one.

    Weights that need another shape or order become new parameters: convert before the optimizer is
    made, and before DistributedDataParallel or torch.compile take the model.

    Args:
        model: on any device, "meta" too. One that is a CBAM itself is not changed, but returned as
            another module.
        strict: raise where something looks like a CBAM and is not known, before anything is
            changed; else it stays as it is.
        gates: also take two gates that are modules of their own and that the module around them
            applies, as in ``y = ca(x) * x; out = sa(y) * y``. One block then takes the place of the
            second, and x passes that of the first: what torch.fx saw of that module's forward must
            be what it goes on to do, and whatever else happens to either is an error.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no CBAM, or with `strict` one that is not known; it says which, and
            why.
    """
    survey = _Survey(_module(model), gates)
    if strict and survey.refused:
        listed = "\n".join(f"- {one}" for one in survey.refused.values())
        raise ValueError(
            "model: expected CBAM modules that are known (strict=False leaves others as they are), "
            f"got\n{listed}"
        )
    if not survey.found and not any(isinstance(m, CBAM) for m in model.modules()):
        raise ValueError(f"model: expected a CBAM in it, got none in {type(model).__name__}")
    return _swap(model, survey.found)


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`, in place: modules of the former classes, with the weights of now.

    Returns:
        The model; if it is a converted block itself, a module of its former class.

    Raises:
        TypeError: `model` is no module.
        ValueError: nothing in it has been converted, or a block has hooks or other layers since,
            shares weights, or is compiled.
    """
    former: dict[nn.Module, nn.Module] = {}
    ties = Ties(_module(model))
    for path, block in model.named_modules():
        if isinstance(block, CBAM) and block.origin is not None:
            try:
                replaced = _former(block, model)
                for module in replaced:
                    ties.refuse_losses(module)
                former |= replaced
            except ValueError as error:
                raise ValueError(str(Refused(path, block, str(error)))) from None
    if not former:
        raise ValueError(f"model: expected converted modules, got none in {type(model).__name__}")
    return _swap(model, former)


def _module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _swap(model: nn.Module, others: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put modules in the place of others, wherever these are."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in others:
                parent._modules[name] = others[child]
    return others.get(model, model)


class _Survey:
    """What there is in a model: `found` by the module whose place it takes, and `refused`."""

    def __init__(self, model: nn.Module, gates: bool) -> None:
        self._gates = gates
        self.found: dict[nn.Module, nn.Module] = {}
        self.refused: dict[tuple[nn.Module | None, ...], Refused] = {}  # by the layers
        self._ties = Ties(model)
        self._visited: dict[nn.Module, bool] = {}
        self._visit("", model)

    def _visit(self, path: str, module: nn.Module) -> bool:
        """Look into a module, innermost ones first; whether a CBAM, or what looks so, is in it."""
        if isinstance(module, CBAM):
            return True
        if module not in self._visited:
            inside = False
            for name, child in module.named_children():
                inside |= self._visit(f"{path}.{name}" if path else name, child)
            self._visited[module] = self._judge(path, module, inside)
        return self._visited[module]

    def _judge(self, path: str, module: nn.Module, inside: bool) -> bool:
        layers = layers_of(module)
        # One around what was refused may be the whole of which that is a part; a list is not.
        whole = layers in self.refused and not isinstance(module, nn.Sequential)
        if layers is not None and (not inside or whole):
            self._try(path, module, layers)
            return True
        if (layers is None or self._gates) and (names := halves_of(module)) is not None:
            self._take_halves(path, module, names)
            return True
        if not inside and (reason := _named_so(module)) is not None:
            self.refused[module,] = Refused(path, module, reason)
            return True
        return inside

    def _try(self, path: str, module: nn.Module, layers: Layers) -> None:
        try:
            self._ties.refuse_losses(module)
            self.found[module] = _converted(module, layers)
            self.refused.pop(layers, None)
            return
        except ValueError as error:
            refused = Refused(path, module, str(error))
        names = halves_of(module) if self._gates else None
        if names is None or self._why_not_halves(module, names) is not None:
            self.refused.setdefault(layers, refused)

    def _take_halves(self, path: str, module: nn.Module, names: Names) -> None:
        """Of a module that calls the gates itself."""
        why, more = None, ", or see `gates` of convert"
        if self._gates:
            why, more = self._why_not_halves(module, names), ""
            if why is None:
                return
        reason = f"it calls {names}, the halves of a CBAM, in a way of its own"
        reason += f"{f' ({why})' if why else ''}: put them into one module that applies both{more}"
        self.refused[module,] = Refused(path, module, reason)

    def _why_not_halves(self, module: nn.Module, names: Names) -> str | None:
        """Take them; else why they cannot be."""
        try:
            self._take(applied_by(module, names))
        except ValueError as error:
            return str(error)
        return None

    def _take(self, taken: list[Both]) -> None:
        blocks = [self._block_of_both(both) for both in taken]
        for both, block in zip(taken, blocks, strict=True):
            place = both.channel_place()
            block.origin = block.origin._replace(channel_place=place)
            self.found |= {both.channel: place, both.spatial: block}
            for part in both.modules():
                self.refused.pop((part,), None)

    def _block_of_both(self, both: Both) -> CBAM:
        for half in (both.channel, both.spatial):
            self._ties.refuse_losses(half)
            self._ties.refuse_more_parents(half)
        layers = layers_of(both)
        assert layers is not None
        return _converted(both, layers, both.kind_of_block())


def _named_so(module: nn.Module) -> str | None:
    """Why a module that has not a CBAM's layers may be another kind: by its name and some."""
    layers = with_weights(module)
    some = any(is_spatial([m]) for m in layers) or any(map(is_mlp, map(list, pairwise(layers))))
    if not some or not re.search("cbam", type(module).__name__, re.IGNORECASE):
        return None
    return (
        "expected an MLP of two layers, a convolution from two maps to one and at most one "
        f"batch normalisation, got {', '.join(type(m).__name__ for m in layers)}"
    )


def _converted(module: nn.Module, layers: Layers, kind: type[CBAM] = CBAM) -> CBAM:
    """The fused block, of this kind, that computes what a module does.

    Raises:
        ValueError: there is none; it says why.
    """
    form = form_of(module, layers)
    norm_training = layers.norm is not None and layers.norm.training
    block = block_of(layers, form, kind).train(module.training)
    if block.norm is not None:
        block.norm.train(norm_training)
    block.origin = Origin(copy.deepcopy(module).to("meta"), form)
    return block


def _former(block: CBAM, model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The module that a block was before, by the block; of two gates each by its place.

    Raises:
        ValueError: the block has other layers now, or the other place is no more in the model.
    """
    origin: Origin = block.origin
    module = _with_weights_of(block)
    if not isinstance(module, Both):
        return {block: module}
    place = origin.channel_place
    if not any(m is place for m in model.modules()):
        raise ValueError("its channel gate had a place of its own, which is not in the model")
    assert place is not None
    return {place: module.channel, block: module.spatial}


def _with_weights_of(block: CBAM) -> nn.Module:
    """What it was made from, with its weights."""
    origin: Origin = block.origin
    module = copy.deepcopy(origin.module).train(block.training)
    layers, now = layers_of(module), layers_of_block(block)
    if layers is None or now is None or (layers.norm is None) != (now.norm is None):
        had, has = (", ".join(type(m).__name__ for m in with_weights(b)) for b in (module, block))
        raise ValueError(f"its layers were {had}, now they are {has}")
    norm = layers.norm
    if norm is not None and now.norm is not None:
        if type(norm) in NORMS:
            _swap(module, {norm: now.norm})  # whatever it has become
            layers = layers._replace(norm=now.norm)
        else:
            norm.eps, norm.momentum = now.norm.eps, now.norm.momentum
            norm.train(now.norm.training)
    give_weights(layers.ordered(origin.form), now, origin.form)
    return module
