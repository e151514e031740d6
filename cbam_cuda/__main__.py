"""``python -m cbam_cuda``: what this installation can do; with ``plan``, how a GPU runs a shape."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .info import info
from .plan import plan, render


def print_info() -> None:
    """Print what this installation can do."""
    facts = info()
    print(f"cbam_cuda {facts['version']}, torch {facts['torch']}")
    print("backends")
    for name, state in facts["backends"].items():
        print(f"  {name:10} {state}")
    print("build")
    if facts["build"] is None:
        print("  the compiled module did not load")
        return
    for key, value in facts["build"].items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"  {key:20} {shown if shown not in ('', None) else '-'}")


def _sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cbam_cuda", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("plan", help="how the CUDA backend would run a shape")
    command.add_argument("--shape", type=_sizes, required=True, help="of x: N,C,sizes of space")
    command.add_argument("--dtype", default="float32", help="default: %(default)s")
    command.add_argument(
        "--device", default="H100", help="a GPU of the table, or cuda:INDEX; default: %(default)s"
    )
    command.add_argument("--hidden", type=int, help="hidden channels; default: C // 16")
    command.add_argument("--kernel-size", type=_sizes, default=[7], help="default: 7")
    command.add_argument("--channels-last", action="store_true")
    command.add_argument("--backward", action="store_true", help="plan the backward")
    command.add_argument("--training", action="store_true", help="keep what backward needs")
    command.add_argument("--residual", action="store_true", help="add one to out")
    command.add_argument(
        "--strategy",
        default=os.environ.get("CBAM_CUDA_STRATEGY") or "auto",
        help="auto, streaming or resident; default: what CBAM_CUDA_STRATEGY says, else auto",
    )
    command.add_argument(
        "--multiprocessors", type=int, default=0, help="of the device; default: all"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = _parser().parse_args(arguments)
    if given.command is None:
        print_info()
        return 0
    kernel = given.kernel_size
    try:
        found = plan(
            given.shape,
            given.dtype,
            given.device,
            hidden=given.hidden,
            kernel_size=kernel[0] if len(kernel) == 1 else kernel,
            channels_last=given.channels_last,
            training=given.training,
            residual=given.residual,
            backward=given.backward,
            strategy=given.strategy,
            multiprocessors=given.multiprocessors,
        )
    except (RuntimeError, ValueError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    print(render(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
