"""Rows of timings, taken one by one in a process of their own until the time is over."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cbam_cuda.plan import plan

from .. import rows
from ..contestants import first_line
from ..outcome import FAILED, PASSED, Folder, Outcome
from ..problems import Problem
from ..rows import Row, Wanted
from .commands import run, tail
from .strategies import OTHER_SPLIT, STRATEGIES, contestant

LEFT_FOR_THE_END = 15.0
ALONE = ("forward", "backward")  # directions that are timed under each strategy


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
    taken, skipped = found["rows"], found["skipped"]
    problems = [f"{row['name']}: {row['error']}" for row in taken if "error" in row]
    details = {"rows": taken, "skipped": skipped, "ended": found["ended"]}
    if not found["ended"]:
        problems.append(f"{how}: {' | '.join(tail(text, 1))}")
        details["output"] = tail(text, 40)
    summary = f"{len(taken)} rows"
    if skipped:
        reasons = dict.fromkeys(skip["reason"] for skip in skipped)
        summary += f", {len(skipped)} skipped ({'; '.join(reasons)})"
    return Outcome(FAILED if problems else PASSED, summary, problems, details)


def describe(
    problem: Problem,
    direction: str,
    found: dict[str, dict[str, Any]],
    count: int,
    missing: dict[str, str],
) -> Row:
    """What is kept of a row, and what the plans say of it."""
    ours = [name for name in ("fused", *map(contestant, STRATEGIES)) if name in found]
    row = rows.describe(problem, direction, found, missing, ours)
    row["buffers"] = count
    if direction in ALONE:
        times = {name: found[name][row["method"]]["median"] for name in ours}
        row["faster"] = min(times, key=times.__getitem__).removeprefix("cuda ")
        try:
            row |= _predicted(row, problem)
        except (RuntimeError, ValueError) as error:  # the timing is worth keeping
            missing["plan"] = first_line(error)
    return row


def planned(problem: Problem, direction: str, strategy: str = "auto") -> dict[str, Any]:
    """The plan for the current device; raises where there is none of the strategy."""
    return plan(
        problem.shape,
        str(problem.dtype).removeprefix("torch."),
        "cuda:0",
        channels_last=problem.layout == "channels_last",
        backward=direction == "backward",
        strategy=strategy,
    )


def _predicted(row: Row, problem: Problem) -> Row:
    """What "auto" picks, what the plan of each strategy says, and the speeds that follow."""
    auto = planned(problem, row["direction"])
    plans = {}
    for strategy in (*STRATEGIES, *OTHER_SPLIT.values()):
        time = rows.median(row, contestant(strategy))
        if time is None:
            continue
        found = planned(problem, row["direction"], strategy)
        plans[contestant(strategy)] = {
            "passes": found["passes"],
            "traffic_bytes": found["traffic"],
            "device_memory_bytes": found["device_memory_bytes"],
            "predicted_seconds": found["predicted_seconds"],
            "gigabytes_per_second": found["device_memory_bytes"] / time / 1e3,
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
        rows.take(
            wanted, seconds, shortest, time_row, why_not, lambda found: folder.write(name, found)
        )
