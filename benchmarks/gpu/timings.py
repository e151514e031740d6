"""Timings of the blocks of a ResNet-50, row by row until the time is over.

``python -m benchmarks.gpu.timings FOLDER SECONDS`` takes them and writes the file as it goes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cbam_cuda.plan import plan

from ..contestants import first_line
from .commands import run, tail
from .inputs import BLOCKS
from .measure import Clock, measure
from .problems import Contestants, Problem, buffers, memory_needed
from .results import FAILED, PASSED, Folder, Outcome

BATCHES = (32, 1, 8, 256)
COMPILED_BATCH = 32
ROW_SECONDS = 6.0  # with less left, a row is not begun
COMPILE_SECONDS = 80.0  # for all rows together
FREE = 0.85  # the part of free memory that a row may take
LEFT_FOR_THE_END = 15.0

Row = dict[str, Any]


def problems() -> Iterator[Problem]:
    """All rows, the most wanted first."""
    kinds = [(n, dtype, "contiguous") for dtype in (torch.float16, torch.float32) for n in BATCHES]
    kinds.append((32, torch.bfloat16, "contiguous"))
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        kinds.append((32, dtype, "channels_last"))
    for n, dtype, layout in kinds:
        for block in BLOCKS:
            yield Problem((n, *block), dtype, layout)


def step(seconds: float, folder: Folder) -> Outcome:
    """Take them in another process; what it wrote is there even if it crashed."""
    limit = max(seconds - LEFT_FOR_THE_END, 1)
    command = [sys.executable, "-m", __name__, str(folder.path.resolve()), f"{limit:.0f}"]
    done = run(command, seconds)
    found = folder.read("timings") or {"rows": [], "skipped": [], "ended": False}
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
    wanted: Sequence[Problem],
    seconds: float,
    time_row: Callable[[Problem, bool], list[Row]],
    why_not: Callable[[Problem], str | None],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Time row after row; `keep` is given all there is after each."""
    end = time.monotonic() + seconds
    compiling = 0.0
    found: dict[str, Any] = {"rows": [], "skipped": [], "ended": False}
    for problem in wanted:
        left = end - time.monotonic()
        reason = "no time left" if left < ROW_SECONDS else why_not(problem)
        if reason:
            found["skipped"].append({"name": str(problem), "reason": reason})
            continue
        with_compile = problem.shape[0] == COMPILED_BATCH and compiling < COMPILE_SECONDS < left
        begin = time.monotonic()
        try:
            found["rows"] += time_row(problem, with_compile)
        except Exception as error:  # out of memory, a failed launch: the next row may do
            found["rows"].append({"name": str(problem), "error": first_line(error)})
        if with_compile:
            compiling += time.monotonic() - begin
        keep(found)
    keep({**found, "ended": True})


def time_row(problem: Problem, with_compile: bool) -> list[Row]:
    """A row a direction."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    count = buffers(problem, l2_bytes)
    contestants = Contestants(problem, count, with_compile)
    clock = Clock(l2_bytes)
    rows = []
    for direction, calls in contestants.calls.items():
        found = measure(calls, count, clock, direction == "step")
        rows.append(describe(problem, direction, found, count, contestants.missing))
    return rows


def describe(
    problem: Problem,
    direction: str,
    found: dict[str, dict[str, Any]],
    count: int,
    missing: dict[str, str],
) -> Row:
    """What is kept of a row. Speeds are those in a graph where there is one."""
    row: Row = {
        "name": str(problem),
        "direction": direction,
        "shape": list(problem.shape),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "layout": problem.layout,
        "buffers": count,
        "contestants": found,
        "missing": missing,
    }
    method = "graph" if all("graph" in found[name] for name in ("copy", "fused")) else "launched"
    fused, copy = (found[name][method]["median"] for name in ("fused", "copy"))
    row |= {"method": method, "fraction_of_copy": copy / fused}
    if direction == "forward":
        row["copy_gigabytes_per_second"] = 2 * problem.bytes / copy / 1e3
        try:
            row |= _predicted(problem, fused)
        except (RuntimeError, ValueError) as error:  # the timing is worth keeping
            missing["plan"] = first_line(error)
    return row


def _predicted(problem: Problem, microseconds: float) -> Row:
    """What the plan says, and the speed that follows."""
    dtype, last = str(problem.dtype).removeprefix("torch."), problem.layout == "channels_last"
    found = plan(problem.shape, dtype, "cuda:0", channels_last=last)
    moved = found["device_memory_bytes"]
    return {
        "traffic_bytes": found["traffic"],
        "device_memory_bytes": moved,
        "predicted_us": found["seconds"] * 1e6,
        "gigabytes_per_second": moved / microseconds / 1e3,
    }


def _too_large(problem: Problem) -> str | None:
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    needed = memory_needed(problem, buffers(problem, l2_bytes))
    torch.cuda.empty_cache()  # what the row before left
    free, _ = torch.cuda.mem_get_info()
    return "does not fit into memory" if needed > FREE * free else None


def main() -> None:
    """Take all rows on the current device."""
    folder = Folder(Path(sys.argv[1]))
    take(
        list(problems()),
        float(sys.argv[2]),
        time_row,
        _too_large,
        lambda found: folder.write("timings", found),
    )


if __name__ == "__main__":
    main()
