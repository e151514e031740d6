"""The pictures of the demo: where the network looks, and what it learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.plots import COLORS, LABELS, STYLE

OUTLINE = "#19c3d6"  # of the digits; seen on both ends of the colour map
EQUAL = 1e-8  # stands for no difference: less than one unit in the last place of a float32 loss


def one_of_each(images: Tensor, labels: Tensor) -> Tensor:
    """The first image of each class, in the order of the classes."""
    chosen = [int((labels == label).nonzero()[0]) for label in labels.unique(sorted=True)]
    return images[chosen]


@plt.rc_context(STYLE)
def draw_attention(images: Tensor, gates: Sequence[Tensor], path: Path) -> None:
    """A row of digits, and below it the spatial gate of each stage laid over them."""
    rows, columns = 1 + len(gates), len(images)
    figure, axes = plt.subplots(rows, columns, figsize=(1.15 * columns + 1.6, 1.2 * rows + 0.6))
    figure.suptitle(
        "Where the fused CBAM looks: spatial gate on digits it never saw", weight="bold"
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    _row_title(axes[0, 0], "digit")
    for axis, image in zip(axes[0], images.cpu(), strict=True):
        axis.imshow(image[0], cmap="gray_r")
    for row, gate in zip(axes[1:], gates, strict=True):
        size = "x".join(map(str, gate.shape[2:]))
        _row_title(row[0], f"gate\n{size}")
        maps = F.interpolate(gate, size=images.shape[2:], mode="bilinear").cpu()
        for axis, image, seen in zip(row, images.cpu(), maps, strict=True):
            shown = axis.imshow(
                seen[0], cmap="magma", vmin=float(maps.min()), vmax=float(maps.max())
            )
            axis.contour(image[0], levels=[0.4], colors=OUTLINE, linewidths=1)
        figure.colorbar(shown, ax=row, shrink=0.85, pad=0.01)
    figure.savefig(path)
    plt.close(figure)


def _row_title(axis: Axes, text: str) -> None:
    axis.set_ylabel(text, rotation=0, ha="right", va="center", labelpad=8)


@plt.rc_context(STYLE)
def draw_losses(
    plain: Sequence[float],
    fused: Sequence[float],
    rewritten: Mapping[str, Sequence[float]],
    allowed: Sequence[float],
    path: Path,
) -> None:
    """Both loss curves; below them how far apart they and the `rewritten` plain ones begin."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7.5), height_ratios=[5, 4])
    steps = range(1, len(plain) + 1)
    top.plot(steps, plain, color=COLORS["eager"], linewidth=5, label=LABELS["eager"])
    top.plot(steps, fused, color=COLORS["fused"], linewidth=1.5, label=LABELS["fused"])
    top.set(title="The same weights and batches: loss of the whole training")
    top.set(xlabel="step", ylabel="cross entropy", yscale="log")
    top.legend()

    first = steps[: len(allowed)]
    bottom.plot(first, allowed, color="#52606d", linestyle="--", label="allowed")
    for (name, losses), marker in zip(rewritten.items(), "^v", strict=True):
        apart = _apart(losses, plain[: len(losses)])
        bottom.plot(first, apart, marker, color=COLORS["eager"], label=f"plain, {name}")
    bottom.plot(
        first,
        _apart(fused, plain)[: len(first)],
        "o-",
        color=COLORS["fused"],
        label=LABELS["fused"],
    )
    bottom.set(title="Rounding, magnified by training: distance from plain PyTorch")
    bottom.set(xlabel="step", ylabel="difference of the losses", yscale="log")
    bottom.set_xticks(first[::2], first[::2])
    powers = range(-6, 1, 2)
    bottom.set_yticks(
        [EQUAL, *(10.0**power for power in powers)], ["none", *(f"$10^{{{p}}}$" for p in powers)]
    )
    bottom.legend(loc="upper left", ncols=2)
    figure.savefig(path)
    plt.close(figure)


def _apart(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Drawn on a logarithmic axis, which has no zero."""
    return [max(abs(x - y), EQUAL) for x, y in zip(a, b, strict=True)]
