"""CBAM in plain PyTorch: the definition of correct, and the fallback where nothing is fused.

S. Woo, J. Park, J.-Y. Lee, I. S. Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import Weights, check_residual, check_sizes, check_x
from .ending import NO_ENDING, Ending, ending_of

_CONV_MODULE: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM_MODULE: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
# Of every class of batch normalisation.
_NORMS = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MEAN = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_MAX = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
_LAYERS = ("fc1", "fc2", "conv")

# Calls of these are nodes of a traced graph.
torch.fx.wrap("cbam")
torch.fx.wrap("check_x")
torch.fx.wrap("check_residual")
torch.fx.wrap("in_dtype_of")


def cbam(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    return_attention: bool = False,
    normalise: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """CBAM of x [N, C, *space] by PyTorch's own operators; arguments as in `cbam_cuda.cbam`.

    Weights of another dtype than x's work in their own dtype; what they give is rounded to x's.
    The map that the convolution gives goes through `normalise` before the sigmoid.
    """
    dim = x.dim() - 2
    convolve, ones = _CONV[dim], (1,) * dim
    fc1 = fc1_weight.reshape(*fc1_weight.shape[:2], *ones)
    fc2 = fc2_weight.reshape(*fc2_weight.shape[:2], *ones)
    return _attend(
        dim,
        x,
        lambda pooled: convolve(pooled.to(fc1.dtype), fc1, fc1_bias),
        lambda hidden: convolve(hidden, fc2, fc2_bias),
        lambda maps: convolve(
            maps.to(conv_weight.dtype),
            conv_weight,
            conv_bias,
            padding=[size // 2 for size in conv_weight.shape[2:]],
        ),
        return_attention,
        normalise,
        ending_of(residual, activation),
    )


_Layer = Callable[[Tensor], Tensor]


def _attend(
    dim: int,
    x: Tensor,
    fc1: _Layer,
    fc2: _Layer,
    conv: _Layer,
    return_attention: bool,
    normalise: _Layer | None = None,
    ending: Ending = NO_ENDING,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The formula, of layers that are given as what they do."""

    def mlp(pooled: Tensor) -> Tensor:
        return fc2(F.relu(fc1(pooled)))

    logits = mlp(_MEAN[dim](x, 1)) + mlp(_MAX[dim](x, 1))  # [N, C, 1, ...]
    channel_gate = torch.sigmoid(logits).to(x.dtype)
    y = x * channel_gate
    maps = torch.cat([y.mean(dim=1, keepdim=True), y.max(dim=1, keepdim=True).values], dim=1)
    logit = conv(maps) if normalise is None else normalise(conv(maps))
    spatial_gate = torch.sigmoid(logit).to(y.dtype)  # [N, 1, *space]
    out = y * spatial_gate
    if ending.residual is not None:
        out = out + ending.residual
    if ending.relu:
        out = F.relu(out)
    return (out, channel_gate, spatial_gate) if return_attention else out


class CBAM(nn.Module):
    """CBAM as a module in plain PyTorch; owns the weights that `cbam_cuda.CBAM` also has.

    Args and shapes are those of `cbam_cuda.CBAM`, which see; there is no backend to choose. What is
    wrong with a size is said as there, with x or a residual by PyTorch where it notices.
    """

    def __init__(
        self,
        in_channels: int,
        ratio: int = 16,
        kernel_size: int | Sequence[int] = 7,
        *,
        dim: int = 2,
        hidden: int | None = None,
        bias: bool = True,
        conv_bias: bool = True,
        norm: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden, kernel = check_sizes(in_channels, ratio, kernel_size, dim, hidden)
        conv = _CONV_MODULE[dim]
        self.dim, self.in_channels = dim, in_channels
        self.fc1 = conv(in_channels, hidden, 1, bias=bias, device=device, dtype=dtype)
        self.fc2 = conv(hidden, in_channels, 1, bias=bias, device=device, dtype=dtype)
        padding = tuple(size // 2 for size in kernel)
        self.conv = conv(2, 1, kernel, padding=padding, bias=conv_bias, device=device, dtype=dtype)
        self.norm: Any = None if not norm else _NORM_MODULE[dim](1, device=device, dtype=dtype)

    def weights(self) -> Weights:
        """The tensors that the function takes after x."""
        # Looked up where modules keep them: as attributes that takes longer than small blocks do.
        # Weights that are computed, as by a parametrization, are attributes alone.
        found: list[Any] = []
        for name in _LAYERS:
            layer: Any = self._modules[name]
            own = layer._parameters
            try:
                found += own["weight"], own["bias"]
            except KeyError:
                found += layer.weight, layer.bias
        return Weights(*found)

    def layer_to_call(self) -> str | None:
        """The name of a layer that is more than its weights, so that it must be called.

        It has hooks, as pruning gives it, or another ``forward`` than its kind, as an adapter or a
        quantized layer has, or strides, dilation or padding that the formula has not.
        """
        kind = _CONV_MODULE[self.dim]
        for name in _LAYERS if self.norm is None else (*_LAYERS, "norm"):
            layer: Any = self._modules[name]
            own = layer.__dict__
            if (
                (type(layer) is not kind and not _calls_as(layer, kind))
                or "forward" in own
                or own["_forward_pre_hooks"]
                or own["_forward_hooks"]
                or own["_backward_pre_hooks"]
                or own["_backward_hooks"]
            ):
                return name
        return None if _keeps_size(self._modules["conv"]) else "conv"

    def forward(
        self,
        x: Tensor,
        return_attention: bool = False,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """CBAM of x, and what follows."""
        if self.norm is not None or self.layer_to_call() is not None:
            return self.call_layers(x, return_attention, ending_of(residual, activation))
        return cbam(
            x,
            *self.weights(),
            residual=residual,
            activation=activation,
            return_attention=return_attention,
        )

    def call_layers(
        self, x: Tensor, return_attention: bool, ending: Ending
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """CBAM of x by calls of the layers, whatever these do."""
        check_x(x, self.in_channels)
        if ending.residual is not None:
            check_residual(x, ending.residual)
        fc1, fc2, conv = (in_its_dtype(self._modules[name]) for name in _LAYERS)
        norm = None if self.norm is None else in_its_dtype(self.norm)
        return _attend(self.dim, x, fc1, fc2, conv, return_attention, norm, ending)

    def extra_repr(self) -> str:
        """What `print` shows beside the layers."""
        return f"dim={self.dim}"


def _calls_as(layer: Any, kind: Any) -> bool:
    """Whether a call of it is one of this convolution, or of a batch normalisation."""
    own = type(layer)
    if own.forward in _NORMS:
        return True
    return own.forward is kind.forward and own._conv_forward is kind._conv_forward


def _keeps_size(conv: Any) -> bool:
    """Whether its settings are those of a block that is made: zeros around, each position once."""
    own = conv.__dict__
    kernel, padding = own["kernel_size"], own["padding"]
    return bool(
        own["stride"] == own["dilation"] == (1,) * len(kernel)
        and own["padding_mode"] == "zeros"
        and own["groups"] == 1
        and (padding == "same" or list(padding) == [size // 2 for size in kernel])
    )


def in_its_dtype(layer: Any) -> _Layer:
    """Calls a layer with what it takes, which may be float32 beside 16 bits."""
    tensors = itertools.chain(layer.parameters(), layer.buffers())
    some = next((t for t in tensors if t.is_floating_point()), None)
    if some is None:
        return layer  # type: ignore[no-any-return]
    return lambda v: layer(in_dtype_of(v, some))


def in_dtype_of(v: Tensor, other: Tensor) -> Tensor:
    """v in the dtype that another tensor has when this is called, not when it is traced."""
    return v.to(other.dtype)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """On CUDA, it casts even what derives convolutions. Of meta tensors there is none."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
