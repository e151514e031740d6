"""CBAM as others have written it: classes, names of weights and formulas that are in the field.

Each class stands for a family that differs from the reference in what its comment says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Flat(nn.Module):
    def forward(self, x):
        return x.flatten(1)


class OfficialChannelGate(nn.Module):
    def __init__(self, channels, ratio, pools=("avg", "max")):
        super().__init__()
        hidden = channels // ratio
        self.mlp = nn.Sequential(
            Flat(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        self.pools = pools

    def forward(self, x):
        pooled = {
            "avg": lambda: F.avg_pool2d(x, x.shape[2:]),
            "max": lambda: F.max_pool2d(x, x.shape[2:]),
            "lse": lambda: x.flatten(2).logsumexp(2)[..., None, None],
        }
        logits = sum(self.mlp(pooled[kind]()) for kind in self.pools)
        return x * torch.sigmoid(logits)[..., None, None].expand_as(x)


class OfficialSpatialGate(nn.Module):
    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.spatial = nn.Sequential()
        self.spatial.add_module("conv", conv)
        self.spatial.add_module("bn", nn.BatchNorm2d(1, momentum=0.01))

    def forward(self, x):
        maps = torch.cat([x.max(1).values[:, None], x.mean(1)[:, None]], 1)
        return x * torch.sigmoid(self.spatial(maps))


class Official(nn.Module):
    """Linear layers, maximum first, batch normalisation, no bias of the convolution."""

    def __init__(self, channels, ratio=16, pools=("avg", "max"), no_spatial=False):
        super().__init__()
        self.ChannelGate = OfficialChannelGate(channels, ratio, pools)
        self.SpatialGate = nn.Identity() if no_spatial else OfficialSpatialGate()

    def forward(self, x):
        return self.SpatialGate(self.ChannelGate(x))


class ChannelAttention(nn.Module):
    """The gate alone, as it is copied most; no biases."""

    def __init__(self, channels, ratio=16):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Conv2d(channels, channels // ratio, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // ratio, channels, 1, bias=False),
        )

    def forward(self, x):
        return torch.sigmoid(self.fc(x.mean((2, 3), True)) + self.fc(x.amax((2, 3), True)))


class SpatialAttention(nn.Module):
    def __init__(self, kernel_size=7):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x):
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return torch.sigmoid(self.conv1(maps))


class Pair(nn.Module):
    """Both gates in a module; no biases."""

    def __init__(self, channels, ratio=16, kernel_size=7):
        super().__init__()
        self.ca, self.sa = ChannelAttention(channels, ratio), SpatialAttention(kernel_size)

    def forward(self, x):
        x = self.ca(x) * x
        return self.sa(x) * x


class Residual(Pair):
    """x added at the end, maximum first."""

    def forward(self, x):
        y = x * self.ca(x)
        maps = torch.cat([y.amax(1, keepdim=True), y.mean(1, keepdim=True)], 1)
        return y * torch.sigmoid(self.sa.conv1(maps)) + x


class Mask(Pair):
    """Not x times the gates, but these: whoever contains it multiplies."""

    def forward(self, x):
        gate = self.ca(x)
        return gate * self.sa(x * gate)


class Multiplied(nn.Module):
    def __init__(self, channels, ratio=16):
        super().__init__()
        self.mask = Mask(channels, ratio)

    def forward(self, x):
        return x * self.mask(x)


class Activated(nn.BatchNorm2d):
    """Batch normalisation that could do more, and does not."""

    def __init__(self, features):
        super().__init__(features, eps=1e-3)
        self.act = nn.Identity()

    def forward(self, x):
        return self.act(super().forward(x))


class Normalised(Pair):
    """Batch normalisation of a class of its own."""

    norm: type[nn.Module] = Activated

    def __init__(self, channels, ratio=16, kernel_size=3):
        super().__init__(channels, ratio, kernel_size)
        self.sa.conv1 = nn.Sequential(self.sa.conv1, self.norm(1))


class Late(Pair):
    """Layers made in another order than they are used in."""

    def __init__(self, channels, ratio=16):
        nn.Module.__init__(self)
        hidden = channels // ratio
        self.sa = SpatialAttention()
        self.up = nn.Conv2d(hidden, channels, 1)
        self.down = nn.Conv2d(channels, hidden, 1)

    def ca(self, x):
        """Pools that take one side for both."""
        side = x.shape[2]
        pooled = F.avg_pool2d(x, side), F.max_pool2d(x, side)
        return torch.sigmoid(sum(self.up(self.down(v).relu_()) for v in pooled))


class Volume(nn.Module):
    """Three dimensions."""

    def __init__(self, channels, ratio=16, kernel_size=3):
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // ratio)
        self.fc2 = nn.Linear(channels // ratio, channels)
        self.conv = nn.Conv3d(2, 1, kernel_size, padding="same")

    def forward(self, x):
        pooled = torch.stack([x.mean((2, 3, 4)), x.amax((2, 3, 4))])
        logits = self.fc2(self.fc1(pooled).relu()).sum(0)
        x = x * logits.sigmoid()[:, :, None, None, None]
        maps = torch.stack([x.mean(1), x.amax(1)], 1)
        return x * self.conv(maps).sigmoid()


KNOWN = {
    "official": Official,
    "pair": Pair,
    "residual": Residual,
    "mask": Multiplied,
    "own norm": Normalised,
    "late": Late,
    "volume": Volume,
}


class OneLayerCBAM(nn.Module):
    """The channel gate is one layer, of the mean alone."""

    def __init__(self, channels):
        super().__init__()
        self.fc, self.sa = nn.Conv2d(channels, channels, 1), SpatialAttention()

    def forward(self, x):
        x = x * torch.sigmoid(self.fc(x.mean((2, 3), True)))
        return x * self.sa(x)


class LightCbam(nn.Module):
    """One map, the mean of mean and maximum."""

    def __init__(self, channels):
        super().__init__()
        self.ca, self.conv = ChannelAttention(channels), nn.Conv2d(1, 1, 7, padding=3)

    def forward(self, x):
        x = x * self.ca(x)
        return x * torch.sigmoid(self.conv((x.mean(1, True) + x.amax(1, True)) / 2))


class TwoMeans(Pair):
    """A mistake that is copied: the mean twice."""

    def forward(self, x):
        x = x * torch.sigmoid(2 * self.ca.fc(x.mean((2, 3), True)))
        return x * self.sa(x)


class NoSigmoid(Pair):
    def forward(self, x):
        x = x * self.ca(x)
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.sa.conv1(maps)


class Smooth(Pair):
    """Another activation in the MLP."""

    def __init__(self, channels):
        super().__init__(channels)
        self.ca.fc[1] = nn.SiLU()


class Clipped(Pair):
    """A ReLU for all but large values."""

    def __init__(self, channels):
        super().__init__(channels)
        self.ca.fc[1] = nn.Hardtanh(0.0, 20.0)


class Dropped(Pair):
    """The same in inference, not in training."""

    def forward(self, x):
        return F.dropout(super().forward(x), training=self.training)


class Detached(Pair):
    """The same values, not the same gradients."""

    def forward(self, x):
        x = self.ca(x.detach()) * x
        return self.sa(x) * x


class Unlearned(Pair):
    """Its convolution gives the same, and learns nothing."""

    def __init__(self, channels):
        super().__init__(channels)
        self.sa = FixedAttention()


class FixedAttention(SpatialAttention):
    def forward(self, x):
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return torch.sigmoid(F.conv2d(maps, self.conv1.weight.detach(), padding=3))


class Wide(Pair):
    """The convolution skips pixels."""

    def __init__(self, channels):
        super().__init__(channels)
        self.sa.conv1 = nn.Conv2d(2, 1, 3, padding=2, dilation=2)


class WithMask(Pair):
    """Returns more than out."""

    def forward(self, x):
        y = x * self.ca(x)
        mask = self.sa(y)
        return y * mask, mask


class EvenKernel(Pair):
    def __init__(self, channels):
        super().__init__(channels)
        self.sa.conv1 = nn.Conv2d(2, 1, 4, padding="same")


class Optional(Pair):
    """Would take what says that gates are to be returned."""

    def forward(self, x, spatial=True):
        x = self.ca(x) * x
        return self.sa(x) * x if spatial else x


class Slow(nn.BatchNorm2d):
    """Another rule of running statistics."""

    def forward(self, z):
        if not self.training:
            return super().forward(z)
        with torch.no_grad():
            self.running_mean.lerp_(z.mean((0, 2, 3)), 0.5)
            self.running_var.lerp_(z.var((0, 2, 3)), 0.5)
        return F.batch_norm(z, None, None, self.weight, self.bias, True, eps=self.eps)


class OtherStatistics(Normalised):
    norm = Slow


class OwnSyncBN(nn.BatchNorm2d):
    """As there are for several processes; alone it is the one that it is derived from."""

    def forward(self, z):
        return super().forward(z)


class Synchronized(Normalised):
    norm = OwnSyncBN


class Block(nn.Module):
    """The gates are called by what contains them, after other layers of its own."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.ca, self.sa = ChannelAttention(channels), SpatialAttention()

    def forward(self, x):
        y = self.conv1(x)
        y = self.ca(y) * y
        return x + self.sa(y) * y


class Halves(Block):
    """With a whole one beside them."""

    def __init__(self, channels):
        super().__init__(channels)
        self.whole = Pair(channels)


class Cbam1Channel(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gate = Official(channels, no_spatial=True)

    def forward(self, x):
        return self.gate(x)


REFUSED = {
    "pools": (lambda c: Official(c, pools=("avg", "lse")), "computes something else than CBAM"),
    "no spatial gate": (Cbam1Channel, "expected an MLP of two layers.*got Linear, Linear"),
    "one layer": (OneLayerCBAM, "got Conv2d, Conv2d"),
    "one map": (LightCbam, "got Conv2d, Conv2d, Conv2d"),
    "two means": (TwoMeans, "computes something else"),
    "no sigmoid": (NoSigmoid, "computes something else"),
    "activation": (Smooth, "computes something else"),
    "clipped activation": (Clipped, "computes something else"),
    "dropout": (Dropped, "cannot be tried on random numbers: it draws random numbers"),
    "detached": (Detached, "computes something else"),
    "unlearned": (Unlearned, "computes something else"),
    "dilation": (Wide, "computes something else"),
    "tuple": (
        WithMask,
        "cannot be tried on random numbers: expected one tensor .*got tuple",
    ),
    "halves": (Block, "calls ca and sa, the halves of a CBAM"),
    "even kernel": (EvenKernel, "kernel_size: expected odd numbers, got .4, 4."),
    "an option": (Optional, "its forward takes x, spatial, and a block"),
    "other statistics": (OtherStatistics, "computes something else"),
    "statistics of its own": (Synchronized, "OwnSyncBN is a synchronized norm other than torch"),
    "names its halves": (Halves, "calls ca and sa, the halves of a CBAM"),
}
