"""``python -m benchmarks.gpu``: whether all is well on the GPU of this machine, and how fast.

Runs the test suite, compute-sanitizer, checks that need a GPU, a count of the bytes that its memory
moves, what a call costs the host, timings of the block forward and backward, a ResNet-50 with it,
variants of the block, and a sweep over batches of both strategies; downloads nothing.
Writes a folder and ends with a table. Exit code: 0 where nothing failed, 1 where something did,
2 without a GPU to run on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import cbam_cuda

from ..outcome import Folder
from ..text import slugify
from . import facts, targets
from .architecture import NO_GPU, why_no_gpu
from .report import overview
from .steps import NAMES, STEPS, Deadline, exit_code, run_steps

RESULTS = Path(__file__).resolve().parents[1] / "results"
ACCEPTANCE = "acceptance"  # beside the files of `python -m benchmarks`, some of the same names


def parse_steps(text: str) -> tuple[str, ...]:
    """tests,checks as a tuple."""
    names = tuple(text.split(","))
    if unknown := set(names) - set(NAMES):
        raise argparse.ArgumentTypeError(
            f"expected some of {','.join(NAMES)}, got {','.join(sorted(unknown))!r}"
        )
    return names


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, metavar="FOLDER", help="default: <device>/acceptance of all results")
    add("--only", type=parse_steps, default=NAMES, metavar="STEP,STEP", help=f"of {NAMES}")
    add("--minutes", type=float, default=8.0, help="after which all has ended: %(default)s")
    add("--since", type=float, metavar="TIME", help="when these began, by `date +%%s`; else now")
    return parser.parse_args(arguments)


def why_not() -> str | None:
    """One line about why nothing can be run here."""
    if reason := why_no_gpu():
        return reason
    state = cbam_cuda.info()["backends"]["cuda"]
    return None if state.startswith("available") else f"benchmarks.gpu: backend cuda: {state}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps, print what they found."""
    options = parse(arguments)
    if reason := why_not():
        print(reason, file=sys.stderr)
        return NO_GPU
    deadline = Deadline(options.minutes, options.since)
    device = torch.cuda.get_device_name()
    folder = Folder(options.out or RESULTS / slugify(device) / ACCEPTANCE, facts.stamp())
    print(f"{device}; {deadline.left():.0f} s left; results: {folder.path}")
    steps = [step for step in STEPS if step.name in options.only]
    outcomes = run_steps(steps, folder, deadline, lambda line: print(line, flush=True))
    found = {name: folder.read(name) for name in options.only}
    if timed := (found.get("timings") or {}).get("rows"):
        print(f"\n{targets.table(timed)}")
    print(f"\n{overview(found)}\n")
    print(f"written: {folder.path}")
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
