"""Runs forward and backward on the emulated backend in a process of its own, and prints JSON.

The environment says on which build of the emulator (CBAM_CUDA_EMULATOR), in which schedule
(CBAM_CUDA_EMULATOR_SCHEDULE) and planned for which GPU (CBAM_CUDA_EMULATED_DEVICE).

    python tests/emulated_run.py steps [DTYPE]   {case: digest of all that comes out of a forward
                                                 and a backward}
    python tests/emulated_run.py others          the same of less common layouts, of a step by
                                                 parts, and of what follows an inference
    python tests/emulated_run.py bytes PROBLEMS  for each problem, {tensor: [read, written]}, and
                                                 the number of "launches"
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import torch
from cases import (
    CASES,
    LAYOUTS,
    NATIVE_LAYOUTS,
    Case,
    make_weights,
    make_x,
    operators,
    step_by_parts,
)
from emulator.build import asan_environment, build, library
from regimes import NOT_POSSIBLE, SPLITS

from cbam_cuda import ops
from cbam_cuda.plan import plan


@dataclass(frozen=True)
class Device:
    """What plans are made for: a GPU, or a slice of it."""

    name: str
    multiprocessors: int = 0  # 0: all

    def __str__(self) -> str:
        return f"{self.name} of {self.multiprocessors}" if self.multiprocessors else self.name


def run(kind: str, *arguments: str, schedule: str = "ascending", device: Device = Device("H100")):
    """What this program prints, on a build of the emulator that is up to date."""
    build(kind)
    environment = {
        **(asan_environment() if kind == "asan" else os.environ),
        "CBAM_CUDA_EMULATOR": str(library(kind)),
        "CBAM_CUDA_EMULATOR_SCHEDULE": schedule,
        "CBAM_CUDA_EMULATED_DEVICE": device.name,
        "CBAM_CUDA_EMULATED_MULTIPROCESSORS": str(device.multiprocessors),
    }
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout)


TWO_DTYPES = (torch.float32, torch.float16)  # all that the race build has
# Read in other ways than native ones: at an odd address, with gaps between samples.
OTHER_LAYOUTS = ("odd offset", "channels of more")


def digest_of(tensors) -> str:
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def by_strategies(function) -> list[tuple[torch.Tensor, ...]]:
    """What comes out by streaming, and where there is such a plan, by each resident one."""
    found = []
    for name in ("streaming", *SPLITS):
        os.environ["CBAM_CUDA_STRATEGY"] = name
        try:
            found.append(function())
        except ValueError as error:
            if NOT_POSSIBLE not in str(error):
                raise
    return found


def make_inputs(
    case: Case, dtype: torch.dtype, layout: str
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """(x, *weights), and the gradient of the output."""
    x, grad = (LAYOUTS[layout](make_x(case, dtype, seed=seed)) for seed in (0, 2))
    return (x, *make_weights(case, dtype)), grad


def digest_of_step(case: Case, dtype: torch.dtype, layout: str) -> str:
    """By every strategy."""
    backend = operators("emulated")
    given, grad = make_inputs(case, dtype, layout)
    forwards = by_strategies(functools.partial(backend.forward_train, *given))
    saved = forwards[0][1:]
    arguments = (grad, *saved[:2], *given, *saved, [True] * 7)
    backwards = by_strategies(functools.partial(backend.backward, *arguments))
    return digest_of(itertools.chain(*forwards, *backwards))


def steps(*dtypes: str) -> dict[str, str]:
    """Of every case in native layouts, in these dtypes or in both."""
    return {
        f"{case}, {dtype}, {layout}": digest_of_step(case, dtype, layout)
        for case in CASES
        for dtype in [getattr(torch, name) for name in dtypes] or TWO_DTYPES
        for layout in NATIVE_LAYOUTS
    }


def others() -> dict[str, str]:
    """In float32: what differs from a step in native layouts in how single threads work, and in
    nothing that they wait for.
    """
    found, backend = {}, operators("emulated")
    for case in CASES:
        for layout in OTHER_LAYOUTS:
            found[f"{case}, {layout}"] = digest_of_step(case, torch.float32, layout)
        for layout in NATIVE_LAYOUTS:
            given, grad = make_inputs(case, torch.float32, layout)
            parts = step_by_parts(backend, given[0], given[1:], grad)
            ended = by_strategies(functools.partial(backend.forward, *given, grad, True))
            found[f"{case}, {layout}, by parts and ended"] = digest_of((*parts, *ended))
    return found


LARGE = ("x", "dout", "residual", "out", "dx")  # tensors of x's size


def counting(shapes, dtype: str, runs) -> list[dict]:
    """What count_bytes takes, for every shape in both layouts; a run is a direction and a strategy.

    Left out are those that are not possible on an H100.
    """
    problems = [
        {
            "shape": tuple(shape),
            "hidden": shape[1] // 16,
            "dtype": dtype,
            "layout": layout,
            "direction": direction,
            "strategy": strategy,
        }
        for shape in shapes
        for layout in NATIVE_LAYOUTS
        for direction, strategy in runs
    ]
    return [problem for problem in problems if planned(problem)]


def planned(problem: dict) -> dict | None:
    """The plan of such a problem; None where there is none."""
    try:
        return plan(
            problem["shape"],
            problem["dtype"],
            channels_last=problem["layout"] == "channels_last",
            training=problem["direction"] == "training",
            residual=problem["direction"] == "with a residual",
            backward=problem["direction"] == "backward",
            strategy=problem["strategy"],
        )
    except ValueError as error:
        if NOT_POSSIBLE not in str(error):
            raise
        return None


def count_bytes(problems: list[dict]) -> list[dict[str, list[int]]]:
    """What kernels read and wrote of each tensor; only the race build counts."""
    library = ctypes.CDLL(os.environ["CBAM_CUDA_EMULATOR"])
    library.emulator_counts.restype = ctypes.c_char_p
    library.emulator_launches.restype = ctypes.c_ulonglong
    counts, run = [], operators("emulated")
    for problem in problems:
        case = Case("", tuple(problem["shape"]), problem["hidden"], (7, 7))
        dtype = getattr(torch, problem["dtype"])
        x = LAYOUTS[problem["layout"]](make_x(case, dtype))
        weights = make_weights(case, dtype)
        direction = problem["direction"]
        os.environ["CBAM_CUDA_STRATEGY"] = "streaming"
        saved = run.forward_train(x, *weights) if direction == "backward" else ()
        os.environ["CBAM_CUDA_STRATEGY"] = problem["strategy"]
        grad = LAYOUTS[problem["layout"]](make_x(case, dtype, seed=2))
        library.emulator_reset_counts()
        if direction == "backward":
            run.backward(grad, None, None, x, *weights, *saved[1:], [True] * 7)
        elif direction == "by parts":
            step_by_parts(run, x, weights, grad)
        elif direction == "with a residual":
            run.forward(x, *weights, grad, True)
        else:
            (run.forward_train if direction == "training" else run.forward)(x, *weights)
        lines = library.emulator_counts().decode().splitlines()
        rows = (line.rsplit(" ", 2) for line in lines if line)
        counts.append({name: [int(read), int(written)] for name, read, written in rows})
        counts[-1]["launches"] = library.emulator_launches()
    return counts


if __name__ == "__main__":
    ops.load_emulated()
    works = {
        "steps": lambda: steps(*sys.argv[2:]),
        "others": others,
        "bytes": lambda: count_bytes(json.loads(sys.argv[2])),
    }
    print(json.dumps(works[sys.argv[1]]()))
