"""Rows as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .contestants import COMPILED_ON_CUDA
from .rows import TITLES, Found, fused, median
from .text import shape_name

PICTURES = {
    "speed": "times as fast as plain PyTorch",
    "bandwidth": "bandwidth over the size of x",
    "batch": "microseconds a sample over the batch",
    "memory": "memory of training",
    "threads": "gain over one thread",
}
FILES = {"threads": "threads"}  # whose rows a picture is of; the others are of "block"
COLORS = {
    "copy": "#323f4b",
    "eager": "#9aa5b1",
    "tuned": "#7b8794",
    "timm": "#b8a15b",
    "compile": "#3d7ea6",
    "tuned compile": "#7fb3d0",
    "max-autotune": "#22577a",
    "tuned max-autotune": "#14a098",
    "fused": "#e4572e",
}
LABELS = {
    "copy": "copy, the limit",
    "eager": "plain PyTorch",
    "tuned": "tuned PyTorch",
    "timm": "timm",
    "compile": "torch.compile",
    "tuned compile": "tuned, torch.compile",
    "max-autotune": "torch.compile, max-autotune",
    "tuned max-autotune": "tuned, max-autotune",
    "fused": "cbam_cuda",
}
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#52606d",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.color": "#e4e7eb",
    "legend.frameon": False,
    "savefig.dpi": 130,
    "svg.fonttype": "none",
    "svg.hashsalt": "cbam_cuda",  # the same rows give the same file
}
METADATA = {".svg": {"Date": None}}
DIRECTIONS = ("forward", "step")
MARKERS = "os^Dvx"


def draw(name: str, rows: Sequence[Found], path: Path) -> None:
    """One of PICTURES."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 4.6))
        DRAW[name](figure.subplots(1, 1 if name == "memory" else 2), rows)
        figure.savefig(path, metadata=METADATA.get(path.suffix))
        plt.close(figure)


def usual(rows: Sequence[Found], direction: str) -> list[Found]:
    """Those that are compared in most ways: one dtype, layout and dimension; a row of a shape."""
    of = [r for r in rows if r.get("direction") == direction and len(r["shape"]) == 4]
    first = next(iter(of), None)
    if first is None:
        return []
    return [r for r in of if (r["dtype"], r["layout"]) == (first["dtype"], first["layout"])]


def with_compiled(rows: Sequence[Found]) -> Sequence[Found]:
    """Those that torch.compile took part in, if it did in any; some of its forms may be missing."""
    return [row for row in rows if COMPILED_ON_CUDA.keys() & row["contestants"].keys()] or rows


def draw_speed(panels: Sequence[Axes], rows: Sequence[Found]) -> None:
    """Bars of speed-ups over eager, the limit drawn in."""
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        of = with_compiled(usual(rows, direction))
        names = [n for n in COLORS if n not in ("copy", "eager") and any(_time(r, n) for r in of)]
        width = 0.84 / max(len(names), 1)
        for index, name in enumerate(names):
            shown = [(place, row) for place, row in enumerate(of) if _time(row, name)]
            places = [place + (index - (len(names) - 1) / 2) * width for place, _ in shown]
            gains = [_gain(row, name) for _, row in shown]
            bars = panel.bar(places, gains, width, color=COLORS[name], label=LABELS[name])
            if name == "fused":
                panel.bar_label(bars, fmt="%.1f", padding=2, color="#323f4b")
        for place, row in enumerate(of):
            limit = _gain(row, "copy")
            line = panel.hlines(limit, place - 0.45, place + 0.45, COLORS["copy"], linewidth=2)
        if of:
            line.set_label(LABELS["copy"])
        panel.axhline(1, color=COLORS["eager"], linewidth=2, label=LABELS["eager"])
        ticks = [f"{row['shape'][0]}x\n{shape_name(row['shape'][1:])}" for row in of]
        panel.set_xticks(range(len(of)), ticks, fontsize=8)
        panel.set(title=f"{TITLES[direction]}{_kind(of)}", yscale="log")
        panel.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        panel.grid(False, axis="x")
    panels[0].set_ylabel("times as fast as plain PyTorch")
    _legend(panels[0])


def draw_bandwidth(panels: Sequence[Axes], rows: Sequence[Found]) -> None:
    """The bytes that nobody can save over the time taken, over the size of x; a roof: the copy."""
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        of = usual(rows, direction)
        for name in COLORS:
            points = sorted(
                (_bytes(row) / 2**20, _speed(row, name)) for row in of if _time(row, name)
            )
            if name == "copy":  # the fastest of each size
                points = list(dict(points).items())
            if points:
                panel.plot(
                    *zip(*points, strict=True),
                    "-" if name == "copy" else "o",
                    color=COLORS[name],
                    label=LABELS[name],
                    markersize=7 if name == "fused" else 4,
                    linewidth=2.5,
                )
        panel.set(title=f"{TITLES[direction]}{_kind(of)}", xscale="log", yscale="log")
        panel.set(xlabel="x, MiB")
    panels[0].set_ylabel("GB/s")
    _legend(panels[0])


def draw_batch(panels: Sequence[Axes], rows: Sequence[Found]) -> None:
    """Time a sample over the batch, each block's fused one and plain PyTorch."""
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        of = usual(rows, direction)
        blocks = list(dict.fromkeys(tuple(row["shape"][1:]) for row in of))
        several = [b for b in blocks if sum(tuple(r["shape"][1:]) == b for r in of) > 1]
        for block, marker in zip(several, MARKERS, strict=False):
            for name, line in (("eager", "--"), ("fused", "-")):
                points = sorted(
                    (row["shape"][0], time / row["shape"][0])
                    for row in of
                    if tuple(row["shape"][1:]) == block and (time := _time(row, name))
                )
                label = f"{shape_name(block)}, {LABELS[name]}"
                panel.plot(
                    *zip(*points, strict=True),
                    marker + line,
                    color=COLORS[name],
                    label=label if name == "fused" else None,
                )
        panel.set(title=f"{TITLES[direction]}{_kind(of)}", xscale="log", yscale="log")
        batches = sorted({row["shape"][0] for row in of})
        panel.set_xticks(batches, [str(n) for n in batches])
        panel.set(xlabel="batch; dashed: plain PyTorch")
    panels[0].set_ylabel("microseconds a sample")
    _legend(panels[0])


def draw_memory(panel: Axes, rows: Sequence[Found]) -> None:
    """Bars of what autograd keeps, and of the peak above it, in sizes of x."""
    of = with_compiled([row for row in usual(rows, "step") if row.get("memory")])
    names = [name for name in COLORS if any(name in row["memory"] for row in of)]
    width = 0.84 / max(len(names), 1)
    for index, name in enumerate(names):
        shown = [(place, row) for place, row in enumerate(of) if name in row["memory"]]
        places = [place + (index - (len(names) - 1) / 2) * width for place, _ in shown]
        for key, alpha in (("peak_bytes", 0.45), ("saved_bytes", 1.0)):
            sizes = [row["memory"][name][key] / _bytes(row) for _, row in shown]
            label = LABELS[name] if key == "saved_bytes" else None
            panel.bar(places, sizes, width, color=COLORS[name], alpha=alpha, label=label)
    panel.set_xticks(range(len(of)), [shape_name(row["shape"]) for row in of])
    panel.set(title=f"Memory of training{_kind(of)}: kept for the backward, and (pale) at most")
    panel.set_ylabel("sizes of x")
    panel.grid(False, axis="x")
    _legend(panel)


def draw_threads(panels: Sequence[Axes], rows: Sequence[Found]) -> None:
    """How many times as fast as on one thread, the fused block and the copy."""
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        of = [row for row in rows if row["direction"] == direction]
        shapes = dict.fromkeys(tuple(row["shape"]) for row in of)
        for shape, marker in zip(shapes, MARKERS, strict=False):
            same = [row for row in of if tuple(row["shape"]) == shape]
            for name, line in (("copy", "--"), ("fused", "-")):
                times = [_time(row, name) or 1.0 for row in same]
                panel.plot(
                    [row["threads"] for row in same],
                    [times[0] / time for time in times],
                    marker + line,
                    color=COLORS[name],
                    label=f"{shape_name(shape)}, {LABELS[name]}",
                )
        counts = sorted({row["threads"] for row in of})
        panel.plot(counts, counts, ":", color=COLORS["eager"], label="as many times")
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.set(title=TITLES[direction], xlabel="threads")
    panels[0].set_ylabel("times as fast as one thread")
    _legend(panels[0])


def _legend(panel: Axes) -> None:
    """Below all panels."""
    handles, labels = panel.get_legend_handles_labels()
    if handles:
        figure = panel.get_figure()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)


def _time(row: Found, name: str) -> float | None:
    return median(row, fused(row) if name == "fused" else name)


def _gain(row: Found, name: str) -> float:
    return (_time(row, "eager") or 0.0) / (_time(row, name) or 1.0)


def _bytes(row: Found) -> int:
    """Of x."""
    passes = {"forward": 2, "step": 5}[row["direction"]]
    copied: float = row["copy_gigabytes_per_second"] * (_time(row, "copy") or 0.0) * 1e3
    return round(copied / passes)


def _speed(row: Found, name: str) -> float:
    return row["copy_gigabytes_per_second"] * (_time(row, "copy") or 0) / (_time(row, name) or 1)


def _kind(rows: Sequence[Found]) -> str:
    return f", {rows[0]['dtype']}, {rows[0]['layout']}" if rows else ""


DRAW: dict[str, Callable[[Any, Sequence[Found]], None]] = {
    "speed": draw_speed,
    "bandwidth": draw_bandwidth,
    "batch": draw_batch,
    "memory": draw_memory,
    "threads": draw_threads,
}
