"""A whole ResNet-50 with CBAM in every block, plain and fused: a training step, and inference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cbam_cuda
from cbam_cuda import reference

from .memory import peak_bytes
from .problems import LAYOUTS
from .resnet import CLASSES, ResNet50
from .rows import Found, Row
from .timing import as_found, time_once
from .truth import tolerance

NETWORKS = ("plain", "fused")
IMAGE = (3, 224, 224)
FEW_IMAGES = (4, *IMAGE)  # enough to compare outputs
# What the layers around the block work in: training under autocast, inference all of it.
DTYPES = {
    "cuda": {"training": torch.bfloat16, "inference": torch.float16},
    "cpu": {"training": torch.float32, "inference": torch.float32},
}


class Setting(NamedTuple):
    """What both networks are timed in."""

    mode: str  # a key of WORK
    layout: str

    def __str__(self) -> str:
        return f"{self.mode} {self.layout}"


class Effort(NamedTuple):
    """How much is timed."""

    images: int
    steps: int  # of a sample, which follow each other without a wait
    samples: int
    warm_ups: int


EFFORT = {"cuda": Effort(64, 5, 5, 3), "cpu": Effort(2, 1, 3, 1)}


def settings() -> list[Setting]:
    """All of them, the most wanted first."""
    return [Setting(mode, layout) for layout in LAYOUTS for mode in WORK]


def time_setting(setting: Setting, device: torch.device) -> list[Row]:
    """Both networks, once they are known to compute the same."""
    torch.backends.cudnn.allow_tf32 = False  # it would hide differences; no timing is of float32
    assert_agree(setting, device)
    return [time_network(setting, name, device, EFFORT[device.type]) for name in NETWORKS]


def networks(device: torch.device, layout: str) -> dict[str, nn.Module]:
    """By name, both with the same weights."""
    fused = functools.partial(cbam_cuda.CBAM, backend=device.type)
    torch.manual_seed(0)
    with device:
        found = {"plain": ResNet50(reference.CBAM), "fused": ResNet50(fused)}
    found["fused"].load_state_dict(found["plain"].state_dict())
    return {name: found[name].to(memory_format=LAYOUTS[layout]) for name in NETWORKS}


def assert_agree(
    setting: Setting, device: torch.device, shape: tuple[int, ...] = FEW_IMAGES
) -> None:
    """Fail unless outputs in float32 keep to the rule that the suite has for a single block.

    It fits the network too: the fused one may be off from the plain one in float64 by a multiple of
    what the plain one in float32 is off by, and what rounding does in all other layers is in both.
    Batch norms use their running statistics, which do not magnify the differences of few images.
    """
    images = _images(shape, device, setting.layout)
    plain, fused = (network.eval() for network in networks(device, setting.layout).values())
    with torch.set_grad_enabled(setting.mode == "training"):  # which operators are called
        one, other = plain(images).detach(), fused(images).detach()
    with torch.no_grad():
        truth = plain.double()(images.double())
    tolerance.assert_as_good_as_eager(str(setting), other, one, truth)


def time_network(setting: Setting, name: str, device: torch.device, effort: Effort) -> Row:
    """One network, alone in memory: median time of a step, and the most memory that one takes."""
    network = networks(device, setting.layout)[name]
    dtype = DTYPES[device.type][setting.mode]
    images = _images((effort.images, *IMAGE), device, setting.layout)
    work = WORK[setting.mode](network, images, dtype)
    for _ in range(effort.warm_ups):
        work()
    peak = peak_bytes(work, device)
    found = as_found(time_once(work, device, effort.steps) for _ in range(effort.samples))
    return {
        "name": f"{setting} {name}",
        **setting._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "contestant": name,
        "images": effort.images,
        "milliseconds": found["median"] / 1e3,
        "images_per_second": 1e6 * effort.images / found["median"],
        "peak_bytes": peak,
        "microseconds": found,
    }


def _images(shape: tuple[int, ...], device: torch.device, layout: str) -> Tensor:
    return torch.randn(shape, device=device).to(memory_format=LAYOUTS[layout])


def training(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """Forward, backward and update; weights in float32, the rest under autocast."""
    labels = torch.randint(CLASSES, images.shape[:1], device=images.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    mixed = dtype != torch.float32

    def work() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype if mixed else None, enabled=mixed):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()

    return work


def inference(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """Forward; weights and images in `dtype`."""
    network.eval().to(dtype)
    images = images.to(dtype)

    @torch.no_grad()
    def work() -> Any:
        return network(images)

    return work


WORK = {"training": training, "inference": inference}


def pairs(rows: list[Found]) -> dict[str, dict[str, Found]]:
    """Rows by setting and network; errors are left out."""
    found: dict[str, dict[str, Found]] = {}
    for row in rows:
        if "contestant" in row:
            found.setdefault(f"{row['mode']} {row['layout']}", {})[row["contestant"]] = row
    return found


def plain_over_fused(pair: dict[str, Found]) -> float:
    """How many times as long the plain network takes."""
    plain, fused = (float(pair[name]["milliseconds"]) for name in NETWORKS)
    return plain / fused
