"""``python -m benchmarks``: the fused block against everything a user would pick instead.

Times one block over shapes, dtypes and layouts, its scaling over threads (CPU), and a ResNet-50
with it; on CUDA where there is a GPU, else on the CPU. Writes `<output>/<device>/`: raw numbers as
JSON, a report as Markdown, and pictures. Rows are taken in the order of how much they are wanted
until the time is over; the report lists what was left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

import cbam_cuda

from . import block, network, plots, report, rows
from .contestants import COMPILED_ON_CUDA, PLAIN
from .gpu import timings
from .gpu.problems import too_large
from .outcome import REPORT, Folder
from .problems import SMALL, Problem, in_stages, problems
from .progress import Say, shown
from .rows import Row
from .stamp import environment, stamp
from .text import slugify

SECONDS, QUICK_SECONDS = 330.0, 38.0
EACH, QUICK_EACH = 0.35, 0.12  # seconds of a contestant in a row
NETWORK_SHARE, THREADS_SHARE = 0.11, 0.07  # of all seconds
SHORTEST = 3.0  # seconds left with which a row is begun
# Large, the hardest, small; then how far other dtypes and layouts are from these.
QUICK = (
    *map(Problem, ((8, 256, 56, 56), (8, 2048, 7, 7), SMALL)),
    Problem((8, 256, 56, 56), torch.bfloat16),
    Problem((8, 256, 56, 56), layout="channels_last"),
)
RESULTS = Path(__file__).parent / "results"
COMPILE = ("few", "none", "all")


def pick_device() -> torch.device:
    """CUDA where both torch and the fused block have it, else the CPU."""
    usable = cbam_cuda.info()["backends"]["cuda"] == "available"
    return torch.device("cuda" if usable else "cpu")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, help=f"after which no more is begun; default: {SECONDS:.0f}")
    add(
        "--quick", action="store_true", help="in less than a minute: few rows, little time for each"
    )
    add("--threads", type=int, help="of the CPU; torch's own choice by default")
    add("--compile", choices=COMPILE, default=COMPILE[0], help="rows with torch.compile, slow ones")
    add("--only", choices=report.FILES, nargs="+", default=report.FILES, help="default: all")
    add("--output", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    found = parser.parse_args(arguments)
    found.seconds = found.seconds or (QUICK_SECONDS if found.quick else SECONDS)
    return found


def with_compile(problem: Problem, options: argparse.Namespace) -> bool:
    """Whether torch.compile takes part: usually in the stages of a ResNet-50, quick in one."""
    if options.compile == "few":
        return problem in (in_stages(8)[:1] if options.quick else in_stages(8))
    return bool(options.compile == "all")


def wanted(options: argparse.Namespace) -> Iterator[Problem]:
    """Problems of the block, the most wanted first."""
    return iter(QUICK) if options.quick else problems()


class Bench:
    """One run, into a folder."""

    def __init__(self, options: argparse.Namespace, device: torch.device, say: Say) -> None:
        self.options, self.device, self.say = options, device, say
        self.end = time.monotonic() + options.seconds
        facts = environment(device)
        name = f"{facts['device']} threads {facts['threads']}" if device.type == "cpu" else ""
        self.folder = Folder(
            options.output / slugify(name or facts["device"]), {"environment": {**facts, **stamp()}}
        )

    def run(self) -> None:
        """Take everything; each file is there as soon as it has rows."""
        work = {"block": self.block, "threads": self.threads, "network": self.network}
        for name in report.FILES:
            if name in self.options.only:
                self.folder.forget(name)
                work[name]()
        self.write_report()

    def block(self) -> None:
        """One block over all problems."""
        reserved = sum(
            share
            for name, share in (("network", NETWORK_SHARE), ("threads", THREADS_SHARE))
            if name in self.options.only and not self.options.quick
        )
        each = QUICK_EACH if self.options.quick else EACH

        def time_row(problem: Problem, left: float) -> list[Row]:
            compiled = with_compile(problem, self.options)
            if self.device.type == "cpu":
                return block.time_row(problem, each, compiled)
            rivals = [*PLAIN, *(COMPILED_ON_CUDA if compiled else ())]
            return timings.time_row_and_memory(problem, rivals)

        why_not = block.too_large if self.device.type == "cpu" else too_large
        self._take("block", list(wanted(self.options)), reserved, time_row, why_not)

    def threads(self) -> None:
        """The stages of a ResNet-50 over numbers of threads."""
        if self.device.type == "cuda" or self.options.quick or torch.get_num_threads() == 1:
            return
        self._take(
            "threads",
            in_stages(8),
            NETWORK_SHARE,
            lambda problem, left: list(block.time_threads(problem, EACH)),
            block.too_large,
        )

    def network(self) -> None:
        """A whole network."""
        if not self.options.quick:
            self._take(
                "network",
                network.settings(),
                0.0,
                lambda setting, left: network.time_setting(setting, self.device),
                lambda setting: None,
            )

    def _take(
        self,
        name: str,
        things: Sequence[rows.Wanted],
        reserved: float,
        time_row: Callable[[rows.Wanted, float], list[Row]],
        why_not: Callable[[rows.Wanted], str | None],
    ) -> None:
        """Rows of one file; so large a part of all seconds is for those after it."""

        def and_say(thing: rows.Wanted, left: float) -> list[Row]:
            self.say(f"{name}: {thing}", [])
            found = time_row(thing, left)
            self.say(f"{name}: {thing}", found)
            return found

        seconds = self.end - time.monotonic() - reserved * self.options.seconds
        rows.take(
            things,
            seconds,
            SHORTEST,
            and_say,
            why_not,
            lambda found: self.folder.write(name, found),
        )

    def write_report(self) -> None:
        """From the files there are, also those of earlier runs."""
        found = report.read(self.folder)
        for name in plots.PICTURES:
            file = found[plots.FILES.get(name, "block")] or {"rows": []}
            if taken := [row for row in file["rows"] if "error" not in row]:
                plots.draw(name, taken, self.folder.path / f"{name}.svg")
        self.folder.write_report(report.render(found))


def stream_of(device: torch.device) -> AbstractContextManager[object]:
    """Where work is done: on CUDA not on the default stream, which no graph records."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure, write, and print the report; returns the folder."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device()
    with shown(options.seconds) as say, stream_of(device):
        bench = Bench(options, device, say)
        bench.run()
    print(f"\n{(bench.folder.path / REPORT).read_text()}\nwritten: {bench.folder.path}")
    return bench.folder.path


if __name__ == "__main__":
    main(sys.argv[1:])
