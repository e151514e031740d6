"""Blocks with more to them than the published one, on the GPU.

``python -m benchmarks.gpu.variants FOLDER SECONDS`` takes the stages of a ResNet-50 and writes the
file as it goes.
"""

from __future__ import annotations

import torch

from .. import variants
from ..outcome import Folder, Outcome
from ..problems import Problem, in_stages
from ..rows import Row
from . import rows
from .problems import too_large

ROW_SECONDS = 4.0  # with less left, a stage is not begun
SECONDS = 0.1  # of a contestant


def step(seconds: float, folder: Folder) -> Outcome:
    """Time them in another process."""
    return rows.step("variants", seconds, folder)


def take(problem: Problem, left: float) -> list[Row]:
    """A row for each mode: medians in microseconds, by contestant."""
    cuda = torch.device("cuda")
    return [
        {
            "name": str(problem),
            "mode": name,
            "medians": variants.medians(problem, cuda, mode, SECONDS),
        }
        for name, mode in variants.MODES.items()
    ]


if __name__ == "__main__":
    rows.main("variants", list(in_stages(32)), ROW_SECONDS, take, too_large)
