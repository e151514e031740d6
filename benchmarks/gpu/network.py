"""A whole ResNet-50 with CBAM in every block, plain and fused: a training step, and inference.

``python -m benchmarks.gpu.network FOLDER SECONDS`` takes the rows and writes the file as it goes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cbam_cuda
from cbam_cuda import reference

from ..contestants import LAYOUTS
from ..resnet import CLASSES, ResNet50
from ..timing import summarize, time_once
from . import rows
from .inputs import tolerance
from .results import Folder, Outcome
from .rows import Row
from .tables import NETWORKS, network_ratios

IMAGES = (64, 3, 224, 224)
FEW_IMAGES = (4, 3, 224, 224)  # enough to compare outputs
STEPS, SAMPLES, WARM_UPS = 5, 5, 3  # steps of a sample follow each other without a wait
ROW_SECONDS = 6.0  # with less left, a pair of rows is not begun


class Setting(NamedTuple):
    """What both networks are timed in."""

    mode: str  # a key of WORK
    layout: str

    def __str__(self) -> str:
        return f"{self.mode} {self.layout}"


def settings() -> list[Setting]:
    """All of them, the most wanted first."""
    return [Setting(mode, layout) for layout in LAYOUTS for mode in WORK]


def step(seconds: float, folder: Folder) -> Outcome:
    """Time them in another process."""
    outcome = rows.step("network", seconds, folder)
    return dataclasses.replace(outcome, summary=f"{outcome.summary}; {told(outcome)}")


def told(outcome: Outcome) -> str:
    """How many times as long the plain network takes."""
    ratios = network_ratios(outcome.details["rows"])
    return "plain/fused: " + (", ".join(f"{n} {r:.2f}" for n, r in ratios.items()) or "none")


def time_setting(setting: Setting, left: float) -> list[Row]:
    """Both networks, once they are known to compute the same."""
    device = torch.device("cuda")
    torch.backends.cudnn.allow_tf32 = False  # it would hide differences; no timing is of float32
    assert_agree(setting, device)
    return [time_network(setting, name, device) for name in NETWORKS]


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


def time_network(
    setting: Setting, name: str, device: torch.device, shape: tuple[int, ...] = IMAGES
) -> Row:
    """One network, alone in memory: median time of a step, and the most memory that one takes."""
    network = networks(device, setting.layout)[name]
    work = WORK[setting.mode](network, _images(shape, device, setting.layout))
    for _ in range(WARM_UPS):
        work()
    torch.cuda.reset_peak_memory_stats()
    raw = [time_once(work, device, STEPS) for _ in range(SAMPLES)]
    timing = summarize(raw)
    return {
        "name": f"{setting} {name}",
        **setting._asdict(),
        "contestant": name,
        "images": shape[0],
        "milliseconds": timing.median / 1e3,
        "images_per_second": 1e6 * shape[0] / timing.median,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "microseconds": {**timing._asdict(), "raw": [round(value, 3) for value in raw]},
    }


def _images(shape: tuple[int, ...], device: torch.device, layout: str) -> Tensor:
    return torch.randn(shape, device=device).to(memory_format=LAYOUTS[layout])


def training(network: nn.Module, images: Tensor) -> Callable[[], object]:
    """Forward, backward and update: bfloat16 under autocast, weights in float32."""
    labels = torch.randint(CLASSES, images.shape[:1], device=images.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def work() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()

    return work


def inference(network: nn.Module, images: Tensor) -> Callable[[], object]:
    """Forward; all in float16."""
    network.eval().half()
    images = images.half()

    @torch.no_grad()
    def work() -> Any:
        return network(images)

    return work


WORK = {"training": training, "inference": inference}


if __name__ == "__main__":
    rows.main("network", settings(), ROW_SECONDS, time_setting, lambda setting: None)
