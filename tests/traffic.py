"""Counts the bytes that the CUDA kernels move, on the emulator, and prints them as a table.

    python tests/traffic.py [--batch N] [--dtype float32]

Bytes are given in readings or writings of all of x, as the race build counts them access by access;
on a GPU what the caches hold does not come from memory.
"""

from __future__ import annotations

import argparse
import itertools
import json

import torch
from emulated_run import LARGE, counting, planned, run

SHAPES = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
RUNS = tuple(itertools.product(("inference", "training", "backward"), ("streaming", "resident")))
HEADER = ("shape", "layout", "run", "strategy", "launches", "x, dout", "out, dx", "MLP", "all else")


def row(problem: dict, counts: dict) -> tuple[str, ...]:
    element = getattr(torch, problem["dtype"]).itemsize
    x_bytes = torch.Size(problem["shape"]).numel() * element
    launches = counts.pop("launches")
    read = sum(counts[name][0] for name in LARGE if name in counts)
    written = sum(counts[name][1] for name in LARGE if name in counts)
    mlp = counts["mlp_weights"][0]
    small = sum(sum(c) for name, c in counts.items() if name not in (*LARGE, "mlp_weights"))
    shares = (f"{count / x_bytes:.3f}" for count in (read, written, mlp, small))
    shape = "x".join(map(str, problem["shape"]))
    words = (problem[name] for name in ("layout", "direction", "strategy"))
    large, *others = shares
    if planned(problem)["passes"].get("resident", {}).get("x") == "is read twice":
        large += ", 1 from L2"
    return (shape, *words, str(launches), large, *others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    given = parser.parse_args()
    listed = counting([(given.batch, *shape) for shape in SHAPES], given.dtype, RUNS)
    counted = run("race", "bytes", json.dumps(listed))
    rows = [HEADER, ("---",) * len(HEADER)]
    rows += [row(*pair) for pair in zip(listed, counted, strict=True)]
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
