"""Runs forward and backward on the emulated backend in a process of its own, and prints JSON.

The environment says on which build of the emulator (CBAM_CUDA_EMULATOR), in which schedule
(CBAM_CUDA_EMULATOR_SCHEDULE) and planned for which GPU (CBAM_CUDA_EMULATED_DEVICE).

    python tests/emulated_run.py digests           {case: digest of all that comes out}
    python tests/emulated_run.py bytes PROBLEMS    for each problem, {tensor: [read, written]}
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys

import torch
from cases import CASES, DTYPES, LAYOUTS, Case, make_weights, make_x, operators

from cbam_cuda import ops

# Every way in which a kernel reads x: aligned, at an odd address, with gaps between samples.
LAYOUTS_RUN = ("contiguous", "channels_last", "odd offset", "channels of more")


def digests() -> dict[str, str]:
    """Of every case in every dtype, and for float32 in every layout."""
    found, run = {}, operators("emulated")
    for case in CASES:
        for dtype in DTYPES:
            for layout in LAYOUTS_RUN if dtype == torch.float32 else LAYOUTS_RUN[:2]:
                x = LAYOUTS[layout](make_x(case, dtype))
                weights = make_weights(case, dtype)
                saved = run.forward_train(x, *weights)
                grad = LAYOUTS[layout](make_x(case, dtype, seed=2))
                grads = run.backward(grad, *saved[1:3], x, *weights, *saved[1:], [True] * 7)
                digest = hashlib.sha256()
                for t in (*saved, *grads):
                    digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
                found[f"{case}, {dtype}, {layout}"] = digest.hexdigest()
    return found


def count_bytes(problems: list[dict]) -> list[dict[str, list[int]]]:
    """What kernels read and wrote of each tensor; only the race build counts."""
    library = ctypes.CDLL(os.environ["CBAM_CUDA_EMULATOR"])
    library.emulator_counts.restype = ctypes.c_char_p
    counts, run = [], operators("emulated")
    for problem in problems:
        case = Case("", tuple(problem["shape"]), problem["hidden"], (7, 7))
        dtype = getattr(torch, problem["dtype"])
        x = LAYOUTS[problem["layout"]](make_x(case, dtype))
        weights = make_weights(case, dtype)
        direction = problem["direction"]
        saved = run.forward_train(x, *weights) if direction == "backward" else ()
        library.emulator_reset_counts()
        if direction == "backward":
            grad = LAYOUTS[problem["layout"]](make_x(case, dtype, seed=2))
            run.backward(grad, None, None, x, *weights, *saved[1:], [True] * 7)
        else:
            (run.forward_train if direction == "training" else run.forward)(x, *weights)
        lines = library.emulator_counts().decode().splitlines()
        rows = (line.rsplit(" ", 2) for line in lines if line)
        counts.append({name: [int(read), int(written)] for name, read, written in rows})
    return counts


if __name__ == "__main__":
    ops.load_emulated()
    result = digests() if sys.argv[1] == "digests" else count_bytes(json.loads(sys.argv[2]))
    print(json.dumps(result))
