"""``python -m benchmarks.gpu.counted``: forwards and backwards whose memory traffic is counted.

Of each block of a ResNet-50, at a batch so large that what the L2 cache keeps to itself is little
beside it. Prints a line a call, in the order of the calls: what the plan says of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cbam_cuda.plan import plan

from ..problems import BLOCKS, Problem, draw
from .inputs import draw_weights
from .launches import calls, planned_kernels
from .strategies import STRATEGIES, forced, is_impossible

COUNTED = "counted: "  # begins the line of a call
FINISHED = "counted, all of them"
# 411 MB each: as many elements in fewer pixels.
PROBLEMS = tuple(
    Problem((n, *block), torch.float16)
    for n, block in zip((256, 512, 1024, 2048), BLOCKS, strict=True)
)


def run(problems: Sequence[Problem] = PROBLEMS, device: str = "cuda") -> Iterator[dict[str, Any]]:
    """Make all calls that have a plan; what is planned of each."""
    for problem in problems:
        x, grad = (draw(*problem, device, seed) for seed in (0, 1))
        weights = draw_weights(x.shape[1], problem.dtype, device)
        for direction, call in calls(x, weights, grad).items():
            for strategy in STRATEGIES:
                with forced(strategy):
                    counted = _count(call)
                if counted:
                    yield _planned(problem, direction, strategy)


def _count(call: Callable[[], object]) -> bool:
    """Make it once between start and stop of the profiler; false where it has no plan."""
    try:
        call()  # what is only done once
    except (RuntimeError, ValueError) as error:
        if is_impossible(error):
            return False
        raise
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return True


def _planned(problem: Problem, direction: str, strategy: str) -> dict[str, Any]:
    dtype = str(problem.dtype).removeprefix("torch.")
    backward = direction == "backward"
    found = plan(problem.shape, dtype, "cuda:0", strategy=strategy, backward=backward)
    return {
        "name": str(problem),
        "direction": direction,
        "strategy": strategy,
        "kernels": planned_kernels(found, problem.shape[0]),
        "planned_bytes": found["device_memory_bytes"],
    }


if __name__ == "__main__":
    for line in run():
        print(f"{COUNTED}{json.dumps(line)}")
    print(FINISHED)
