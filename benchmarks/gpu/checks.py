"""Checks that only a GPU can make; each runs in a process of its own.

``python -m benchmarks.gpu.checks NAME`` makes one and prints what came of it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch

from ..contestants import first_line
from ..outcome import FAILED, PASSED, SKIPPED, Folder, Outcome, SkippedError
from . import capture, launches, placement, values
from .commands import Finished, run_all, tail
from .strategies import STRATEGIES, forced

# Those that take longest first.
_OF_EACH_STRATEGY = {
    "shapes of networks against float64": values.network_shapes,
    "their gradients against float64": values.network_gradients,
    "sequences and volumes against float64": values.sequences_and_volumes,
    "more than 2^31 elements": values.more_than_31_bits,
    "100 runs, equal to the bit": values.repeated,
    "forward in a CUDA graph": capture.forward,
    "forward with attention in a CUDA graph": capture.forward_with_attention,
    "forward and backward in a CUDA graph": capture.training,
    "another stream": placement.another_stream,
    "another device": placement.another_device,
}
# In processes apart, streaming first: where the other hangs or crashes, this one is still judged.
CHECKS = {
    f"{name}, {strategy}": forced(strategy)(check)
    for strategy in STRATEGIES
    for name, check in _OF_EACH_STRATEGY.items()
} | {"kernels that each strategy launches": launches.as_planned}
AT_ONCE = 6  # they share the memory of the device
_PREFIX = "check: "


def step(seconds: float, folder: Folder) -> Outcome:
    """Make all checks."""
    commands = {name: [sys.executable, "-m", __name__, name] for name in CHECKS}
    at_once = min(AT_ONCE, os.cpu_count() or 1)
    finished = run_all(commands, seconds, at_once)
    return judge({name: parse(done) for name, done in finished.items()})


def make(name: str) -> dict[str, Any]:
    """Make one check, here and now."""
    torch.backends.cudnn.allow_tf32 = False  # else the reference would forgive too much
    begin = time.monotonic()
    try:
        state, reason = PASSED, CHECKS[name]()
    except SkippedError as why:
        state, reason = SKIPPED, str(why)
    except Exception as error:  # of any kind: the check has failed
        state, reason = FAILED, first_line(error)
    return {"state": state, "reason": reason, "seconds": round(time.monotonic() - begin, 1)}


def parse(done: Finished) -> dict[str, Any]:
    """What a check printed; one that printed nothing has failed."""
    for line in reversed(done.text.splitlines()):
        if line.startswith(_PREFIX):
            found: dict[str, Any] = json.loads(line.removeprefix(_PREFIX))
            return found
    how = "timeout" if done.timed_out else f"crash, exit code {done.code}"
    last = " | ".join(tail(done.text, 1))
    reason = f"{how}: {last}" if last else how
    return {"state": FAILED, "reason": reason, "seconds": round(done.seconds, 1)}


def judge(results: dict[str, dict[str, Any]]) -> Outcome:
    """All checks together."""
    states = [result["state"] for result in results.values()]
    problems = [f"{n}: {r['reason']}" for n, r in results.items() if r["state"] == FAILED]
    summary = ", ".join(f"{states.count(state)} {state}" for state in (PASSED, FAILED, SKIPPED))
    return Outcome(FAILED if problems else PASSED, summary, problems, details={"checks": results})


if __name__ == "__main__":
    print(f"{_PREFIX}{json.dumps(make(sys.argv[1]))}", flush=True)
