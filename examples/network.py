"""A small residual network for 28x28 grey images, with CBAM in every block."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = (16, 32, 64)
RATIO = 4
CLASSES = 10

Attention = Callable[..., nn.Module]  # cbam_cuda.CBAM or cbam_cuda.reference.CBAM


class Block(nn.Module):
    """relu(shortcut + CBAM(two convolutions)), the place that the CBAM paper gives it."""

    def __init__(self, attention: Attention, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        # No bias before batch norm: its gradient would be nothing but rounding.
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.cbam = attention(channels, ratio=RATIO, kernel_size=7)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output and its spatial gate."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y, _, spatial_gate = self.cbam(y, return_attention=True)
        return F.relu(self.shortcut(x) + y), spatial_gate
