"""What a call costs the host, on the GPU: how long calls take to return while the device works.

Where a network is faster than its host, this is what a block takes. ``python -m benchmarks.gpu.host
FOLDER SECONDS`` takes the rows and writes the file as it goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from .. import calls
from ..calls import Buffers, Call
from ..contestants import first_line, make_block
from ..outcome import Folder, Outcome
from ..problems import Problem, draw
from ..rows import Row
from ..timing import as_found
from . import rows
from .calls import fused_backward
from .strategies import STRATEGIES, forced, is_impossible

PROBLEM = Problem((1, 256, 56, 56), torch.float16)
ROW_SECONDS = 1.0  # with less left, a row is not begun
CALLS = 8  # in a row: with fewer launches than a stream keeps, so that none waits for the device
SAMPLES = 25
WARM_UPS = 5
AUTO = "auto"


def step(seconds: float, folder: Folder) -> Outcome:
    """Take them in another process."""
    return rows.step("host", seconds, folder)


def works(device: torch.device) -> dict[str, Call]:
    """By name: PyTorch's own, the fused block from the inside out, and plain PyTorch."""
    x, grad = (draw(*PROBLEM, device, seed) for seed in (0, 1))
    fused, eager = (
        make_block(name, x.shape[1], PROBLEM.dtype, device) for name in ("fused", "eager")
    )
    weights, buffers = fused.weights(), Buffers([x], [grad])
    operators = torch.ops.cbam_cuda
    found: dict[str, Call] = {
        "torch.mul": lambda i: torch.mul(x, 2.0),
        "operator forward": lambda i: operators.forward(x, *weights),
        "operator forward_train": lambda i: operators.forward_train(x, *weights),
        "operator backward": fused_backward(fused, buffers),
        "forward": calls.forward(fused, buffers),
    }
    found = {name: torch.no_grad()(call) for name, call in found.items()}
    steps = {"forward + backward": fused, "eager forward + backward": eager}
    return found | {name: calls.step(block, buffers) for name, block in steps.items()}


def time_host(call: Call, synchronize: Callable[[], object]) -> list[float]:
    """Microseconds a call, samples of some calls in a row that begin with an idle device."""
    samples = []
    for number in range(WARM_UPS + SAMPLES):
        synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call(0)
        if number >= WARM_UPS:
            samples.append(1e6 * (time.perf_counter() - begin) / CALLS)
    return samples


def take(strategy: str, left: float) -> list[Row]:
    """One row: all works under a strategy."""
    return [time_row(strategy, works(torch.device("cuda")), torch.cuda.synchronize)]


def time_row(strategy: str, named: Mapping[str, Call], synchronize: Callable[[], object]) -> Row:
    """Of these works, those that the strategy can do."""
    row: Row = {"name": strategy, "problem": str(PROBLEM), "method": "launched"}
    row |= {"contestants": {}, "missing": {}}
    for name, call in named.items():
        try:
            with forced(strategy):
                samples = time_host(call, synchronize)
        except (RuntimeError, ValueError) as error:
            if not is_impossible(error):
                raise
            row["missing"][name] = first_line(error)
        else:
            row["contestants"][name] = {"launched": as_found(samples)}
    return row


if __name__ == "__main__":
    rows.main("host", [AUTO, *STRATEGIES], ROW_SECONDS, take, lambda strategy: None)
