"""Rows of timings, taken one by one in a process of their own until the time is over."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from cbam_cuda.plan import plan

from ..contestants import first_line
from .commands import run, tail
from .problems import Problem
from .results import FAILED, PASSED, Folder, Outcome
from .strategies import STRATEGIES, contestant

LEFT_FOR_THE_END = 15.0
COPY_PASSES = {"forward": 2, "backward": 3}  # over tensors of x's size; each is timed by strategy

Row = dict[str, Any]
Wanted = TypeVar("Wanted")  # what a row is of; its text is the row's name


def step(name: str, seconds: float, folder: Folder) -> Outcome:
    """Take those of a module in another process; what it wrote is there even if it crashed."""
    limit = max(seconds - LEFT_FOR_THE_END, 1)
    module = f"{__package__}.{name}"
    command = [sys.executable, "-m", module, str(folder.path.resolve()), f"{limit:.0f}"]
    done = run(command, seconds)
    found = folder.read(name) or {"rows": [], "skipped": [], "ended": False}
    return judge(found, "timeout" if done.timed_out else f"exit code {done.code}", done.text)


def judge(found: dict[str, Any], how: str, text: str) -> Outcome:
    """From the file and, where it was left early, from how that happened."""
    rows, skipped = found["rows"], found["skipped"]
    problems = [f"{row['name']}: {row['error']}" for row in rows if "error" in row]
    details = {"rows": rows, "skipped": skipped, "ended": found["ended"]}
    if not found["ended"]:
        problems.append(f"{how}: {' | '.join(tail(text, 1))}")
        details["output"] = tail(text, 40)
    summary = f"{len(rows)} rows"
    if skipped:
        reasons = dict.fromkeys(skip["reason"] for skip in skipped)
        summary += f", {len(skipped)} skipped ({'; '.join(reasons)})"
    return Outcome(FAILED if problems else PASSED, summary, problems, details)


def take(
    wanted: Sequence[Wanted],
    seconds: float,
    shortest: float,
    time_row: Callable[[Wanted, float], list[Row]],
    why_not: Callable[[Wanted], str | None],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Time row after row, none begun with less than `shortest` seconds left.

    `time_row` is also given the seconds left; `keep` is given all there is after each row.
    """
    end = time.monotonic() + seconds
    found: dict[str, Any] = {"rows": [], "skipped": [], "ended": False}
    for problem in wanted:
        left = end - time.monotonic()
        reason = "no time left" if left < shortest else why_not(problem)
        if reason:
            found["skipped"].append({"name": str(problem), "reason": reason})
            continue
        try:
            found["rows"] += time_row(problem, left)
        except Exception as error:  # out of memory, a failed launch: the next row may do
            found["rows"].append({"name": str(problem), "error": first_line(error)})
        keep(found)
    keep({**found, "ended": True})


def describe(
    problem: Problem,
    direction: str,
    found: dict[str, dict[str, Any]],
    count: int,
    missing: dict[str, str],
) -> Row:
    """What is kept of a row. Speeds are those in a graph where there is one."""
    ours = [name for name in ("fused", *map(contestant, STRATEGIES)) if name in found]
    method = "graph" if all("graph" in found[name] for name in ("copy", *ours)) else "launched"
    times = {name: found[name][method]["median"] for name in ("copy", *ours)}
    row: Row = {
        "name": str(problem),
        "direction": direction,
        "shape": list(problem.shape),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "layout": problem.layout,
        "buffers": count,
        "contestants": found,
        "missing": missing,
        "method": method,
        "fraction_of_copy": {name: times["copy"] / times[name] for name in ours},
    }
    if passes := COPY_PASSES.get(direction):
        row["copy_gigabytes_per_second"] = passes * problem.bytes / times["copy"] / 1e3
        row["faster"] = min(ours, key=times.__getitem__).removeprefix("cuda ")
        try:
            row |= _planned(problem, direction, times)
        except (RuntimeError, ValueError) as error:  # the timing is worth keeping
            missing["plan"] = first_line(error)
    return row


def _planned(problem: Problem, direction: str, times: dict[str, float]) -> Row:
    """What "auto" picks, what each plan says, and the speeds that follow."""
    dtype, last = str(problem.dtype).removeprefix("torch."), problem.layout == "channels_last"
    kind = {"channels_last": last, "backward": direction == "backward"}
    auto = plan(problem.shape, dtype, "cuda:0", **kind)
    plans = {}
    for strategy in STRATEGIES:
        if (name := contestant(strategy)) not in times:
            continue
        found = plan(problem.shape, dtype, "cuda:0", strategy=strategy, **kind)
        plans[name] = {
            "passes": found["passes"],
            "traffic_bytes": found["traffic"],
            "device_memory_bytes": found["device_memory_bytes"],
            "predicted_seconds": found["predicted_seconds"],
            "gigabytes_per_second": found["device_memory_bytes"] / times[name] / 1e3,
        }
    return {"auto": auto["strategy"], "reason": auto["reason"], "plans": plans}


def main(
    name: str,
    wanted: Sequence[Wanted],
    shortest: float,
    time_row: Callable[[Wanted, float], list[Row]],
    why_not: Callable[[Wanted], str | None],
) -> None:
    """Take all rows on the current device; the command line says where to, and for how long."""
    folder = Folder(Path(sys.argv[1]))
    seconds = float(sys.argv[2])
    with torch.cuda.stream(torch.cuda.Stream()):  # not the default one, which no graph records
        take(wanted, seconds, shortest, time_row, why_not, lambda found: folder.write(name, found))
