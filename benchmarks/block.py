"""``python -m benchmarks.block``: the speed of one CBAM block, for shapes from real networks.

Prints two tables, forward and forward + backward, and writes them with the raw numbers to
``<output>/<device>.md`` and ``.json``; what is not the default is part of the name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import cbam_cuda

from . import report
from .contestants import LAYOUTS, Contestants, Shape
from .report import DIRECTIONS, Row, shape_name, slugify
from .timing import environment, time_together

SHAPES: tuple[Shape, ...] = (
    (1, 64, 56, 56),
    (1, 256, 56, 56),
    (4, 96, 40, 40),
    (8, 256, 56, 56),
    (8, 512, 28, 28),
    (8, 1024, 14, 14),
    (8, 2048, 7, 7),
)
# Small, large, and the hardest. Few, as nearly all the time goes to torch.compile.
QUICK_SHAPES: tuple[Shape, ...] = ((1, 64, 56, 56), (8, 256, 56, 56), (8, 2048, 7, 7))
SECONDS, QUICK_SECONDS = 1.0, 0.4
DTYPES = ("float32", "float64", "float16", "bfloat16")
RESULTS = Path(__file__).parent / "results"


def pick_device() -> torch.device:
    """CUDA where both torch and the fused block have it, else the CPU."""
    usable = cbam_cuda.info()["backends"]["cuda"] == "available"
    return torch.device("cuda" if usable else "cpu")


def measure(
    shapes: Sequence[Shape],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seconds: float = SECONDS,
    with_compile: bool = True,
) -> list[Row]:
    """Time all contestants for each shape, each so many seconds in each direction."""
    rows = []
    with tqdm(total=3 * len(shapes), unit="stage", leave=False) as progress:
        for shape in shapes:
            progress.set_description(f"{shape_name(shape)} compile")
            contestants = Contestants(shape, dtype, layout, device, with_compile)
            progress.update()
            timings = {}
            for direction, title in DIRECTIONS.items():
                progress.set_description(f"{shape_name(shape)} {title}")
                fns = contestants.forward if direction == "forward" else contestants.step
                timings[direction] = time_together(fns, device, seconds)
                progress.update()
            rows.append(Row(shape, **timings, no_compile=contestants.no_compile))
    return rows


def parse_shape(text: str) -> Shape:
    """8x256x56x56 as a tuple."""
    try:
        n, c, h, w = (int(size) for size in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NxCxHxW, got {text!r}") from None
    return n, c, h, w


def result_name(device: str, options: argparse.Namespace) -> str:
    """The name of the result files: the device, and every option that is not the default."""
    words = [device]
    words += [options.dtype] if options.dtype != DTYPES[0] else []
    words += [options.layout] if options.layout != "contiguous" else []
    words += [f"threads {options.threads}"] if options.threads else []
    words += ["quick"] if options.quick else []
    return slugify(" ".join(words))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.block", description=__doc__)
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default=DTYPES[0])
    add("--layout", choices=tuple(LAYOUTS), default="contiguous")
    add("--shapes", type=parse_shape, nargs="+", metavar="NxCxHxW", help="instead of the usual")
    add("--threads", type=int, help="of the CPU; torch's own choice by default")
    add("--quick", action="store_true", help="few shapes, little time for each")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--output", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, print, write."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = pick_device(), getattr(torch, options.dtype)
    facts = {**environment(device), "dtype": options.dtype, "layout": options.layout}
    rows = measure(
        options.shapes or (QUICK_SHAPES if options.quick else SHAPES),
        device,
        dtype=dtype,
        layout=options.layout,
        seconds=QUICK_SECONDS if options.quick else SECONDS,
        with_compile=not options.no_compile,
    )
    stem = options.output / result_name(facts["device"], options)
    report.write(rows, facts, dtype.itemsize, stem)
    print(report.render(rows, facts, dtype.itemsize))
    print(f"written: {stem}.md and .json")
    return rows


if __name__ == "__main__":
    main()
