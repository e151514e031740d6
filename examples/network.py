"""A small residual network for 28x28 grey images, with CBAM in every block."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (16, 32, 64)  # of the blocks; where they double, height and width are halved
RATIO = 4
CLASSES = 10

Attention = Callable[..., nn.Module]  # cbam_cuda.CBAM or cbam_cuda.reference.CBAM


class Block(nn.Module):
    """relu(x + CBAM(residual(x))): the place that the paper gives it in a ResNet."""

    def __init__(self, attention: Attention, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        # Batch norm follows: a bias would have no gradient but rounding.
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.cbam = attention(channels, ratio=RATIO, kernel_size=7)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, channels, H / stride, W / stride]."""
        return F.relu(self.shortcut(x) + self.cbam(self.residual(x)))

    def spatial_gate(self, x: Tensor) -> Tensor:
        """Where the block looks: [N, 1, H / stride, W / stride], from 0 to 1."""
        _, _, gate = self.cbam(self.residual(x), return_attention=True)
        return gate


class Network(nn.Module):
    """Stem, a block each at 28x28, 14x14 and 7x7, mean over space, linear classifier."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, CHANNELS[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS[0]),
            nn.ReLU(),
        )
        self.blocks = nn.Sequential()
        in_channels = CHANNELS[0]
        for channels in CHANNELS:
            stride = channels // in_channels
            self.blocks.append(Block(attention, in_channels, channels, stride))
            in_channels = channels
        self.classifier = nn.Linear(in_channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 1, 28, 28] -> logits [N, 10]."""
        return self.classifier(self.blocks(self.stem(images)).mean(dim=(2, 3)))

    @torch.no_grad()
    def spatial_gates(self, images: Tensor) -> list[Tensor]:
        """The spatial gate of each block, [N, 1, H, W], finest first."""
        gates = []
        x = self.stem(images)
        for block in self.blocks:
            gates.append(block.spatial_gate(x))
            x = block(x)
        return gates
