"""Breaks the CUDA kernels one line at a time, and counts how often the emulator notices.

    python tests/mutate.py [--only SUBSTRING] [--sample M --seed S] [--shard I/N]
                           [--runs SUBSTRING] [--jobs J] [--list]

A mutant is a kernel without one of its barriers or waits, or with one bounds check that lets one
index more through, or one clamp that does not hold (mutation/find.py). It is compiled for the
emulator's race build, from a copy of csrc; what does not include the broken file keeps its object
(mutation/tree.py). A mutant is killed where a short run over both layouts, two dtypes and every way
to read x reports a finding, crashes, does not end, or gives other bits or other numbers of bytes
than the kernels as they are (mutation/run.py).
Those that survive must stand in REDUNDANT, with the reason why they change nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from emulator.build import BACKEND
from mutation.find import Mutant, all_mutants
from mutation.run import EndedBadly, first_difference, in_child, make_runs, unbroken
from mutation.tree import Tree

# Mutants that change nothing that anybody could see, by Mutant.key, and why.
NO_CHUNK = "a chunk of no rows is neither loaded nor walked"
HINT = "the prefetch of a line is a hint, and may point anywhere"
GUARDED = "what it would do more is guarded inside"
WAITS_LONGER = "it waits for every row before the first, and sums in the same order"
LAST_CHUNK = "one more chunk, of nothing, where chunks end with the work: loops in it are empty"
NO_ROW = "one more round in which no row is inside: nothing is read or written"
LEFT_OVER = "threads that are left over sum what nobody adds"
BEYOND = "a vector has no such element, and rows end with their columns"
REDUNDANT = {
    "channel_gate.cu: for (int first = 0; first < p.channels; first += Shared::kChunk) { -> "
    "for (int first = 0; first <= p.channels; first += Shared::kChunk) {": LAST_CHUNK,
    "channel_gate.cu: for (int first = 0; first < p.hidden_units; first += kUnitChunk) { -> "
    "for (int first = 0; first <= p.hidden_units; first += kUnitChunk) {": LAST_CHUNK,
    "channel_gate.cu: for (int i = threadIdx.x; i < p.hidden_units * kSamples; i += kThreads) -> "
    "for (int i = threadIdx.x; i <= p.hidden_units * kSamples; i += kThreads)": (
        "one more sum, in its place and read by nobody"
    ),
    "channel_gate_backward.cu: for (int first = 0; first < p.channels; first += Shared::kChunk) { "
    "-> for (int first = 0; first <= p.channels; first += Shared::kChunk) {": LAST_CHUNK,
    "channel_gate_backward.cu: for (int first = 0; first < p.hidden_units; first += kUnitChunk) { "
    "-> for (int first = 0; first <= p.hidden_units; first += kUnitChunk) {": LAST_CHUNK,
    "channel_gate_backward.cu: for (int channel = threadIdx.x; channel < p.channels; channel += "
    "kBlock) { -> for (int channel = threadIdx.x; channel <= p.channels; channel += kBlock) {": (
        GUARDED
    ),
    "reduce_rows.cu: for (int done = 0; done < rows; done += rows_at_once) { -> "
    "for (int done = 0; done <= rows; done += rows_at_once) {": NO_ROW,
    "reduce_packed_rows.cu: for (int done = 0; done < rows; done += rows_at_once) { -> "
    "for (int done = 0; done <= rows; done += rows_at_once) {": NO_ROW,
    "blocks.cuh: const bool exists = pz >= 0 && pz < s.depth && py >= 0 && py < s.height && "
    "px >= 0 && -> "
    "const bool exists = pz >= -1 && pz < s.depth && py >= 0 && py < s.height && px >= 0 &&": (
        "pixels in front of the first plane have negative numbers, which says outside as well"
    ),
    "blocks.cuh: px < s.width && bx < box.width + halo_x; -> "
    "px < s.width && bx <= box.width + halo_x;": (
        "rows are padded inside an image only where boxes are 1 or 2 pixels wide, and what is "
        "staged there reaches gates that are not written"
    ),
    "reduce_rows.cu: if (g.lanes <= 32) -> if (g.lanes <= 1 + 32)": "lanes are powers of two",
    "resident_backward.cuh: for (int number = 0; number < g.chunks; ++number) { -> "
    "for (int number = 0; number <= g.chunks; ++number) {": NO_CHUNK,
    "resident_backward.cuh: for (int n = 0; n < max(loads.slots, g.samples * g.chunks); ++n) { -> "
    "for (int n = 0; n <= max(loads.slots, g.samples * g.chunks); ++n) {": GUARDED,
    "resident_forward.cuh: for (int number = 0; number < g.chunks; ++number) load(0, sample, "
    "number); -> for (int number = 0; number <= g.chunks; ++number) load(0, sample, number);": (
        NO_CHUNK
    ),
    "resident_output.cuh: else if (block.cols() >= kCount - 1) -> "
    "else if (block.cols() > kCount - 1)": "the walk for any rows writes the same, only slower",
    "resident_output.cuh: for (int number = 0; number < g.chunks; ++number) { -> "
    "for (int number = 0; number <= g.chunks; ++number) {": NO_CHUNK,
    "resident_mlp.cuh: for (int i = threadIdx.x; i < lines * p.hidden; i += blockDim.x) { -> "
    "for (int i = threadIdx.x; i <= lines * p.hidden; i += blockDim.x) {": HINT,
    "resident_mlp.cuh: if (i < end) prefetch(fc2 + int64_t{i} * kLineBytes); -> "
    "if (i <= end) prefetch(fc2 + int64_t{i} * kLineBytes);": HINT,
    "resident_mlp.cuh: for (int first = 0; first < columns; first += along) { -> "
    "for (int first = 0; first <= columns; first += along) {": GUARDED,
    "resident_mlp.cuh: const int parts = min(threads / along, rows); -> "
    "const int parts = (threads / along);": ("parts without rows are zero"),
    "resident_sums.cuh: if (group < g.groups) gather(i, group, sum); -> "
    "if (group <= g.groups) gather(i, group, sum);": LEFT_OVER,
    "resident_mlp.cuh: const bool works = side < count && part < parts; -> "
    "const bool works = side < count && part <= parts;": LEFT_OVER,
    "resident_channel_gate.cuh: for (int unit = threadIdx.x / 32 * kRows; unit < p.hidden; -> "
    "for (int unit = threadIdx.x / 32 * kRows; unit <= p.hidden;": GUARDED,
    "resident_channel_gate.cuh: for (int first = threadIdx.x / 32 * kRows; first < block.channels; "
    "-> for (int first = threadIdx.x / 32 * kRows; first <= block.channels;": GUARDED,
    "resident_extremes.cuh: for (int done = 0; done < total; done += at_once) { -> "
    "for (int done = 0; done <= total; done += at_once) {": GUARDED,
    "resident_channel_gate.cuh: for (int done = 0; done < vectors; done += at_once) { -> "
    "for (int done = 0; done <= vectors; done += at_once) {": GUARDED,
    "resident_channel_gate_backward.cuh: for (int done = 0; done < values; done += at_once) { -> "
    "for (int done = 0; done <= values; done += at_once) {": GUARDED,
    "resident_pool.cuh: for (int done = 0; done < block.channels; done += at_once) { -> "
    "for (int done = 0; done <= block.channels; done += at_once) {": GUARDED,
    "resident_tile.cuh: if (static_cast<int>(threadIdx.x) < total * g.groups) { -> "
    "if (static_cast<int>(threadIdx.x) <= total * g.groups) {": LEFT_OVER,
    "resident_sums.cuh: for (int done = 0; done < groups * parts; done += at_once) { -> "
    "for (int done = 0; done <= groups * parts; done += at_once) {": GUARDED,
    "resident_sums.cuh: of.wait(sample, row, min(row + kRowsTogether, of.end) - 1); -> "
    "of.wait(sample, row, (of.end) - 1);": WAITS_LONGER,
    "resident_sums.cuh: const int end = min(of.end, first + step); -> "
    "const int end = (of.end);": WAITS_LONGER,
    "gather_row.cuh: const int head = to_boundary < count ? to_boundary : count; -> "
    "const int head = to_boundary <= count ? to_boundary : count;": (
        "the smaller of two: equals are the same"
    ),
    "weight_gradients.cu: "
    "for (int64_t first_k = 0; first_k < p.a.count; first_k += kDepth) { -> "
    "for (int64_t first_k = 0; first_k <= p.a.count; first_k += kDepth) {": (
        "one more chunk, of zeros, where chunks end with the vectors"
    ),
    "convolution.cuh: for (int done = 0; done < total * kSharing; done += blockDim.x) { -> for "
    "(int done = 0; done <= total * kSharing; done += blockDim.x) {": GUARDED,
    "cross_sums.cu: for (int j = 0; j < Lane::kVectors; ++j) { -> for (int j = 0; j <= "
    "Lane::kVectors; ++j) {": GUARDED,
    "map_terms.cu: for (int j = 0; j < Lane::kVectors; ++j) { -> for (int j = 0; j <= "
    "Lane::kVectors; ++j) {": GUARDED,
    "map_terms.cu: for (int j = 0; j < Lane::kVectors; ++j) { -> for (int j = 0; j <= "
    "Lane::kVectors; ++j) { (number 2)": GUARDED,
    "tile_sums.cuh: for (int j = 0; j < Lane::kVectors; ++j) { -> for (int j = 0; j <= "
    "Lane::kVectors; ++j) {": GUARDED,
    "tile_sums.cuh: for (int j = 0; j < Lane::kVectors; ++j) -> for (int j = 0; j <= "
    "Lane::kVectors; ++j)": GUARDED,
    "tile_sums.cuh: row[j] = min(element(j) / cols, g.row_group - 1); -> row[j] = "
    "(element(j) / cols);": GUARDED,
    "tile_sums.cuh: first = min(static_cast<int>(threadIdx.x) / 32 * share, rows); -> first "
    "= (static_cast<int>(threadIdx.x) / 32 * share);": (
        "a range that begins behind the rows still ends with them: it is empty"
    ),
    "tile_sums.cuh: for (int done = 0; done < rows; done += 32 >> g.row_lanes_log) { -> for "
    "(int done = 0; done <= rows; done += 32 >> g.row_lanes_log) {": NO_ROW,
    "cross_sums.cu: for (int done = own.first; done < own.end; done += g.chunk) { -> for "
    "(int done = own.first; done <= own.end; done += g.chunk) {": LAST_CHUNK,
    "map_terms.cu: for (int done = own.first; done < own.end; done += g.chunk) { -> for (int "
    "done = own.first; done <= own.end; done += g.chunk) {": LAST_CHUNK,
    "input_gradient.cu: if (at < from || at >= end) return; -> if (at < from || at > end) "
    "return;": BEYOND,
    "input_gradient.cu: split = min(kCount, cols - start); -> split = (cols - start);": BEYOND,
    "resident_input_gradient.cuh: if (at < from || at >= to) return; -> if (at < from || at "
    "> to) return;": BEYOND,
    "resident_input_gradient.cuh: split = min(kCount, slice.cols - start); -> split = "
    "(slice.cols - start);": BEYOND,
    "resident_backward.cuh: if (p.dx && kPacked && block.cols() < kVector<T>) -> if (p.dx && "
    "kPacked && block.cols() <= kVector<T>)": ("rows of just a vector are not packed"),
    "resident_extremes.cuh: const int to = min(block.rows(), from + step); -> const int to = "
    "(block.rows());": WAITS_LONGER,
    "resident_extremes.cuh: ready(sample, min(row + kRowsAlong, end) - 1); -> "
    "ready(sample, (end) - 1);": WAITS_LONGER,
    "resident_extremes.cuh: if (row < to) row += (to - row + g.groups - 1) / g.groups * "
    "g.groups; -> if (row <= to) row += (to - row + g.groups - 1) / g.groups * g.groups;": (
        "from there to there it adds 0"
    ),
    "resident_output.cuh: const int along = min(vectors, g.threads), below = g.threads / "
    "along; -> const int along = (g.threads), below = g.threads / along;": (
        "threads without a vector are idle, and the others take every row"
    ),
    "resident_sums.cuh: add_parts(sum, group < g.groups, group, g.groups, i, total, "
    "loads.m.shared.sum, put_vector); -> add_parts(sum, group <= g.groups, group, g.groups, "
    "i, total, loads.m.shared.sum, put_vector);": LEFT_OVER,
    "resident_mlp.cuh: for (int first = threadIdx.x % 32; first < count; first += 32 * "
    "kAtOnce) { -> for (int first = threadIdx.x % 32; first <= count; first += 32 * kAtOnce) "
    "{": GUARDED,
    "convolution.cuh: if (rows && 2 * box.pixels() <= threads) -> if (rows && 2 * box.pixels() <= "
    "1 + threads)": "there are whole warps of threads, an even number",
    "convolution.cuh: const bool rows = 2 * s.kernel_depth * s.kernel_height >= kSharing; -> const "
    "bool rows = 2 * s.kernel_depth * s.kernel_height > kSharing;": (
        "extents of the kernel are odd, so that twice their product is never 8"
    ),
    "convolution.cuh: else if (box.pixels() <= threads) -> else if (box.pixels() <= 1 + "
    "threads)": "either way takes every pixel, and sums its taps in the same order",
    "spatial_gate.cu: if (block.pixels() <= kThreads) -> if (block.pixels() <= 1 + kThreads)": (
        "either way takes every pixel, and sums its taps in the same order"
    ),
    "weight_gradients.cu: const auto depth = static_cast<int>(min(int64_t{kDepth}, p.a.count "
    "- first_k)); -> const auto depth = static_cast<int>((int64_t{kDepth}));": (
        "what is staged behind the last is zero"
    ),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Breaks the kernels and looks who notices.")
    parser.add_argument(
        "--only",
        action="append",
        metavar="SUBSTRING",
        help='mutants with this in "KIND PATH:LINE: CHANGE"; may be given several times',
    )
    parser.add_argument("--sample", type=int, help="so many of them, drawn by chance")
    parser.add_argument("--seed", type=int, default=0, help="of that chance")
    parser.add_argument(
        "--shard",
        type=shard,
        default=(0, 1),
        metavar="I/N",
        help="of these every N-th from the I-th on, I from 0: splits a long run",
    )
    parser.add_argument(
        "--runs",
        action="append",
        metavar="SUBSTRING",
        help="look for a difference only in runs with this in their name: quicker, and proves less",
    )
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    parser.add_argument("--jobs", type=int, default=jobs, help="compilers at a time")
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    return parser.parse_args(arguments)


def shard(text: str) -> tuple[int, int]:
    """I and N of "I/N"."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text!r}")
    return int(found[1]), int(found[2])


def chosen(arguments: argparse.Namespace) -> list[Mutant]:
    only = arguments.only or [""]
    found = [m for m in all_mutants() if any(part in f"{m.kind} {m}" for part in only)]
    if arguments.sample is not None and arguments.sample < len(found):
        found = sorted(
            random.Random(arguments.seed).sample(found, arguments.sample),
            key=lambda m: (m.path, m.line),
        )
    first, step = arguments.shard
    return found[first::step]


def main() -> int:
    arguments = parse()
    mutants = chosen(arguments)
    if arguments.list:
        for mutant in mutants:
            print(mutant.kind, mutant)
        print(dict(Counter(mutant.kind for mutant in mutants)))
        return 0

    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        tree = Tree(Path(folder).resolve(), arguments.jobs)
        survivors = score(mutants, tree, arguments.runs or [""])
    return 1 if survivors else 0


def score(mutants: list[Mutant], tree: Tree, runs_named: list[str]) -> list[Mutant]:
    """Print what becomes of each; those that survive without a reason."""
    torch.set_num_threads(1)  # threads do not outlive a fork
    broken_in = {source for mutant in mutants for source in tree.dependents(mutant.path)}
    runs = [
        run
        for run in make_runs()
        if run.may_notice(list(broken_in)) and any(part in run.name for part in runs_named)
    ]
    started = time.perf_counter()
    expected = in_child(600, unbroken, tree.objects / BACKEND, runs)
    limit = 20 + 5 * (time.perf_counter() - started)
    killed, unexplained = 0, []
    for number, mutant in enumerate(mutants):
        started, name = time.perf_counter(), f"mutant{number}"
        broken = tree.broken(mutant, name)
        try:
            sources = tree.dependents(mutant.path)
            noticed = in_child(limit, first_difference, broken, runs, expected, sources)
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
