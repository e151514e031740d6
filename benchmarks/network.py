"""A whole ResNet-50 with CBAM in every block: a training step, and inference.

Plain; with the fused block in its place; and with a fused block that ends the residual block, by
adding the shortcut and the ReLU behind it.
"""

from __future__ import annotations

import functools
import time
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

NETWORKS = ("plain", "fused", "ended")
IMAGE = (3, 224, 224)
FEW_IMAGES = (2, *IMAGE)  # enough to compare
# What the layers around the block work in: training under autocast, inference all of it.
DTYPES = {
    "cuda": {"training": torch.bfloat16, "inference": torch.float16},
    "cpu": {"training": torch.float32, "inference": torch.float32},
}


class Setting(NamedTuple):
    """What the networks are timed in."""

    mode: str  # a key of WORK
    layout: str

    def __str__(self) -> str:
        return f"{self.mode} {self.layout}"


class Effort(NamedTuple):
    """How much is timed."""

    images: int
    steps: int  # of a sample, which follow each other without a wait
    samples: int  # of each network, at least
    seconds: float  # after which there are no more samples than that
    warm_ups: int


EFFORT = {"cuda": Effort(64, 5, 5, 4.0, 3), "cpu": Effort(2, 1, 4, 5.0, 1)}
MOST_SAMPLES = 15


def settings() -> list[Setting]:
    """All of them, the most wanted first."""
    return [Setting(mode, layout) for layout in LAYOUTS for mode in WORK]


def time_setting(setting: Setting, device: torch.device) -> list[Row]:
    """All networks, taking turns, once they are known to compute the same."""
    torch.backends.cudnn.allow_tf32 = False  # it would hide differences; no timing is of float32
    assert_agree(setting, device)
    effort, dtype = EFFORT[device.type], DTYPES[device.type][setting.mode]
    images = _images((effort.images, *IMAGE), device, setting.layout)
    works, peaks = {}, {}
    for name, network in networks(device, setting.layout).items():
        works[name] = work = WORK[setting.mode](network, images, dtype)
        for _ in range(effort.warm_ups):
            work()
        network.zero_grad()  # gradients are part of what a step takes
        peaks[name] = peak_bytes(work, device)
    samples = _take_turns(works, device, effort)
    return [_row(setting, n, dtype, effort.images, peaks[n], samples[n]) for n in NETWORKS]


def _take_turns(
    works: dict[str, Callable[[], object]], device: torch.device, effort: Effort
) -> dict[str, list[float]]:
    """Microseconds of a step, as many of each."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    end = time.monotonic() + effort.seconds
    for count in range(MOST_SAMPLES):
        if count >= effort.samples and time.monotonic() > end:
            break
        for name, work in works.items():
            samples[name].append(time_once(work, device, effort.steps))
    return samples


def _row(
    setting: Setting, name: str, dtype: torch.dtype, images: int, peak: int, samples: list[float]
) -> Row:
    found = as_found(samples)
    return {
        "name": f"{setting} {name}",
        **setting._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "contestant": name,
        "images": images,
        "milliseconds": found["median"] / 1e3,
        "images_per_second": 1e6 * images / found["median"],
        "peak_bytes": peak,
        "microseconds": found,
    }


def networks(device: torch.device, layout: str) -> dict[str, nn.Module]:
    """By name, all with the same weights."""
    fused = functools.partial(cbam_cuda.CBAM, backend=device.type)
    torch.manual_seed(0)
    with device:
        found = {
            "plain": ResNet50(reference.CBAM),
            "fused": ResNet50(fused),
            "ended": ResNet50(fused, at_once=True),
        }
    for network in found.values():
        network.load_state_dict(found["plain"].state_dict())
    return {name: found[name].to(memory_format=LAYOUTS[layout]) for name in NETWORKS}


def assert_agree(
    setting: Setting, device: torch.device, shape: tuple[int, ...] = FEW_IMAGES
) -> None:
    """Fail unless outputs in float32 and gradients keep to the rule that a single block has.

    It fits the network too: a fused one may be off from the plain one in float64 by a multiple of
    what the plain one in float32 is off by, and what rounding does in all other layers is in both.
    Gradients are compared in float64: in float32 either network takes another element for a maximum
    here and there, and many layers carry that on. Batch norms use their running statistics, which
    do not magnify the differences of few images.
    """
    images = _images(shape, device, setting.layout)
    plain, *others = (network.eval() for network in networks(device, setting.layout).values())
    with torch.set_grad_enabled(setting.mode == "training"):  # which operators are called
        one, *outs = (network(images).detach() for network in (plain, *others))
    wide = images.double()
    with torch.no_grad():
        truth = plain.double()(wide)
    for out in outs:
        tolerance.assert_as_good_as_eager(str(setting), out, one, truth)
    if setting.mode == "training":
        expected = gradients(plain, wide)
        for network in others:
            found = gradients(network.double(), wide)
            for name, truth in expected.items():
                tolerance.assert_as_good_as_eager(f"{setting}, {name}", found[name], truth, truth)


def gradients(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Of half the sum of squared scores, by the images and by all weights."""
    leaves = {"images": images.detach().requires_grad_(), **dict(network.named_parameters())}
    out = network(leaves["images"])
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), out), strict=True))


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


def by_setting(rows: list[Found]) -> dict[str, dict[str, Found]]:
    """Rows by setting and network; errors are left out."""
    found: dict[str, dict[str, Found]] = {}
    for row in rows:
        if "contestant" in row:
            found.setdefault(f"{row['mode']} {row['layout']}", {})[row["contestant"]] = row
    return found


def plain_over(name: str, found: dict[str, Found]) -> float:
    """How many times as long as a network the plain one takes."""
    return float(found[NETWORKS[0]]["milliseconds"]) / float(found[name]["milliseconds"])
