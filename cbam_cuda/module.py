"""CBAM as modules: they own the weights, `functional.cbam` does the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from . import reference
from .arguments import check_spatial_dimensions
from .choice import check_backend, take_plain_form
from .ending import ending_of
from .functional import run, run_normalised

# Each is one node of a graph that torch.fx traces.
torch.fx.wrap("check_spatial_dimensions")
torch.fx.wrap("run")
torch.fx.wrap("take_plain_form")


class CBAM(reference.CBAM):
    """Convolutional Block Attention Module (Woo et al., ECCV 2018), fused.

    Computes `cbam_cuda.cbam` with weights of its own: `fc1` and `fc2`, the 1x1 convolutions of the
    MLP that both pools share, with in_channels // ratio hidden channels, and `conv`, from the two
    maps to one. Initialised as torch's convolutions are.

    Args:
        in_channels: C, the channels of x.
        ratio: in_channels // ratio hidden channels.
        kernel_size: of the convolution over the maps, odd: the same in each dimension of space, or
            one for each.
        dim: 1, 2 or 3 spatial dimensions.
        hidden: so many hidden channels, whatever the ratio.
        bias: whether the MLP has biases.
        conv_bias: whether the convolution has one.
        norm: whether batch normalisation follows the convolution, in a layer ``norm``.
        backend: see `cbam_cuda.cbam`.
        device: of the weights.
        dtype: of the weights: x's, or float32.

    Shape:
        x: [N, in_channels, *space], out and ``residual``: the same. With ``return_attention=True``
        the result is (out, channel_gate [N, in_channels, 1, ...], spatial_gate [N, 1, *space]).

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is less than 1, a kernel_size is even or they are not as many as there
            are dimensions, dim is not 1, 2 or 3, or ratio leaves no hidden channel; `backend` is
            unknown.

    A layer that has hooks (`register_forward_hook`, pruning), or was replaced by one that computes
    something else than its weights say (adapters, fake quantization), is called, which makes the
    block run in plain PyTorch: once with a warning, and not where a fused backend is named. The
    same goes for a ``norm`` in graphs of `torch.fx`, and for one that takes its statistics from the
    batches of several processes, or from the batch in graphs of `torch.jit`.
    """

    origin: Any = None  # what `convert` made it from, if it did

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
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            ratio,
            kernel_size,
            dim=dim,
            hidden=hidden,
            bias=bias,
            conv_bias=conv_bias,
            norm=norm,
            device=device,
            dtype=dtype,
        )
        check_backend("backend", backend)
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        return_attention: bool = False,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """CBAM of x; see the class and `cbam_cuda.cbam`."""
        check_spatial_dimensions(x, self.dim)
        if (name := self.layer_to_call()) is not None:
            take_plain_form(
                self.backend,
                f"{name} has hooks, settings or a forward of its own, which only a call respects",
            )
            return self.call_layers(x, return_attention, ending_of(residual, activation))
        if self.norm is None:
            given = residual, activation, return_attention
            return run(x, self.weights(), *given, self.backend)
        ending = ending_of(residual, activation)
        if isinstance(x, torch.fx.Proxy):  # whose graph may change the norm's mode
            take_plain_form(self.backend, "torch.fx traces a norm as a layer")
            return self.call_layers(x, return_attention, ending)
        return run_normalised(x, self.weights(), self.norm, ending, return_attention, self.backend)

    def extra_repr(self) -> str:
        """What `print` shows beside the layers."""
        return f"{super().extra_repr()}, backend={self.backend!r}"


class CBAM1d(CBAM):
    """`CBAM` for x [N, C, L]."""

    def __init__(
        self, in_channels: int, ratio: int = 16, kernel_size: int | Sequence[int] = 7, **kwargs: Any
    ):
        super().__init__(in_channels, ratio, kernel_size, dim=1, **kwargs)


class CBAM2d(CBAM):
    """`CBAM` for x [N, C, H, W]."""

    def __init__(
        self, in_channels: int, ratio: int = 16, kernel_size: int | Sequence[int] = 7, **kwargs: Any
    ):
        super().__init__(in_channels, ratio, kernel_size, dim=2, **kwargs)


class CBAM3d(CBAM):
    """`CBAM` for x [N, C, D, H, W]."""

    def __init__(
        self, in_channels: int, ratio: int = 16, kernel_size: int | Sequence[int] = 7, **kwargs: Any
    ):
        super().__init__(in_channels, ratio, kernel_size, dim=3, **kwargs)


class CBAM_Module(CBAM):
    """`CBAM` by the constructor of the module that it replaces: change the import, nothing else."""

    def __init__(
        self,
        dim: int,
        in_channels: int,
        ratio: int,
        kernel_size: int | Sequence[int],
        **kwargs: Any,
    ):
        super().__init__(in_channels, ratio, kernel_size, dim=dim, **kwargs)
