"""compute-sanitizer: every tool over `benchmarks.gpu.small`, all at the same time."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import torch

from ..outcome import FAILED, PASSED, SKIPPED, Folder, Outcome
from .commands import Finished, find_tool, run_all, tail
from .small import FINISHED, WATCHED, problems

# In so many processes, which share the problems, and in which dtypes: racecheck takes many times as
# long as the others, and kernels of 16 and 32 bits differ in conversions and in a vector's length.
# It has a process for each problem, and comes last, as these wait for each other.
DTYPES = {"racecheck": ["float16"]}
RACECHECKS = len(list(problems([torch.float16])))
TOOLS = {"memcheck": 1, "initcheck": 1, "synccheck": 1, "racecheck": RACECHECKS}
OPTIONS = (
    "--target-processes",
    "all",
    "--launch-timeout=0",  # importing torch takes longer than the tools wait by default
    "--report-api-errors=no",  # torch asks for functions that a driver may lack
    "--print-limit=20",
)
CORES_A_TOOL = 1
# Each tensor an allocation of its own, so that what is beside it is out of bounds.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

_ERRORS = re.compile(r"^=+ ERROR SUMMARY: (\d+) errors?", re.MULTILINE)
_HAZARDS = re.compile(
    r"^=+ RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)",
    re.MULTILINE,
)
_WATCHED = re.compile(rf"^{WATCHED}(.*)", re.MULTILINE)
# What is reported starts right after the sign; what belongs to it is indented.
_REPORTS = re.compile(r"^=+ (?!COMPUTE-SANITIZER|(?:ERROR|RACECHECK) SUMMARY)(\S.*)", re.MULTILINE)


def step(seconds: float, folder: Folder) -> Outcome:
    """Run all tools."""
    program = find_tool("compute-sanitizer")
    if program is None:
        return Outcome(SKIPPED, "compute-sanitizer is not installed")
    commands = {name: [program, *arguments] for name, arguments in runs().items()}
    at_once = (os.cpu_count() or 1) // CORES_A_TOOL
    finished = run_all(commands, seconds, at_once, ENVIRONMENT)
    return judge({name: parse(done) for name, done in finished.items()})


def runs() -> dict[str, list[str]]:
    """The arguments of each process."""
    small = [*OPTIONS, sys.executable, "-m", f"{__package__}.small"]
    found = {}
    for tool, parts in TOOLS.items():
        for part in range(1, parts + 1):
            name = f"{tool} {part}/{parts}" if parts > 1 else tool
            found[name] = ["--tool", tool, *small, f"{part}/{parts}", *DTYPES.get(tool, [])]
    return found


def parse(done: Finished) -> dict[str, Any]:
    """What a tool said: state, errors, warnings, what is wrong, its first reports, what it saw."""
    errors = [int(count) for count in _ERRORS.findall(done.text)]
    hazards = [(int(e), int(w)) for e, w in _HAZARDS.findall(done.text)]
    found = sum(errors) + sum(e for e, _ in hazards)
    warnings = sum(w for _, w in hazards)
    wrong = _wrong(done, bool(errors or hazards), found)
    return {
        "state": FAILED if wrong else PASSED,
        "errors": found,
        "warnings": warnings,
        "wrong": wrong,
        "reports": list(dict.fromkeys(_REPORTS.findall(done.text)))[:20],
        "watched": _WATCHED.findall(done.text),
        "seconds": round(done.seconds, 1),
        "exit_code": done.code,
        "output": tail(done.text, 40) if wrong else [],
    }


def _wrong(done: Finished, summarized: bool, errors: int) -> str | None:
    if errors:
        return f"{errors} error{'s' if errors > 1 else ''}"
    if done.timed_out:
        return f"timeout after {done.seconds:.0f} s"
    if done.code:
        return f"crash, exit code {done.code}: {' | '.join(tail(done.text, 1))}"
    if not summarized:
        return "no summary was printed"
    return None if FINISHED in done.text else "the program did not reach its end"


def judge(tools: dict[str, dict[str, Any]]) -> Outcome:
    """All tools together."""
    problems = [
        ": ".join([name, result["wrong"], *result["reports"][:1]])
        for name, result in tools.items()
        if result["wrong"]
    ]
    parts = [f"{name} {_counts(result)}" for name, result in tools.items()]
    return Outcome(
        FAILED if problems else PASSED, ", ".join(parts), problems, details={"tools": tools}
    )


def _counts(result: dict[str, Any]) -> str:
    text = result["wrong"] or "clean"
    return f"{text} ({result['warnings']} warnings)" if result["warnings"] else text
