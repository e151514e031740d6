"""What the kernels are meant to reach on a GPU, and what the timings of a run say of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..problems import BLOCKS
from ..rows import Found, fused, geometric_mean, median, speedup
from ..text import markdown, number
from .strategies import contestant

LARGE = 100e6  # bytes of x that no cache holds
# Batches of 8 and 32 of the first three stages, in 16 or 32 bits, some rounded.
MEDIUM_FROM, MEDIUM_TO = 12.5e6, 52e6
MANY = 128  # samples of 7x7
COMPARED_BATCH = 32  # with what others make of it
AUTOTUNED = "max-autotune"

Value = Callable[[Found], "float | None"]

NOTE = """\
Geometric means over the rows of these timings that a line is about ("rows", in every dtype and
layout that it does not name), and the worst of them; of microseconds beyond the copy, which may be
none, a plain mean. "Of copy" is the copy's time over ours; the copy of a backward, which
reads two tensors and writes one, is one and a half of a forward's. Ours is what "auto" picks, where
no strategy is named."""


class Target(NamedTuple):
    """A line: rows of a direction that are `about` it, a value of each, and what that is to be."""

    what: str
    aim: float
    stretch: float | None
    direction: str
    about: Callable[[Found], bool]
    value: Value
    at_most: bool = False  # microseconds; else at least, a ratio
    mean: Callable[[list[float]], float | None] = geometric_mean

    def cells(self, rows: Sequence[Found]) -> list[str]:
        """Of the table."""
        of = [row for row in rows if row.get("direction") == self.direction and self.about(row)]
        values = [value for row in of if (value := self.value(row)) is not None]
        head = [f"{self.direction}, {self.what}", number(self.aim, 2), number(self.stretch, 2)]
        found = self.mean(values) if values else None
        if found is None:
            return [*head, "not measured", "-", "0", ""]
        worst = max(values) if self.at_most else min(values)
        return [*head, number(found, 2), number(worst, 2), str(len(values)), self.verdict(found)]

    def verdict(self, found: float) -> str:
        """What of it is reached."""
        sign = -1 if self.at_most else 1
        if sign * found < sign * self.aim:
            return "missed"
        beyond = self.stretch is not None and sign * found >= sign * self.stretch
        return "stretch" if beyond else "reached"


def table(rows: Sequence[Found]) -> str:
    """A line a target."""
    header = ["target", "aim", "stretch", "measured", "worst", "rows", ""]
    return markdown(header, [target.cells(rows) for target in TARGETS])


def _bytes(row: Found) -> int:
    size: int = getattr(torch, row["dtype"]).itemsize
    return size * torch.Size(row["shape"]).numel()


def _of_copy(row: Found) -> float | None:
    found: float | None = row["fraction_of_copy"].get(fused(row))
    return found


def _resident_of_copy(row: Found) -> float | None:
    found: float | None = row["fraction_of_copy"].get(contestant("resident"))
    return found


def _beyond_copy(row: Found) -> float | None:
    copy, ours = median(row, "copy"), median(row, fused(row))
    return None if copy is None or ours is None else ours - copy


def _in_graph(row: Found) -> float | None:
    return median(row, fused(row)) if row["method"] == "graph" else None


def _of_own_bytes(row: Found) -> float | None:
    """All that its passes ask for, of memory or of a cache, at the copy's speed, over its time."""
    name = contestant("streaming")
    time, planned = median(row, name), row.get("plans", {}).get(name)
    if time is None or planned is None:
        return None
    asked_for: int = sum(planned["traffic_bytes"].values())
    return asked_for / time / 1e3 / float(row["copy_gigabytes_per_second"])


def _over(name: str) -> Value:
    return lambda row: speedup(row, name)


def _of_block(*blocks: tuple[int, int, int]) -> Callable[[Found], bool]:
    return lambda row: tuple(row["shape"][1:]) in blocks


def _large_16_bit(row: Found) -> bool:
    return _of_block(*BLOCKS[:3])(row) and row["dtype"] != "float32" and _bytes(row) >= LARGE


def _large_float32(row: Found) -> bool:
    return _of_block(BLOCKS[0])(row) and row["dtype"] == "float32" and _bytes(row) >= LARGE


def _many_of_7x7(row: Found) -> bool:
    return _of_block(BLOCKS[3])(row) and row["shape"][0] >= MANY


def _medium(row: Found) -> bool:
    return MEDIUM_FROM <= _bytes(row) <= MEDIUM_TO


def _large(row: Found) -> bool:
    return _bytes(row) >= LARGE


def _single(row: Found) -> bool:
    return bool(row["shape"][0] == 1)


def _compared(row: Found) -> bool:
    return bool(row["shape"][0] == COMPARED_BATCH)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


F, B = "forward", "backward"
TARGETS = (
    Target("16 bits, 56 to 14, from 100 MB: of copy", 0.85, 0.90, F, _large_16_bit, _of_copy),
    Target("2048x7x7, from 128 samples: of copy", 0.75, 0.85, F, _many_of_7x7, _of_copy),
    Target("float32, 56x56, from 100 MB: of copy", 0.75, 0.85, F, _large_float32, _of_copy),
    Target("13 to 50 MB: us beyond copy", 3.0, 2.0, F, _medium, _beyond_copy, True, _mean),
    Target("one sample, in a CUDA graph: us", 8.0, 6.0, F, _single, _in_graph, True),
    Target("streaming, from 100 MB: of its own bytes", 0.90, 0.95, F, _large, _of_own_bytes),
    Target("streaming, from 100 MB: of its own bytes", 0.90, 0.95, B, _large, _of_own_bytes),
    Target("resident, from 100 MB: of 1.5 copies", 0.75, 0.85, B, _large, _resident_of_copy),
    Target("32 samples: times as fast as eager", 8.0, None, F, _compared, _over("eager")),
    Target("32 samples: times as fast as eager", 8.0, None, B, _compared, _over("eager")),
    Target("32 samples: as tuned eager", 4.0, None, F, _compared, _over("tuned")),
    Target("32 samples: as tuned eager", 6.0, None, B, _compared, _over("tuned")),
    Target("32 samples: as max-autotune", 1.7, 2.0, F, _compared, _over(AUTOTUNED)),
    Target("32 samples: as max-autotune", 2.0, None, B, _compared, _over(AUTOTUNED)),
)
