"""ResNet-50 with CBAM in every block, in plain torch.nn.

K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, with the
stride in the 3x3 convolution. CBAM stands where its paper puts it: after a block's third batch
norm, before the shortcut is added.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # width, blocks, stride of the first
EXPANSION = 4
CLASSES = 1000

MakeCBAM = Callable[[int], nn.Module]  # of so many channels


class Bottleneck(nn.Module):
    """relu(shortcut(x) + CBAM(branch(x))); `at_once` where the block does all but the branches."""

    def __init__(
        self, channels: int, width: int, stride: int, cbam: MakeCBAM, at_once: bool = False
    ) -> None:
        super().__init__()
        self.at_once = at_once
        out = EXPANSION * width
        self.branch = nn.Sequential(
            *_conv(channels, width, 1),
            nn.ReLU(inplace=True),
            *_conv(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_conv(width, out, 1),
        )
        self.cbam = cbam(out)
        same = channels == out and stride == 1
        self.shortcut = nn.Sequential(*([] if same else _conv(channels, out, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        """Of x [N, channels, H, W]."""
        if self.at_once:
            return self.cbam(self.branch(x), residual=self.shortcut(x), activation="relu")
        return F.relu(self.cbam(self.branch(x)) + self.shortcut(x), inplace=True)


class ResNet50(nn.Module):
    """Scores of CLASSES classes; `cbam` makes the block for so many channels.

    `at_once`: the block adds the shortcut by itself, and the ReLU behind it.
    """

    def __init__(self, cbam: MakeCBAM, at_once: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            *_conv(3, 64, 7, 2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
        channels = 64
        for width, blocks, stride in STAGES:
            for index in range(blocks):
                step = 1 if index else stride
                layers.append(Bottleneck(channels, width, step, cbam, at_once))
                channels = EXPANSION * width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Of images [N, 3, H, W]."""
        return self.classifier(self.features(images).mean((2, 3)))


def _conv(channels: int, out: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution and its batch norm; the weights keep the scale of what passes them."""
    padding = kernel_size // 2
    conv = nn.Conv2d(channels, out, kernel_size, stride, padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(out)]
