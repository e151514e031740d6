"""Timings as tables."""

from __future__ import annotations

from collections.abc import Sequence

from ..rows import Found, median
from ..text import markdown, number, shape_name
from .strategies import OTHER_SPLIT, STRATEGIES, contestant
from .targets import AUTOTUNED

RIVALS = ("eager", "tuned", AUTOTUNED)

TIMINGS_NOTE = """\
Medians in microseconds a call. "graph": 20 calls inside of a replayed CUDA graph; "launched": calls
one after another from Python. Every sample begins with a cold L2 cache and goes through several
inputs and outputs. The copy is the memory limit: read x, write out; in the backward read x and
out's gradient, write x's gradient; "of copy" is its time over the fused block's. The backward alone
is that of forwards made before: of plain and compiled blocks by autograd, of the fused one its
operator. Forward and backward alone are timed under each strategy; ratios and GB/s are those of the
one that "auto" picks. GB/s counts what the plan says the device's memory must move. Tuned is
plain PyTorch by its fastest operators, max-autotune that under torch.compile; both run at one batch
size only."""

SWEEP_NOTE = """\
Microseconds, measured as above, on contiguous tensors: inference, and the backward alone;
"auto/faster" is what the strategy that "auto" picks takes over the faster one; "other split" what
resident teams take whose blocks hold pixels where the plan's hold channels, or channels where those
hold pixels."""

HOST_NOTE = """\
Microseconds a call, of 8 in a row that begin with an idle device and do not wait for it: checks,
plan, memory and launches, and in a step autograd. PyTorch's multiplication is one launch without
any gradient."""


def host_table(rows: Sequence[Found]) -> str:
    """A line a work, a column a strategy."""
    works = dict.fromkeys(work for row in rows for work in row["contestants"])
    body = [[work, *(number(median(row, work), 1) for row in rows)] for work in works]
    return markdown([rows[0]["problem"], *(row["name"] for row in rows)], body)


def timing_table(rows: Sequence[Found], direction: str) -> str:
    """Rows of one direction."""
    header = ["NxCxHxW", "dtype", "layout", "by", "copy", *RIVALS]
    if direction == "step":
        header += ["fused", *(f"{name}/fused" for name in RIVALS), "of copy"]
        return markdown(header, [_step_cells(row) for row in rows], left=4)
    header += [*STRATEGIES, "auto", *(f"{name}/auto" for name in RIVALS)]
    header += [*(f"{strategy} of copy" for strategy in STRATEGIES), "GB/s"]
    return markdown(header, [_strategy_cells(row) for row in rows], left=4)


def _strategy_cells(row: Found) -> list[str]:
    auto, names = contestant(row.get("auto", "")), list(map(contestant, STRATEGIES))
    speed = row.get("plans", {}).get(auto, {}).get("gigabytes_per_second")
    return [
        *_times(row, names),
        row.get("auto", "-"),
        *_ratios(row, auto),
        *(number(row["fraction_of_copy"].get(name), 2) for name in names),
        number(speed, 0),
    ]


def _step_cells(row: Found) -> list[str]:
    fraction = number(row["fraction_of_copy"]["fused"], 2)
    return [*_times(row, ["fused"]), *_ratios(row, "fused"), fraction]


def _times(row: Found, ours: Sequence[str]) -> list[str]:
    cells = [shape_name(row["shape"]), row["dtype"], row["layout"], row["method"]]
    return cells + [number(median(row, n), 1) for n in ("copy", *RIVALS, *ours)]


def _ratios(row: Found, ours: str) -> list[str]:
    return [number(_ratio(median(row, n), median(row, ours)), 2) for n in RIVALS]


def _ratio(time: float | None, ours: float | None) -> float | None:
    return None if time is None or ours is None else time / ours


def sweep_table(rows: Sequence[Found]) -> str:
    """A line a cell, by shape and dtype, then by batch; rows of one direction."""
    header = ["CxHxW", "dtype", "N", "by", "copy", *STRATEGIES, "faster", "auto", "auto/faster"]
    header += [*(f"{strategy} predicted" for strategy in STRATEGIES), "other split"]
    ordered = sorted(rows, key=lambda row: (row["shape"][1:], row["dtype"], row["shape"][0]))
    return markdown(header, [_sweep_cells(row) for row in ordered], left=2)


def _sweep_cells(row: Found) -> list[str]:
    names, (n, *block) = list(map(contestant, STRATEGIES)), row["shape"]
    best, auto = (median(row, contestant(row.get(key, ""))) for key in ("faster", "auto"))
    others = (median(row, contestant(strategy)) for strategy in OTHER_SPLIT.values())
    plans = row.get("plans", {})
    seconds = [plans.get(name, {}).get("predicted_seconds") for name in names]
    return [
        shape_name(block),
        row["dtype"],
        str(n),
        row["method"],
        *(number(median(row, name), 1) for name in ("copy", *names)),
        row["faster"],
        row.get("auto", "-"),
        number(_ratio(auto, best), 2),
        *(number(None if s is None else s * 1e6, 1) for s in seconds),
        number(next(filter(None, others), None), 1),
    ]
