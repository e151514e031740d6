"""What is run, in which order, and with how much time."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..outcome import FAILED, SKIPPED, Folder, Outcome
from . import (
    checks,
    facts,
    host,
    network,
    sanitizers,
    suite,
    sweep,
    timings,
    traffic,
    variants,
)
from .report import one_line, render


class Step(NamedTuple):
    """One step: `work` is given seconds and the folder, and keeps to the former."""

    name: str
    seconds: float  # at most
    work: Callable[[float, Folder], Outcome]
    share: float = 1.0  # at most this part of all that is left; the rest is for those after it
    least: float = 5.0  # seconds with which it is still begun


# What is over of a step's time goes to the measurements at the end, which the shares keep some for,
# however long the build before has taken.
STEPS = (
    Step("environment", 10, facts.step),
    Step("tests", 120, suite.step, share=0.27),
    Step("sanitizers", 120, sanitizers.step, share=0.33),
    Step("checks", 80, checks.step, share=0.33),
    Step("traffic", 50, traffic.step, share=0.2, least=25),
    Step("host", 25, host.step, share=0.15, least=18),
    Step("timings", 200, timings.step, share=0.475),
    Step("network", 45, network.step, share=0.545),
    Step("variants", 40, variants.step, share=0.3, least=22),
    Step("sweep", 120, sweep.step),
)
NAMES = tuple(step.name for step in STEPS)


class Deadline:
    """So many minutes from now, or from when the command began that this is a part of."""

    def __init__(self, minutes: float, since: float | None = None) -> None:
        gone = 0.0 if since is None else time.time() - since
        self.end = time.monotonic() + 60 * minutes - gone

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def run_steps(
    steps: Sequence[Step], folder: Folder, deadline: Deadline, say: Callable[[str], None] = print
) -> dict[str, Outcome]:
    """Run each step, whatever became of those before; files are written as steps end."""
    outcomes = {}
    for step in steps:
        folder.forget(step.name)
    for number, step in enumerate(steps, 1):
        seconds = min(step.seconds, step.share * deadline.left())
        say(f"[{number}/{len(steps)}] {step.name}, at most {max(seconds, 0):.0f} s")
        begin = time.monotonic()
        outcome = outcomes[step.name] = _run(step, seconds, folder)
        took = time.monotonic() - begin
        folder.write(step.name, {**outcome.as_json(), "seconds": round(took, 1)})
        folder.write_report(render({name: folder.read(name) for name in NAMES}))
        say(f"      {outcome.state}: {outcome.summary} ({took:.0f} s)")
        for problem in outcome.problems[:10]:
            say(f"      - {one_line(problem)}")
    return outcomes


def _run(step: Step, seconds: float, folder: Folder) -> Outcome:
    if seconds < step.least:
        return Outcome(SKIPPED, f"no time left: needs {step.least:.0f} s")
    try:
        return step.work(seconds, folder)
    except Exception as error:  # later steps still run
        where = traceback.format_exc().splitlines()
        return Outcome(FAILED, f"{type(error).__name__}: {error}", details={"traceback": where})


def exit_code(outcomes: dict[str, Outcome]) -> int:
    """0 where nothing failed."""
    return int(any(outcome.state == FAILED for outcome in outcomes.values()))
