"""Breaks the CUDA kernels one line at a time, and counts how often the emulator notices.

    python tests/mutate.py [--only SUBSTRING] [--sample N --seed S] [--jobs J] [--list]

A mutant is a kernel without one of its barriers, or with one bounds check that lets one index more
through. It is compiled for the emulator's race build, from a copy of csrc; what does not include
the broken file keeps its object. A mutant is killed where a short run over both layouts, two dtypes
and every way to read x reports a finding, crashes, does not end, or gives other bits or other
numbers of bytes than the kernels as they are. Those that survive must stand in REDUNDANT, with the
reason why they change nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import filecmp
import hashlib
import multiprocessing
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import LAYOUTS, Case, make_weights, make_x, operators
from emulator.build import BACKEND, CSRC, OUTPUT, NinjaFile, build, library

FOLDERS = ("cuda/kernels", "cuda/primitives")
# Where a limit that is known to the compiler guards no memory.
CONSTANT_LIMITS = ("for ", "if constexpr ", "static_assert")
BARRIERS = ("__syncthreads", "__syncwarp", "__threadfence")

# Mutants that change nothing that anybody could see, by Mutant.key, and why.
LAST_CHUNK = "one more chunk, of nothing, where chunks end with the work: loops in it are empty"
REDUNDANT = {
    "channel_gate.cu: for (int first = 0; first < p.channels; first += kChannelChunk) { -> "
    "for (int first = 0; first <= p.channels; first += kChannelChunk) {": LAST_CHUNK,
    "channel_gate.cu: for (int first = 0; first < p.hidden_units; first += kUnitChunk) { -> "
    "for (int first = 0; first <= p.hidden_units; first += kUnitChunk) {": LAST_CHUNK,
    "channel_gate_backward.cu: for (int first = 0; first < p.channels; first += kChannelChunk) { "
    "-> for (int first = 0; first <= p.channels; first += kChannelChunk) {": LAST_CHUNK,
    "channel_gate_backward.cu: for (int first = 0; first < p.hidden_units; first += kUnitChunk) { "
    "-> for (int first = 0; first <= p.hidden_units; first += kUnitChunk) {": LAST_CHUNK,
    "cross_sums.cu: for (int done = 0; done < block.rows; done += g.chunk) { -> "
    "for (int done = 0; done <= block.rows; done += g.chunk) {": LAST_CHUNK,
    "map_terms.cu: for (int done = 0; done < block.rows; done += g.chunk) { -> "
    "for (int done = 0; done <= block.rows; done += g.chunk) {": LAST_CHUNK,
    "reduce_rows.cu: for (int done = 0; done < rows; done += kRowsAtOnce) { -> "
    "for (int done = 0; done <= rows; done += kRowsAtOnce) {": (
        "one more round in which no row is inside: nothing is read or written"
    ),
    "reduce_rows.cu: const int head = to_boundary < count ? to_boundary : count; -> "
    "const int head = to_boundary <= count ? to_boundary : count;": (
        "the smaller of two: equals are the same"
    ),
    "weight_gradients.cu: for (int first_k = 0; first_k < p.a.count; first_k += kDepth) { -> "
    "for (int first_k = 0; first_k <= p.a.count; first_k += kDepth) {": (
        "one more chunk, of zeros, where chunks end with the vectors"
    ),
    "tile_sums.cuh: active = first < step; -> active = first <= step;": (
        "the threads past the last whole row sum rows that are staged, and nobody reads their sum"
    ),
}


@dataclass(frozen=True)
class Mutant:
    path: str  # below csrc
    kind: str  # "barrier" or "bound"
    line: int
    key: str  # the same after a change elsewhere in the file
    text: str  # of the whole file

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.key.partition(': ')[2]}"


def sources() -> list[Path]:
    """The files that are broken."""
    return [
        path
        for folder in FOLDERS
        for path in sorted((CSRC / folder).iterdir())
        if path.suffix in (".cu", ".cuh")
    ]


def operand(code: str, start: int) -> str:
    """What stands right of a comparison, up to the next operator that binds less."""
    depth = 0
    for at in range(start, len(code)):
        depth += (code[at] in "([{") - (code[at] in ")]}")
        if depth < 0 or (not depth and re.match(r"[;,?:]|&&|\|\|", code[at : at + 2])):
            return code[start:at]
    return code[start:]


def inside(word: str, code: str, at: int) -> bool:
    """Whether `at` is inside the parentheses behind the last of these words."""
    start, depth = code.rfind(word, 0, at), 0
    for character in code[max(start, 0) + len(word) : at]:
        depth += (character == "(") - (character == ")")
        if not depth:
            return False
    return start >= 0


def weakened(code: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and replacement of every comparison with a limit of the problem."""
    for found in re.finditer(r" (<|<=|>=)\s", code):
        start, end, sign = found.start(1), found.end(1), found[1]
        limit = operand(code, end)
        names = re.findall(r"[A-Za-z_]\w*", limit)
        constant = all(re.match(r"k[A-Z]", name) for name in names)
        if sign == ">=":
            zero = limit.strip() == "0"
            yield (start, end + len(limit.rstrip()), ">= -1") if zero else (start, end, ">")
        elif not (constant and any(inside(word, code, start) for word in CONSTANT_LIMITS)):
            yield start, end, "<=" if sign == "<" else "<= 1 +"


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All of one file."""
    text, name = path.read_text(), path.relative_to(CSRC).as_posix()
    code = re.sub(r"//[^\n]*", lambda comment: " " * len(comment[0]), text)

    def line_at(whole: str, at: int) -> str:
        return " ".join(whole[whole.rfind("\n", 0, at) + 1 :].partition("\n")[0].split())

    def mutant(kind: str, start: int, what: str, changed: str) -> Mutant:
        return Mutant(name, kind, text.count("\n", 0, start) + 1, f"{path.name}: {what}", changed)

    calls = re.finditer(rf"({'|'.join(BARRIERS)})\([^;]*\);", code)
    for number, found in enumerate(calls, 1):
        start, before = found.start(), code[: found.start()].rstrip()
        what = f"barrier {number}, {found[1]} after {line_at(before, len(before))}"
        yield mutant("barrier", start, what, text[:start] + text[found.end() :])
    for start, end, new in weakened(code):
        changed = text[:start] + new + text[end:]
        what = f"{line_at(text, start)} -> {line_at(changed, start)}"
        yield mutant("bound", start, what, changed)


def all_mutants() -> list[Mutant]:
    return [mutant for path in sources() for mutant in mutants_of(path)]


# What is run: together the cases reach every branch of every kernel. float64 and bfloat16 take the
# branches of float32 and float16, and are left out of the copy.
SHORT = (torch.float32, torch.float16)
BOTH = ("contiguous", "channels_last")
RUNS = (
    (Case("small", (2, 16, 5, 6), 4, (3, 3)), SHORT, (*BOTH, "odd offset")),
    (Case("7x7", (3, 64, 7, 7), 4, (7, 7)), SHORT, BOTH),
    (Case("three walks over the weights", (17, 36, 6, 6), 34, (3, 3)), SHORT[:1], BOTH),
    (Case("many channels and units", (2, 530, 3, 3), 33, (3, 3)), SHORT, BOTH),
    (Case("kernel larger than the image", (2, 8, 4, 3), 2, (11, 11)), SHORT[:1], BOTH),
    (Case("several boxes, tiles and chunks", (2, 72, 40, 40), 3, (5, 5)), SHORT[:1], BOTH),
    (Case("several chunks of pixels", (1, 200, 12, 12), 3, (3, 3)), SHORT[:1], BOTH[1:]),
    (Case("odd rows", (1, 24, 33, 31), 3, (5, 3)), SHORT[:1], (*BOTH, "channels of more")),
    (Case("a block for a pixel", (1, 4100, 2, 5), 1, (3, 3)), SHORT[:1], BOTH[1:]),
    (Case("sequence", (1, 4, 20000), 2, (9,)), SHORT[:1], (*BOTH, "odd offset")),
    (Case("volume", (2, 10, 4, 6, 9), 2, (3, 3, 3)), SHORT[:1], BOTH),
    (Case("boxes along the depth", (1, 3, 400, 2, 3), 1, (5, 1, 3)), SHORT[:1], BOTH),
)
SCHEDULES = ("ascending", "descending")


@dataclass(frozen=True)
class Run:
    name: str
    tensors: tuple[torch.Tensor, torch.Tensor]  # x and the gradient of the output
    weights: tuple[torch.Tensor, ...]

    def digest(self, emulator: ctypes.CDLL) -> str:
        """Of all that comes out of forward and backward, and of the bytes that were moved."""
        backend, (x, grad) = operators("emulated"), self.tensors
        emulator.emulator_reset_counts()
        saved = backend.forward_train(x, *self.weights)
        grads = backend.backward(grad, *saved[1:3], x, *self.weights, *saved[1:], [True] * 7)
        digest = hashlib.sha256(emulator.emulator_counts())
        for t in (*saved, *grads):
            digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def make_runs() -> list[Run]:
    return [
        Run(
            f"{case}, {str(dtype).removeprefix('torch.')}, {layout}",
            (LAYOUTS[layout](make_x(case, dtype)), LAYOUTS[layout](make_x(case, dtype, seed=2))),
            make_weights(case, dtype),
        )
        for case, dtypes, layouts in RUNS
        for dtype in dtypes
        for layout in layouts
    ]


def load(path: Path) -> ctypes.CDLL:
    torch.ops.load_library(str(path))
    emulator = ctypes.CDLL(str(path))
    emulator.emulator_counts.restype = ctypes.c_char_p
    return emulator


def first_difference(path: Path, runs: list[Run], expected: list[str]) -> str:
    """The first run that notices, under one schedule or the other; empty where none does."""
    emulator = load(path)
    for schedule in SCHEDULES:
        emulator.emulator_set_schedule(schedule.encode())
        for run, digest in zip(runs, expected, strict=True):
            try:
                if run.digest(emulator) == digest:
                    continue
                what = "other bits or bytes"
            except RuntimeError as error:
                lines = str(error).splitlines()
                what = next((s.strip() for s in lines if s.startswith("  block")), lines[0])
            return f"{run.name}, {schedule}: {what}"
    return ""


def unbroken(path: Path, runs: list[Run]) -> list[str]:
    """The digests to expect."""
    emulator = load(path)
    found = []
    for schedule in SCHEDULES:
        emulator.emulator_set_schedule(schedule.encode())
        found.append([run.digest(emulator) for run in runs])
    if found[0] != found[1]:
        raise RuntimeError("the kernels as they are depend on the schedule")
    return found[0]


class EndedBadly(Exception):
    """A process crashed or had to be stopped."""


def in_child(limit: float, function: Callable, *arguments: object) -> object:
    """What the function returns or raises in a process of its own."""
    # A fork has torch and all inputs already; each library is loaded by one child alone.
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def child() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            send.send(function(*arguments))
        except Exception as error:
            send.send(error)

    process = context.Process(target=child)
    process.start()
    send.close()
    try:
        if not receive.poll(limit):
            raise EndedBadly(f"did not end within {limit:.0f} s")
        returned = receive.recv()
    except EOFError:
        process.join()
        raise EndedBadly(f"crashed, exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(returned, Exception):
        raise returned
    return returned


class Tree:
    """A copy of csrc, and of the objects of the race build, to be broken and put right again."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.folder, self.jobs = folder, jobs
        self.csrc, self.objects = folder / "csrc", folder / "objects"
        shutil.copytree(CSRC, self.csrc)
        built = build("race", jobs=jobs)
        shutil.copytree(OUTPUT / "race", self.objects)
        for path in CSRC.rglob("*"):
            copy = self.csrc / path.relative_to(CSRC)
            if path.is_file() and not (copy.exists() and filecmp.cmp(path, copy, shallow=False)):
                raise SystemExit(f"{path} changed while it was built; run this again")
        ninja = [NinjaFile("race").setup.ninja_path(), "-f", f"{built}.ninja"]
        listed = subprocess.run(
            [*ninja, "-t", "commands", str(library("race"))],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        moved = listed.replace(str(CSRC), str(self.csrc)).replace(
            str(OUTPUT / "race"), str(self.objects)
        )
        *compilations, self.link = moved.splitlines()
        self.compile: dict[str, str] = {}
        for command in compilations:
            if found := re.search(rf"-x c\+\+ {re.escape(str(self.csrc))}/(\S+\.cu) ", command):
                self.compile[found[1]] = command
        # Fewer instantiations: a mutant compiles in half the time.
        dispatch = self.csrc / "cuda/dispatch.cuh"
        text = re.sub(r"\n *case DType::k(Float64|BFloat16):.*", "", dispatch.read_text())
        dispatch.write_text(
            text.replace("switch (dtype) {", "switch (dtype) {\n    default: return;")
        )

    def included(self, path: str) -> set[str]:
        """What a file includes, itself among it."""
        found, open_ = set(), [self.csrc / path]
        while open_:
            file = open_.pop()
            if file in found:
                continue
            found.add(file)
            for name in re.findall(r'#include "([^"]+)"', file.read_text()):
                inner = (file.parent / name).resolve()
                if inner.is_file():
                    open_.append(inner)
        return {file.relative_to(self.csrc).as_posix() for file in found}

    def dependents(self, path: str) -> list[str]:
        """The sources to compile again."""
        return [source for source in self.compile if path in self.included(source)]

    def make(self, changed: list[str], name: str) -> Path:
        """Compile these sources and link them with the rest."""
        link, output = self.link, self.folder / f"{name}.so"
        commands = []
        for source in changed:
            kept, fresh = self.object(source), self.folder / name / f"{source}.o"
            fresh.parent.mkdir(parents=True, exist_ok=True)
            commands.append(self.compile[source].replace(str(kept), str(fresh)))
            link = link.replace(str(kept), str(fresh))
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(execute, commands))
        execute(link.replace(str(self.objects / BACKEND), str(output)))
        return output

    def object(self, source: str) -> Path:
        return self.objects / f"csrc/{source}.o"

    def broken(self, mutant: Mutant, name: str) -> Path:
        """The library with one mutant."""
        path = self.csrc / mutant.path
        before = path.read_text()
        path.write_text(mutant.text)
        try:
            return self.make(self.dependents(mutant.path), name)
        finally:
            path.write_text(before)

    def clean(self, name: str) -> None:
        (self.folder / f"{name}.so").unlink(missing_ok=True)
        shutil.rmtree(self.folder / name, ignore_errors=True)


def execute(command: str) -> None:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a mutant must compile: {command}\n{done.stderr}")


def chosen(arguments: argparse.Namespace) -> list[Mutant]:
    only = arguments.only or [""]
    found = [m for m in all_mutants() if any(part in f"{m.kind} {m}" for part in only)]
    if arguments.sample is not None and arguments.sample < len(found):
        found = sorted(
            random.Random(arguments.seed).sample(found, arguments.sample),
            key=lambda m: (m.path, m.line),
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Breaks the kernels and looks who notices.")
    parser.add_argument(
        "--only",
        action="append",
        metavar="SUBSTRING",
        help='mutants with this in "KIND PATH:LINE: CHANGE"; may be given several times',
    )
    parser.add_argument("--sample", type=int, help="so many of them, drawn by chance")
    parser.add_argument("--seed", type=int, default=0, help="of that chance")
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    parser.add_argument("--jobs", type=int, default=jobs, help="compilers at a time")
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    arguments = parser.parse_args()
    mutants = chosen(arguments)
    if arguments.list:
        for mutant in mutants:
            print(mutant.kind, mutant)
        print(dict(Counter(mutant.kind for mutant in mutants)))
        return 0

    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        survivors = score(mutants, Tree(Path(folder).resolve(), arguments.jobs))
    return 1 if survivors else 0


def score(mutants: list[Mutant], tree: Tree) -> list[Mutant]:
    """Print what becomes of each; those that survive without a reason."""
    torch.set_num_threads(1)  # threads do not outlive a fork
    runs, started = make_runs(), time.perf_counter()
    expected = in_child(600, unbroken, tree.objects / BACKEND, runs)
    limit = 20 + 5 * (time.perf_counter() - started)
    killed, unexplained = 0, []
    for number, mutant in enumerate(mutants):
        started, name = time.perf_counter(), f"mutant{number}"
        broken = tree.broken(mutant, name)
        try:
            noticed = in_child(limit, first_difference, broken, runs, expected)
        except EndedBadly as error:
            noticed = str(error)
        tree.clean(name)
        if noticed:
            killed += 1
        elif mutant.key not in REDUNDANT:
            unexplained.append(mutant)
        said = noticed or f"SURVIVED: {REDUNDANT.get(mutant.key, 'nobody knows why')}"
        seconds = time.perf_counter() - started
        print(f"{seconds:4.1f} s  {mutant.kind} {mutant}\n        {said}", flush=True)
    redundant = len(mutants) - killed - len(unexplained)
    print(f"score: {killed}/{len(mutants)}, {redundant} redundant")
    for mutant in unexplained:
        print(f"survived: {mutant.key}")
    return unexplained


if __name__ == "__main__":
    sys.exit(main())
