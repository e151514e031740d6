"""Rows as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .network import NETWORKS, pairs, plain_over_fused
from .rows import Found, fused, geometric_mean, median, speedup, timing
from .text import markdown, microseconds, number, shape_name

RIVALS = ("eager", "tuned", "timm", "compile", "tuned compile", "max-autotune")
BUSY = 0.2  # quartiles this fraction of the median apart
SLOWER = 0.95  # speed-ups below are shown as losses
NETWORK_COLUMNS = (("milliseconds", 1, 1), ("images_per_second", 1, 1), ("peak_bytes", 1e9, 2))

NOTE = """\
Medians in microseconds. The copy is the memory limit: read x, write out; in the backward read x and
out's gradient, write x's gradient; it writes over old results, where all others allocate theirs.
"of copy" is its time over the fused block's, GB/s what the fused block would move if it moved as
little. "eager/" and "best/" are how many times the fused block's time plain PyTorch and the fastest
of all others take. Every contestant was compared with float64 before it was timed."""

MEMORY_NOTE = """\
Forward and backward of x and all weights, in sizes of x: what autograd keeps until the backward,
and the most that exists at any time; x, out's gradient and the weights are not counted."""

NETWORK_NOTE = """\
ResNet-50 with CBAM in every block, median milliseconds of a step: forward, backward and SGD, or
inference. "peak" is the most memory that tensors take beside the weights."""


def block_table(rows: Sequence[Found]) -> str:
    """Rows of one direction, and the geometric mean of the speed-ups."""
    names = [name for name in RIVALS if any(median(row, name) for row in rows)]
    header = ["NxCx...", "dtype", "layout", "copy", *names, "fused"]
    header += ["eager/fused", "best/fused", "of copy", "GB/s"]
    body = [_block_cells(row, names) for row in rows]
    if len(rows) > 1:
        means = (geometric_mean(speedup(row, "eager") for row in rows), _mean_best(rows))
        blanks = [""] * (4 + len(names))
        body.append(["geometric mean", *blanks, *(number(mean, 2) for mean in means), "", ""])
    return markdown(header, body, left=3)


def _block_cells(row: Found, names: Sequence[str]) -> list[str]:
    ours = fused(row)
    of_copy = row["fraction_of_copy"].get(ours)
    speed = None if of_copy is None else of_copy * row["copy_gigabytes_per_second"]
    return [
        shape_name(row["shape"]),
        row["dtype"],
        row["layout"],
        *(microseconds(median(row, name)) for name in ("copy", *names, ours)),
        number(speedup(row, "eager"), 2),
        number(best(row), 2),
        number(of_copy, 2),
        number(speed, 1),
    ]


def best(row: Found) -> float | None:
    """The speed-up over the fastest other contestant."""
    found = [ratio for name in RIVALS if (ratio := speedup(row, name)) is not None]
    return min(found, default=None)


def _mean_best(rows: Sequence[Found]) -> float | None:
    return geometric_mean(best(row) for row in rows)


def losses(rows: Sequence[Found]) -> Iterator[str]:
    """A line for each row where another contestant is faster."""
    for row in rows:
        for name in RIVALS:
            ratio = speedup(row, name)
            if ratio is not None and ratio < SLOWER:
                yield f"{row['name']}, {row['direction']}: {name} takes {ratio:.2f} of our time"


def noise(rows: Sequence[Found]) -> str:
    """How far apart the quartiles of timings are."""
    found = [t for row in rows for name in row["contestants"] if (t := timing(row, name))]
    spread = sorted((t["upper"] - t["lower"]) / t["median"] for t in found)
    typical, worst = spread[len(spread) // 2], spread[-1]
    text = f"the quartiles are {typical:.0%} of the median apart, at worst {worst:.0%}"
    return text + ("; a busy machine, measure again" if typical > BUSY else "")


def memory_table(rows: Sequence[Found]) -> str:
    """Rows that have `memory`."""
    names = [n for n in (*RIVALS, "fused") if any(n in row.get("memory", {}) for row in rows)]
    header = ["NxCx...", "dtype", "layout"]
    header += [f"{name} {what}" for what in ("kept", "peak") for name in names]
    body = []
    for row in rows:
        cells = [shape_name(row["shape"]), row["dtype"], row["layout"]]
        for key in ("saved_bytes", "peak_bytes"):
            for name in names:
                found = row["memory"].get(name)
                cells.append(number(found and found[key] / row["bytes"], 2))
        body.append(cells)
    return markdown(header, body, left=3)


def threads_table(rows: Sequence[Found]) -> str:
    """Rows over numbers of threads, forward and backward side by side."""
    header = ["NxCx...", "direction", "threads", "copy", "fused", "copy 1/n", "fused 1/n"]
    alone = {(row["name"], row["direction"]): row for row in rows if row["threads"] == 1}
    body = []
    for row in rows:
        one = alone[row["name"], row["direction"]]
        times = [median(row, name) for name in ("copy", "fused")]
        gains = [median(one, name) / median(row, name) for name in ("copy", "fused")]  # type: ignore[operator]
        body.append(
            [
                shape_name(row["shape"]),
                row["direction"],
                str(row["threads"]),
                *map(microseconds, times),
                *(number(gain, 2) for gain in gains),
            ]
        )
    return markdown(header, body, left=2)


def network_table(rows: Sequence[Found]) -> str:
    """A line a setting, both networks side by side."""
    header = ["mode", "layout", "dtype", "images"]
    for unit in ("ms", "images/s", "peak GB"):
        header += [f"{name} {unit}" for name in NETWORKS]
    body = []
    for pair in pairs(rows).values():
        first = pair[NETWORKS[0]]
        cells = [first["mode"], first["layout"], first["dtype"], str(first["images"])]
        for key, unit, digits in NETWORK_COLUMNS:
            cells += [number(pair[name][key] / unit, digits) for name in NETWORKS]
        body.append([*cells, number(plain_over_fused(pair), 2)])
    return markdown([*header, "plain/fused"], body, left=3)
