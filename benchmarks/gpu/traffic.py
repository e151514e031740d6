"""Bytes that the device's memory moved, counted by ncu, beside those that plans predict."""

from __future__ import annotations

import csv
import json
import re
import sys
from typing import Any

from ..outcome import FAILED, PASSED, SKIPPED, Folder, Outcome
from .commands import Finished, find_tool, run, tail
from .counted import COUNTED, FINISHED

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
DURATION = "gpu__time_duration.sum"  # nanoseconds, of which a call's kernels take each its part
OPTIONS = (
    "--csv",
    "--print-units=base",
    f"--metrics={READ},{WRITTEN},{DURATION}",  # of one pass: no kernel is replayed
    "--profile-from-start=off",
    "--clock-control=none",
    "--cache-control=none",  # a call finds in the cache what its kernels leave there
    "--target-processes=all",
)
_REFUSED = re.compile(r"^==ERROR== (ERR_NVGPUCTRPERM.*)", re.MULTILINE)
_CALLS = re.compile(rf"^{COUNTED}(.*)", re.MULTILINE)


def step(seconds: float, folder: Folder) -> Outcome:
    """Count."""
    tool = find_tool("ncu")
    if tool is None:
        return Outcome(SKIPPED, "ncu is not installed")
    command = [tool, *OPTIONS, sys.executable, "-m", f"{__package__}.counted"]
    return judge(run(command, seconds))


def judge(done: Finished) -> Outcome:
    """From all that was printed."""
    if FINISHED not in done.text:
        # Counters are for administrators unless these open them to all.
        if refused := _REFUSED.search(done.text):
            return Outcome(SKIPPED, f"ncu: {refused[1]}")
        how = "timeout" if done.timed_out else f"exit code {done.code}"
        return Outcome(FAILED, f"{how}: {' | '.join(tail(done.text, 1))}", details=_output(done))
    counted = kernels(done.text)
    if not counted and (refused := _REFUSED.search(done.text)):
        return Outcome(SKIPPED, f"ncu: {refused[1]}")
    calls = [json.loads(line) for line in _CALLS.findall(done.text)]
    planned = sum(call["kernels"] for call in calls)
    if len(counted) != planned:
        summary = f"{len(counted)} kernels, {planned} planned"
        return Outcome(FAILED, summary, details={"kernels": counted, **_output(done)})
    rows = [_row(call, counted) for call in calls]
    ratios = [row["of_planned"] for row in rows]
    summary = f"{len(rows)} calls, {min(ratios):.2f} to {max(ratios):.2f} of what is planned"
    return Outcome(PASSED, summary, details={"rows": rows})


def _output(done: Finished) -> dict[str, Any]:
    return {"output": tail(done.text, 40)}


def kernels(text: str) -> list[dict[str, Any]]:
    """Name and bytes of each kernel, in the order of their launches."""
    table = text.partition('"ID",')
    found: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader((table[1] + table[2]).splitlines()):
        if line["Metric Value"] is None:  # what ncu says after the table
            continue
        kernel = found.setdefault(line["ID"], {"name": line["Kernel Name"]})
        kernel[line["Metric Name"]] = int(float(line["Metric Value"].replace(",", "")))
    return list(found.values())


def _row(call: dict[str, Any], counted: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a call, whose kernels are taken from the front."""
    own = [counted.pop(0) for _ in range(call["kernels"])]
    read, written = (sum(kernel[metric] for kernel in own) for metric in (READ, WRITTEN))
    ratio = (read + written) / call["planned_bytes"]
    return {**call, "kernels": own, "read": read, "written": written, "of_planned": ratio}
