"""``python -m benchmarks``: the fused block against everything a user would pick instead.

Times one block over shapes, dtypes and layouts, its scaling over threads (CPU), and a ResNet-50
with it; on CUDA where there is a GPU, else on the CPU. Writes `<output>/<device>/`: raw numbers as
JSON, a report as Markdown, and pictures. Rows are taken in the order of how much they are wanted
until the time is over; the report lists what was left out. Exit code 1 where a row failed, be it
that the fused block was wrong.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

import cbam_cuda

from . import block, network, plots, report, rows
from .contestants import COMPILED_ON_CUDA, PLAIN
from .gpu import facts, timings
from .gpu.problems import too_large
from .outcome import REPORT, Folder
from .problems import SMALL, Problem, in_stages, problems
from .progress import Say, shown
from .rows import Costs, Row
from .stamp import environment, stamp
from .text import slugify

SECONDS, QUICK_SECONDS = 330.0, 38.0
EACH, QUICK_EACH = 0.3, 0.12  # seconds of a contestant in a row
SHARES = {"block": 0.0, "threads": 0.06, "network": 0.13}  # of all seconds, kept for a file
COMPILE_SHARE = 0.4  # of all seconds, for rows on CUDA that torch.compile takes part in
SHORTEST = 3.0  # seconds left with which a row is begun
# Elements of x below which its size does not count: what takes time is to launch, to record graphs.
ALIKE_ON_CUDA = 1 << 27
LATE = 150.0  # seconds after the time is over, at which a program that still runs is hung
# The hardest, small, other dtypes and layouts; and then, as it may take most of the time, large
# with torch.compile.
QUICK = (
    *map(Problem, ((8, 2048, 7, 7), SMALL)),
    Problem((8, 256, 56, 56), torch.bfloat16),
    Problem((8, 256, 56, 56), layout="channels_last"),
    Problem((8, 256, 56, 56)),
)
RESULTS = Path(__file__).parent / "results"
COMPILE = ("few", "none", "all")
DEVICES = ("auto", "cpu", "cuda")


def pick_device(name: str) -> torch.device:
    """What "auto" is: CUDA where torch has it, else the CPU.

    Raises:
        SystemExit: the fused block has no kernels for it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if (state := cbam_cuda.info()["backends"][name]) != "available":
        raise SystemExit(f"no fused block on {name}: {state}; --device names another")
    return torch.device(name)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, help=f"after which no more is begun; default: {SECONDS:.0f}")
    add(
        "--quick", action="store_true", help="in less than a minute: few rows, little time for each"
    )
    add("--device", choices=DEVICES, default=DEVICES[0], help="CUDA where there is, by default")
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
        first, *_, last = in_stages(1)  # of single samples two stand for all: each takes 15 seconds
        return problem in (in_stages(8)[:1] if options.quick else [*in_stages(8), first, last])
    return bool(options.compile == "all")


def wanted(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    """Problems of the block, the most wanted first."""
    return iter(QUICK) if options.quick else problems(device.type == "cuda")


class Bench:
    """One run, into a folder."""

    def __init__(self, options: argparse.Namespace, device: torch.device, say: Say) -> None:
        self.options, self.device, self.say = options, device, say
        self.end = time.monotonic() + options.seconds
        on_cuda = device.type == "cuda"
        # float32 for all: else rivals are rounded to less, and the truth forgives as much.
        torch.backends.cudnn.allow_tf32 = False
        found = facts.collect() if on_cuda else {**environment(device), **stamp()}
        # Processors of one name differ in what they have.
        kind = [] if on_cuda else [found["cpu_target"], f"threads {found['threads']}"]
        words = [found["device"], *kind]
        words += ["quick"] if options.quick else []  # beside a full run, not in its place
        path = options.output / slugify(" ".join(words))
        self.folder = Folder(path, {"environment": found})
        self.compiling = 0.0  # seconds of rows with torch.compile

    @property
    def files(self) -> list[str]:
        """What this run takes."""
        left_out = {"threads", "network"} if self.options.quick else set()
        if self.device.type == "cuda" or torch.get_num_threads() == 1:
            left_out.add("threads")
        return [f for f in report.FILES if f in self.options.only and f not in left_out]

    def run(self) -> None:
        """Take everything; each file is there as soon as it has rows."""
        if not self.files:
            raise SystemExit(f"expected something that this run takes, got {self.options.only}")
        take = {"block": self.block, "threads": self.threads, "network": self.network}
        try:
            for name in self.files:
                self.folder.forget(name)
                take[name]()
        finally:  # a device that is lost must not take the rows before with it
            self.write_report()

    def block(self) -> None:
        """One block over all problems."""
        why_not = block.too_large if self.device.type == "cpu" else too_large
        self._take(
            "block", list(wanted(self.options, self.device)), self._time_block, why_not, self._kind
        )

    def _time_block(self, problem: Problem) -> list[Row]:
        compiled = with_compile(problem, self.options)
        if self.device.type == "cpu":
            return block.time_row(problem, QUICK_EACH if self.options.quick else EACH, compiled)
        left = COMPILE_SHARE * self.options.seconds - self.compiling
        compiled = compiled and left > 0
        begin = time.monotonic()
        rivals = [*PLAIN, *(COMPILED_ON_CUDA if compiled else ())]
        try:
            return timings.time_row_and_memory(problem, rivals, left)
        finally:
            self.compiling += compiled * (time.monotonic() - begin)

    def _kind(self, problem: Problem) -> tuple[object, float]:
        alike = ALIKE_ON_CUDA if self.device.type == "cuda" else 1
        return with_compile(problem, self.options), max(problem.elements, alike)

    def threads(self) -> None:
        """The stages of a ResNet-50 over numbers of threads."""

        def time_row(problem: Problem) -> list[Row]:
            return list(block.time_threads(problem, EACH))

        self._take("threads", in_stages(8), time_row, block.too_large, lambda p: ("", p.elements))

    def network(self) -> None:
        """A whole network."""
        self._take(
            "network",
            network.settings(),
            lambda setting: network.time_setting(setting, self.device),
            lambda setting: None,
            lambda setting: (setting.mode, 1.0),
        )

    def _take(
        self,
        name: str,
        things: Sequence[rows.Wanted],
        time_row: Callable[[rows.Wanted], list[Row]],
        why_not: Callable[[rows.Wanted], str | None],
        kind: Callable[[rows.Wanted], tuple[object, float]],
    ) -> None:
        """Rows of one file; a part of all seconds is kept for those after it."""
        begin, costs = time.monotonic(), Costs()
        later = self.files[self.files.index(name) + 1 :]
        end = self.end - self.options.seconds * sum(SHARES[file] for file in later)

        def too_long(thing: rows.Wanted) -> str | None:
            late = time.monotonic() + costs.expected(*kind(thing)) > end
            return "no time left" if late else why_not(thing)

        def and_say(thing: rows.Wanted, left: float) -> list[Row]:
            self.say(f"{name}: {thing}", [])
            began = time.monotonic()
            found = time_row(thing)
            costs.add(*kind(thing), time.monotonic() - began)
            self.say(f"{name}: {thing}", found)
            return found

        def keep(found: Row) -> None:
            self.folder.write(name, {"seconds": round(time.monotonic() - begin, 1), **found})

        rows.take(things, end - begin, SHORTEST, and_say, too_long, keep)

    def write_report(self) -> None:
        """From the files there are, also those of earlier runs."""
        found = report.read(self.folder)
        if not any(found.values()):
            return
        self.folder.write_report(report.render(found))
        for name in plots.PICTURES:
            file = found[plots.FILES.get(name, "block")] or {"rows": []}
            if taken := [row for row in file["rows"] if "error" not in row]:
                plots.draw(name, taken, self.folder.path / f"{name}.svg")


def stream_of(device: torch.device) -> AbstractContextManager[object]:
    """Where work is done: on CUDA not on the default stream, which no graph records."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def main(arguments: Sequence[str] | None = None) -> Bench:
    """Measure, write, and print the report."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    with ended_when_hung(options.seconds + LATE), shown(options.seconds) as say, stream_of(device):
        bench = Bench(options, device, say)
        bench.run()
    print(f"\n{(bench.folder.path / REPORT).read_text()}\nwritten: {bench.folder.path}")
    return bench


@contextmanager
def ended_when_hung(seconds: float) -> Iterator[None]:
    """End the program after so many seconds, whatever it waits for, and say where that was.

    A kernel that waits for ever has the device's clock wait for it, where no exception gets.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def failures(folder: Folder, files: Sequence[str]) -> list[str]:
    """A line for each row of these files that failed."""
    found = report.read(folder)
    return [line for name in files for line in report.failed(found[name] or {"rows": []})]


def run(arguments: Sequence[str]) -> int:
    """The program."""
    bench = main(arguments)
    wrong = failures(bench.folder, bench.files)
    for line in wrong:
        print(f"FAILED: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
