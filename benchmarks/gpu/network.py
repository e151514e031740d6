"""A whole ResNet-50 with CBAM in every block, on the GPU.

``python -m benchmarks.gpu.network FOLDER SECONDS`` takes the rows and writes the file as it goes.
"""

from __future__ import annotations

import dataclasses

import torch

from ..network import NETWORKS, Setting, by_setting, plain_over, settings, time_setting
from ..outcome import Folder, Outcome
from ..rows import Row
from . import rows

ROW_SECONDS = 8.0  # with less left, a setting is not begun


def step(seconds: float, folder: Folder) -> Outcome:
    """Time them in another process."""
    outcome = rows.step("network", seconds, folder)
    return dataclasses.replace(outcome, summary=f"{outcome.summary}; {told(outcome)}")


def told(outcome: Outcome) -> str:
    """How many times as long the plain network takes as each of the others."""
    found = by_setting(outcome.details["rows"])
    said = []
    for name in NETWORKS[1:]:
        ratios = (f"{setting} {plain_over(name, timed):.2f}" for setting, timed in found.items())
        said.append(f"{NETWORKS[0]}/{name}: {', '.join(ratios) or 'none'}")
    return "; ".join(said)


def take(setting: Setting, left: float) -> list[Row]:
    """A row a network."""
    return time_setting(setting, torch.device("cuda"))


if __name__ == "__main__":
    rows.main("network", settings(), ROW_SECONDS, take, lambda setting: None)
