"""A whole ResNet-50 with CBAM in every block, on the GPU.

``python -m benchmarks.gpu.network FOLDER SECONDS`` takes the rows and writes the file as it goes.
"""

from __future__ import annotations

import dataclasses

import torch

from ..network import Setting, pairs, plain_over_fused, settings, time_setting
from ..outcome import Folder, Outcome
from ..rows import Row
from . import rows

ROW_SECONDS = 6.0  # with less left, a pair of rows is not begun


def step(seconds: float, folder: Folder) -> Outcome:
    """Time them in another process."""
    outcome = rows.step("network", seconds, folder)
    return dataclasses.replace(outcome, summary=f"{outcome.summary}; {told(outcome)}")


def told(outcome: Outcome) -> str:
    """How many times as long the plain network takes."""
    ratios = {n: plain_over_fused(pair) for n, pair in pairs(outcome.details["rows"]).items()}
    return "plain/fused: " + (", ".join(f"{n} {r:.2f}" for n, r in ratios.items()) or "none")


def take(setting: Setting, left: float) -> list[Row]:
    """A row a network."""
    return time_setting(setting, torch.device("cuda"))


if __name__ == "__main__":
    rows.main("network", settings(), ROW_SECONDS, take, lambda setting: None)
