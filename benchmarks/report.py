"""The numbers of a benchmark as tables for people and JSON for programs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .contestants import NAMES, Shape
from .timing import Timing

DIRECTIONS = {"forward": "forward", "step": "forward + backward"}
BUSY = 0.2  # quartiles this fraction of the median apart


@dataclass(frozen=True)
class Row:
    """One shape: the timing of each contestant that ran, forward alone and with the backward."""

    shape: Shape
    forward: dict[str, Timing]
    step: dict[str, Timing]
    no_compile: str | None = None

    def timings(self, direction: str) -> dict[str, Timing]:
        """By name of the contestant; `direction` is a key of DIRECTIONS."""
        return self.forward if direction == "forward" else self.step

    def ratio(self, direction: str, name: str) -> float | None:
        """How many times the fused block's time `name` takes; None where it did not run."""
        timings = self.timings(direction)
        return timings[name].median / timings["fused"].median if name in timings else None

    def gigabytes_per_second(self, itemsize: int) -> float:
        """Of the fused forward, counted as the passes that nobody can save: read x, write out."""
        return 2 * math.prod(self.shape) * itemsize / self.forward["fused"].median / 1e3


def shape_name(shape: Iterable[int]) -> str:
    """As in the tables: 8x256x56x56."""
    return "x".join(map(str, shape))


def slugify(text: str) -> str:
    """`text` as a file name: lower-case words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None if none is."""
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def render_table(rows: Sequence[Row], direction: str, itemsize: int) -> str:
    """Microseconds and ratios in one direction, as Markdown that also reads well as it is."""
    header = ["NxCxHxW", *(f"{name} us" for name in NAMES), "eager/fused", "compile/fused"]
    body = [_cells(row, direction) for row in rows]
    means = (geometric_mean(r.ratio(direction, name) for r in rows) for name in _RIVALS)
    body.append(["geometric mean", *("" for _ in NAMES), *map(_times, means)])
    if direction == "forward":
        header.append("fused GB/s")
        speeds = [f"{row.gigabytes_per_second(itemsize):.1f}" for row in rows]
        body = [[*cells, speed] for cells, speed in zip(body, [*speeds, ""], strict=True)]
    return markdown(header, body)


_RIVALS = ("eager", "compile")


def _cells(row: Row, direction: str) -> list[str]:
    timings = row.timings(direction)
    times = (_microseconds(timings.get(name)) for name in NAMES)
    ratios = (_times(row.ratio(direction, name)) for name in _RIVALS)
    return [shape_name(row.shape), *times, *ratios]


def _microseconds(timing: Timing | None) -> str:
    if timing is None:
        return "-"
    return f"{timing.median:.0f}" if timing.median >= 100 else f"{timing.median:.1f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def markdown(header: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table: so many columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (w + 2) if index < left else "-" * (w + 1) + ":" for index, w in enumerate(widths)
    ]
    return "\n".join([line(header), f"|{'|'.join(rule)}|", *map(line, body)])


def render(rows: Sequence[Row], facts: Mapping[str, Any], itemsize: int) -> str:
    """The whole report: both tables, what they mean, and where they come from."""
    lines = [f"# CBAM block, {facts['dtype']}, {facts['layout']}: {facts['device']}", ""]
    for direction, title in DIRECTIONS.items():
        lines += [f"## {title.capitalize()}", "", render_table(rows, direction, itemsize), ""]
    lines += [
        "Medians in microseconds; each contestant allocates its results, all but the copy, which "
        "writes over old ones. The copy is the memory limit: read x, write out; with backward also "
        "read x, read out's gradient, write x's gradient. GB/s counts read x, write out.",
        "",
        f"- noise: {_noise(spreads(rows))}",
        *(f"- torch.compile is missing: {why}" for why in missing(rows)),
        *(f"- {key}: {value}" for key, value in facts.items() if value is not None),
    ]
    return "\n".join(lines) + "\n"


def spreads(rows: Iterable[Row]) -> list[float]:
    """How far apart the quartiles of each timing are, as a fraction of its median; sorted."""
    timings = [t for row in rows for d in DIRECTIONS for t in row.timings(d).values()]
    return sorted((t.upper - t.lower) / t.median for t in timings)


def _noise(spread: Sequence[float]) -> str:
    typical, worst = spread[len(spread) // 2], spread[-1]
    text = f"the quartiles are {typical:.0%} of the median apart, at worst {worst:.0%}"
    return text + ("; a busy machine, measure again" if typical > BUSY else "")


def missing(rows: Iterable[Row]) -> list[str]:
    """Why torch.compile is missing, each reason once."""
    return list(dict.fromkeys(row.no_compile for row in rows if row.no_compile))


def write(rows: Sequence[Row], facts: Mapping[str, Any], itemsize: int, stem: Path) -> None:
    """Write `stem`.md and `stem`.json."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    raw = {"facts": dict(facts), "rows": [_as_json(row) for row in rows]}
    stem.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n")
    stem.with_suffix(".md").write_text(render(rows, facts, itemsize))


def _as_json(row: Row) -> dict[str, Any]:
    named = {d: {name: t._asdict() for name, t in row.timings(d).items()} for d in DIRECTIONS}
    return {**asdict(row), **named}
