"""CBAM in plain PyTorch: the definition of correct, and the fallback where nothing is fused.

S. Woo, J. Park, J.-Y. Lee, I. S. Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import Weights, check_sizes

_CONV_MODULE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MEAN = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_MAX = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def cbam(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    *,
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """CBAM of x [N, C, *space] by PyTorch's own operators; arguments as in `cbam_cuda.cbam`.

    Weights of another dtype than x's work in their own dtype; what they give is rounded to x's.
    """
    weights = Weights(fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, conv_bias)
    channel_gate = _channel_gate(x, weights)
    y = x * channel_gate
    spatial_gate = _spatial_gate(y, weights)
    out = y * spatial_gate
    return (out, channel_gate, spatial_gate) if return_attention else out


def _channel_gate(x: Tensor, w: Weights) -> Tensor:
    """sigmoid(MLP(mean over space) + MLP(max over space)), [N, C, 1, ...]."""
    dim = x.dim() - 2
    conv, ones = _CONV[dim], (1,) * dim
    fc1 = w.fc1_weight.reshape(*w.fc1_weight.shape[:2], *ones)
    fc2 = w.fc2_weight.reshape(*w.fc2_weight.shape[:2], *ones)

    def mlp(pooled: Tensor) -> Tensor:
        hidden = F.relu(conv(pooled.to(fc1.dtype), fc1, w.fc1_bias))
        return conv(hidden, fc2, w.fc2_bias)

    logits = mlp(_MEAN[dim](x, 1)) + mlp(_MAX[dim](x, 1))
    return torch.sigmoid(logits).to(x.dtype)


def _spatial_gate(y: Tensor, w: Weights) -> Tensor:
    """sigmoid(conv([mean over channels; max over channels])), [N, 1, *space]."""
    maps = torch.cat([y.mean(dim=1, keepdim=True), y.max(dim=1, keepdim=True).values], dim=1)
    padding = [size // 2 for size in w.conv_weight.shape[2:]]
    logits = _CONV[y.dim() - 2](
        maps.to(w.conv_weight.dtype), w.conv_weight, w.conv_bias, padding=padding
    )
    return torch.sigmoid(logits).to(y.dtype)


class CBAM(nn.Module):
    """CBAM as a module in plain PyTorch; owns the weights that `cbam_cuda.CBAM` also has.

    Args, shapes and errors are those of `cbam_cuda.CBAM`, which see; there is no backend to choose.
    """

    def __init__(
        self,
        in_channels: int,
        ratio: int = 16,
        kernel_size: int = 7,
        *,
        dim: int = 2,
        bias: bool = True,
        conv_bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = check_sizes(in_channels, ratio, kernel_size, dim)
        conv = _CONV_MODULE[dim]
        self.dim = dim
        self.fc1 = conv(in_channels, hidden, 1, bias=bias, device=device, dtype=dtype)
        self.fc2 = conv(hidden, in_channels, 1, bias=bias, device=device, dtype=dtype)
        self.conv = conv(
            2, 1, kernel_size, padding=kernel_size // 2, bias=conv_bias, device=device, dtype=dtype
        )

    def weights(self) -> Weights:
        """The tensors that the function takes after x."""
        # Looked up where modules keep them: as attributes that takes longer than small blocks do.
        # Weights that are computed, as by a parametrization, are attributes alone.
        found: list[Any] = []
        for name in ("fc1", "fc2", "conv"):
            layer = self._modules[name]
            for kind in ("weight", "bias"):
                own = layer._parameters  # type: ignore[union-attr]
                found.append(own[kind] if kind in own else getattr(layer, kind))
        return Weights(*found)

    def forward(
        self, x: Tensor, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """CBAM of x."""
        return cbam(x, *self.weights(), return_attention=return_attention)

    def extra_repr(self) -> str:
        """What `print` shows beside the layers."""
        return f"dim={self.dim}"
