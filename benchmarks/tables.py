"""Rows as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .contestants import RIVALS
from .network import NETWORKS, by_setting, plain_over
from .rows import Found, fused, geometric_mean, median, speedup, spread, timing
from .text import markdown, microseconds, number, shape_name

STRATEGIES = {"cuda streaming": "streaming", "cuda resident": "resident"}
BUSY = 0.1  # quartiles this fraction of the median away from it
DISTURBED = 50.0  # preemptions a second: at 4 ms each, a fifth of the time
NETWORK_COLUMNS = (("images_per_second", 1, 1), ("peak_bytes", 1e9, 2))

NOTE = """\
Medians in microseconds, with how far the quartiles are from them. The copy is the memory limit:
read x, write out; in the backward read x and out's gradient, write x's gradient; it writes over old
results, where all others allocate theirs. "eager/" and "best/" are how many times the fused block's
time plain PyTorch and the fastest of all others take. "of copy" is the copy's time over a
contestant's: the fraction of its bandwidth. MB is what the copy moves, GB/s how fast it does. Every
contestant was compared with float64 before it was timed."""
STRATEGIES_NOTE = """\
Where "streaming" and "resident" are given, each was forced; "fused" is the one that a user gets.
float32 is computed in float32: cuDNN may not round to TF32, as it does by default. Each time begins
with a cold L2 cache; those of a row are of CUDA graphs where any of its calls takes less than 50
microseconds."""

MEMORY_NOTE = """\
Forward and backward of x and all weights, in sizes of x: what autograd keeps until the backward,
and the most that exists at any time; x, out's gradient and the weights are not counted."""
MEMORY_ON_CPU_NOTE = """\
Nor is what the CPU backend allocates past PyTorch while it runs: three numbers a channel for each
sample, and for each thread 1/32 of a sample in float32 and two numbers a position for each of the
samples, up to eight, that it works on together."""
MEMORY_ON_CUDA_NOTE = """\
Compiled blocks were compiled to keep what the backward could have written over, as it is timed more
than once: their peak may be lower elsewhere."""

NETWORK_NOTE = """\
ResNet-50 with CBAM in every block, median milliseconds of a step, with how far the quartiles are
from it: forward, backward and SGD, or inference; the networks take turns. "fused" has the fused
block in the place of the plain one, "ended" one that also adds the shortcut, and the ReLU behind
it. "peak" is the most memory that tensors take beside the weights and the optimizer's state."""


def block_table(rows: Sequence[Found]) -> str:
    """Rows of one direction, and the geometric mean of the speed-ups."""
    rivals = _there(rows, RIVALS)
    forced = _there(rows, STRATEGIES)
    header = ["NxCx...", "dtype", "layout", "copy", *rivals, *(STRATEGIES[n] for n in forced)]
    header += ["fused", "eager/fused", "best/fused", "of copy"]
    body = []
    for row in rows:
        names = ("copy", *rivals, *forced, fused(row))
        ratios = (speedup(row, "eager"), best(row), of_copy(row, fused(row)))
        times = (_time(timing(row, name)) for name in names)
        body.append([*_problem(row), *times, *(number(ratio, 2) for ratio in ratios)])
    if len(rows) > 1:
        means = (geometric_mean(speedup(row, "eager") for row in rows), _mean_best(rows))
        blanks = [""] * (len(header) - 4)
        body.append(["geometric mean", *blanks, *(number(mean, 2) for mean in means), ""])
    return markdown(header, body, left=3)


def copy_table(rows: Sequence[Found]) -> str:
    """How near each contestant is to the copy; rows of one direction."""
    rivals = _there(rows, RIVALS)
    forced = _there(rows, STRATEGIES)
    header = ["NxCx...", "dtype", "layout", "MB", "GB/s of copy"]
    header += [f"{name} of copy" for name in (*rivals, *map(STRATEGIES.get, forced), "fused")]
    body = []
    for row in rows:
        speed = row["copy_gigabytes_per_second"]
        moved = speed * (median(row, "copy") or 0.0) / 1e3
        cells = [*_problem(row), number(moved, 1), number(speed, 1)]
        names = (*rivals, *forced, fused(row))
        body.append([*cells, *(number(of_copy(row, name), 3) for name in names)])
    return markdown(header, body, left=3)


def _there(rows: Sequence[Found], names: Iterable[str]) -> list[str]:
    """Those that any row has."""
    return [name for name in names if any(median(row, name) for row in rows)]


def _problem(row: Found) -> list[str]:
    return [shape_name(row["shape"]), row["dtype"], row["layout"]]


def _time(found: Found | None, unit: float = 1.0, digits: int | None = None) -> str:
    """A cell: the median, and how far the quartiles are from it."""
    if found is None:
        return "-"
    value = found["median"] / unit
    text = microseconds(value) if digits is None else number(value, digits)
    return f"{text} ±{100 * spread(found):.0f}%" if found["samples"] > 1 else text


def of_copy(row: Found, name: str) -> float | None:
    """The fraction of the copy's bandwidth at which a contestant works."""
    copy, own = median(row, "copy"), median(row, name)
    return None if copy is None or own is None else copy / own


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
            if ratio is not None and ratio < 1:
                line = f"{row['name']}, {row['direction']}: {name} takes {ratio:.2f} of our time"
                theirs, ours = timing(row, name), timing(row, fused(row))
                sure = theirs and ours and theirs["upper"] < ours["lower"]
                yield line if sure else f"{line}, within the noise"


def noise(rows: Sequence[Found]) -> str:
    """How far the quartiles of timings are from their medians, and what else ran meanwhile."""
    found = [t for row in rows for name in row["contestants"] if (t := timing(row, name))]
    spreads = sorted(map(spread, found))
    typical, worst = spreads[len(spreads) // 2], spreads[-1]
    text = f"the quartiles are {typical:.0%} of the median away from it, at worst {worst:.0%}"
    disturbed = [row for row in rows if row.get("preempted", 0.0) > DISTURBED]
    if disturbed:
        text += f"; other programs took processors in {len(disturbed)} of {len(rows)} rows"
    busy = typical > BUSY or 2 * len(disturbed) > len(rows)
    return text + ("; a busy machine, measure again" if busy else "")


def memory_note(rows: Sequence[Found]) -> str:
    """What the numbers are, and what they lack."""
    on_cuda = any("buffers" in row for row in rows)
    return f"{MEMORY_NOTE}\n{MEMORY_ON_CUDA_NOTE if on_cuda else MEMORY_ON_CPU_NOTE}"


def memory_table(rows: Sequence[Found]) -> str:
    """Rows that have `memory`."""
    names = [n for n in (*RIVALS, "fused") if any(n in row.get("memory", {}) for row in rows)]
    header = ["NxCx...", "dtype", "layout"]
    header += [f"{name} {what}" for what in ("kept", "peak") for name in names]
    body = []
    for row in rows:
        cells = _problem(row)
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
        times = [timing(row, name) for name in ("copy", "fused")]
        gains = [median(one, name) / median(row, name) for name in ("copy", "fused")]  # type: ignore[operator]
        body.append(
            [
                shape_name(row["shape"]),
                row["direction"],
                str(row["threads"]),
                *map(_time, times),
                *(number(gain, 2) for gain in gains),
            ]
        )
    return markdown(header, body, left=2)


def network_table(rows: Sequence[Found]) -> str:
    """A line a setting, the networks side by side."""
    settings = by_setting(rows)
    names = [name for name in NETWORKS if any(name in found for found in settings.values())]
    header = ["mode", "layout", "dtype", "images"]
    for unit in ("ms", "images/s", "peak GB"):
        header += [f"{name} {unit}" for name in names]
    header += [f"{NETWORKS[0]}/{name}" for name in names[1:]]
    body = []
    for found in settings.values():
        first = found[names[0]]
        cells = [first["mode"], first["layout"], first["dtype"], str(first["images"])]
        cells += [_time(found[name]["microseconds"], 1e3, 1) for name in names]
        for key, unit, digits in NETWORK_COLUMNS:
            cells += [number(found[name][key] / unit, digits) for name in names]
        body.append([*cells, *(number(plain_over(name, found), 2) for name in names[1:])])
    return markdown(header, body, left=3)
