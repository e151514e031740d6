"""A short run of forward and backward, in a process of its own, and whether it notices a break."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import LAYOUTS, Case, make_weights, make_x, operators, step_by_parts

# Together the cases reach every branch of every kernel. float64 and bfloat16 take the branches of
# float32 and float16, and are left out of the tree.
SHORT = (torch.float32, torch.float16)
BOTH = ("contiguous", "channels_last")
RUNS = (
    (Case("small", (2, 16, 5, 6), 4, (3, 3)), SHORT, (*BOTH, "odd offset")),
    (Case("7x7", (3, 64, 7, 7), 4, (7, 7)), SHORT, BOTH),
    (Case("three walks over the weights", (17, 36, 6, 6), 34, (3, 3)), SHORT[:1], BOTH),
    (Case("many channels and units", (2, 530, 3, 3), 33, (3, 3)), SHORT, BOTH),
    (Case("kernel larger than the image", (2, 8, 4, 3), 2, (11, 11)), SHORT[:1], BOTH),
    (Case("several boxes, tiles and chunks", (2, 72, 40, 40), 3, (5, 5)), SHORT[:1], BOTH),
    (Case("several chunks of pixels", (1, 256, 12, 12), 3, (3, 3)), SHORT[:1], BOTH[1:]),
    (Case("odd rows", (1, 24, 33, 31), 3, (5, 3)), SHORT[:1], (*BOTH, "channels of more")),
    (Case("a block for a pixel", (1, 4100, 2, 5), 1, (3, 3)), SHORT[:1], BOTH[1:]),
    (Case("sequence", (1, 4, 20000), 2, (9,)), SHORT[:1], (*BOTH, "odd offset")),
    (Case("volume", (2, 10, 4, 6, 9), 2, (3, 3, 3)), SHORT[:1], BOTH),
    (
        Case("vectors of more samples than are staged", (70, 8, 2, 2), 2, (3, 3)),
        SHORT[:1],
        BOTH[:1],
    ),
    (Case("boxes along the depth", (1, 3, 400, 2, 3), 1, (5, 1, 3)), SHORT[:1], BOTH),
)
# On a slice of a GPU, where eight samples share a walk over the MLP's weights.
WALKS = Case("walks of eight samples, large products", (11, 1100, 3, 3), 133, (3, 3))
SMALL_MLP = Case("walks of eight samples, both layers in a launch", (11, 72, 3, 3), 24, (3, 3))
SLICED = (
    (WALKS, SHORT[:1], BOTH[:1], (("H100", 2),)),
    (SMALL_MLP, SHORT, BOTH[:1], (("H100", 2),)),
)
# The resident kernels: cases, and the slices of GPUs whose teams take them.
FIRST, HALF, FULL = BOTH[:1], SHORT[1:], SHORT[:1]
UNEVEN = Case("boxes that the image cuts", (3, 64, 9, 8), 3, (5, 5))
UNITS = Case("blocks that add up some units", (69, 256, 2, 2), 250, (3, 3))
RESIDENT_FORWARD = (
    (UNEVEN, HALF, BOTH, (("H100", 4),)),
    (Case("the same on the whole grid", (1, 128, 27, 28), 3, (5, 5)), HALF, FIRST, (("T4", 8),)),
    (Case("a short last chunk", (1, 16, 19, 19), 3, (5, 5)), HALF, BOTH[1:], (("H100", 2),)),
    (Case("teams come back", (7, 32, 8, 8), 3, (5, 5)), SHORT, BOTH, (("H100", 2), ("T4", 2))),
    (Case("visits of several samples", (19, 512, 7, 7), 128, (3, 3)), HALF, BOTH, (("H100", 8),)),
    (
        Case("a block with fewer channels", (2, 30, 16, 16), 6, (7, 7)),
        SHORT,
        FIRST,
        (("H100", 16),),
    ),
    (Case("7x7", (9, 64, 7, 7), 4, (7, 7)), HALF, BOTH, (("H100", 4), ("A100", 8))),
    (Case("clusters come back", (5, 128, 28, 28), 5, (7, 7)), HALF, BOTH, (("H100", 4),)),
    (Case("several boxes a block", (1, 256, 56, 56), 2, (7, 7)), HALF, FIRST, (("T4", 32),)),
    (Case("three unequal blocks", (3, 64, 28, 28), 4, (5, 5)), HALF, BOTH, (("A100", 13),)),
    (Case("resident volume", (3, 64, 4, 8, 8), 2, (3, 3, 3)), SHORT[:1], BOTH, (("A100", 4),)),
)
# Whose blocks are made to hold pixels.
RESIDENT_FORWARD_PIXELS = (
    (Case("clusters of pixels", (3, 16, 20, 20), 3, (5, 5)), FULL, BOTH, (("H100", 4),)),
    (Case("pixels in short pieces", (3, 32, 12, 12), 8, (5, 5)), HALF, FIRST, (("H100", 2),)),
    (Case("unequal pixels", (2, 24, 14, 12), 4, (5, 5)), HALF, FIRST, (("T4", 8),)),
    (Case("unequal pixels", (2, 24, 13, 14), 4, (5, 5)), HALF, BOTH[1:], (("A100", 11),)),
    (Case("less than a row", (1, 8, 4, 64), 2, (5, 5)), FULL, FIRST, (("A100", 16),)),
    (Case("more blocks than channels", (2, 4, 16, 16), 2, (5, 5)), FULL, FIRST, (("H100", 0),)),
    (Case("pixels of a volume", (2, 8, 4, 6, 8), 2, (3, 3, 3)), FULL, BOTH[1:], (("T4", 4),)),
)
RESIDENT_BACKWARD = (
    (UNEVEN, SHORT, BOTH, (("H100", 4),)),
    (Case("teams come back", (7, 32, 8, 8), 3, (5, 5)), SHORT, BOTH, (("H100", 2), ("T4", 2))),
    (Case("visits of several samples", (19, 512, 7, 7), 128, (3, 3)), HALF, BOTH, (("A100", 32),)),
    (Case("a short first visit", (12, 512, 7, 7), 128, (3, 3)), HALF, FIRST, (("A100", 32),)),
    (Case("visits of two samples", (13, 64, 7, 7), 16, (3, 3)), HALF, BOTH, (("H100", 4),)),
    (Case("rows shorter than a vector", (4, 64, 5), 4, (3,)), HALF, FIRST, (("H100", 4),)),
    (Case("more units than threads", (2, 16, 6, 6), 530, (3, 3)), HALF, FIRST, (("H100", 4),)),
    (Case("one row at a time", (1, 34, 16, 16), 6, (7, 7)), SHORT, FIRST, (("H100", 16),)),
    (Case("x comes and goes", (3, 128, 28, 28), 8, (5, 5)), HALF, BOTH, (("A100", 2),)),
    (
        Case("x comes and goes", (2, 164, 20, 20), 4, (7, 7)),
        FULL,
        FIRST,
        (("T4", 8), ("A100", 3)),
    ),
    (Case("packed x comes", (4, 1024, 7, 7), 16, (3, 3)), HALF, FIRST, (("RTX 5090", 2),)),
    (Case("three unequal blocks", (3, 64, 28, 28), 4, (5, 5)), HALF, BOTH, (("A100", 13),)),
    (Case("resident volume", (3, 64, 4, 8, 8), 2, (3, 3, 3)), SHORT, BOTH, (("A100", 4),)),
    (Case("resident sequence", (2, 16, 2000), 2, (9,)), HALF, FIRST, (("H100", 4),)),
)
RESIDENT_BACKWARD_PIXELS = (
    (Case("clusters of pixels", (3, 16, 20, 20), 3, (5, 5)), HALF, BOTH, (("H100", 4),)),
    (Case("pixels, x comes and goes", (2, 32, 40, 24), 4, (5, 5)), HALF, BOTH, (("T4", 2),)),
    (Case("pixels, x comes and goes", (2, 96, 40, 40), 4, (7, 7)), HALF, BOTH[1:], (("H100", 2),)),
    (Case("unequal pixels", (2, 24, 14, 12), 4, (5, 5)), HALF, FIRST, (("A100", 11),)),
    (Case("less than a row", (1, 8, 4, 64), 2, (5, 5)), FULL, FIRST, (("A100", 16),)),
    (Case("more blocks than channels", (1, 4, 2000), 2, (9,)), FULL, BOTH, (("H100", 0),)),
    (Case("pixels of a volume", (2, 8, 4, 6, 8), 2, (3, 3, 3)), FULL, BOTH[1:], (("T4", 4),)),
)
BANDS = ((Case("a short last band", (2, 8, 54, 54), 4, (7, 7)), HALF, FIRST, (("RTX 5090", 4),)),)
COMING = ((Case("x comes and goes", (5, 64, 56, 56), 4, (7, 7)), HALF, BOTH, (("H100", 4),)),)
AHEAD = (
    (Case("short last visits", (11, 64, 7, 7), 16, (3, 3)), HALF, BOTH, (("H100", 4),)),
    (Case("clusters come back", (5, 72, 20, 20), 4, (5, 5)), HALF, BOTH, (("H100", 4),)),
)
SHARED_UNITS = ((UNITS, HALF, FIRST, (("A100", 0),)),)
# All that are resident, by direction and strategy.
HELD = (
    ("forward", "resident", RESIDENT_FORWARD),
    ("forward", "resident-channels:cluster:4", BANDS),
    ("forward", "resident-channels:grid:13", SHARED_UNITS),
    ("forward", "resident-pixels", RESIDENT_FORWARD_PIXELS),
    ("forward", "resident:cluster:ahead", AHEAD),
    ("backward", "resident", RESIDENT_BACKWARD),
    ("backward", "resident-channels:cluster:4", COMING),
    ("backward", "resident-channels:grid:13", SHARED_UNITS),
    ("backward", "resident-pixels", RESIDENT_BACKWARD_PIXELS),
    ("backward", "resident:cluster:ahead", AHEAD),
)
SCHEDULES = ("ascending", "descending")


@dataclass(frozen=True)
class Run:
    """A forward and a backward that stream x, or one of them that holds it on a slice of a GPU."""

    name: str
    tensors: tuple[torch.Tensor, torch.Tensor]  # x and the gradient of the output
    weights: tuple[torch.Tensor, ...]
    device: tuple[str, int] = ("H100", 0)
    resident: str = ""  # the direction
    strategy: str = "resident"  # in that

    def may_notice(self, sources: list[str]) -> bool:
        """Whether it launches a kernel of one of these files."""
        held = [source for source in sources if source.startswith("cuda/kernels/resident_")]
        if self.resident:
            return any(f"resident_{self.resident}" in source for source in held)
        return len(held) < len(sources)

    def results(self) -> tuple[torch.Tensor, ...]:
        backend, (x, grad) = operators("emulated"), self.tensors
        choose(self.strategy if self.resident == "forward" else "streaming")
        saved = backend.forward_train(x, *self.weights)
        if self.resident == "forward":
            return (backend.forward(x, *self.weights), *saved)
        choose(self.strategy if self.resident else "streaming")
        mask = [True] * 7
        found = backend.backward(grad, *saved[1:3], x, *self.weights, *saved[1:], mask)
        parts = () if self.resident else step_by_parts(backend, x, self.weights, grad)
        return (*saved, *found, *parts)

    def digest(self, emulator: ctypes.CDLL) -> str:
        """Of all that comes out, and of the bytes that were moved or asked for ahead."""
        name, multiprocessors = self.device
        nothing = ctypes.c_longlong(0)
        emulator.emulated_device(name.encode(), nothing, nothing, multiprocessors)
        emulator.emulator_reset_counts()
        results = self.results()
        # In the order in which names were first used, by whatever ran before.
        counts = emulator.emulator_counts().splitlines()
        digest = hashlib.sha256(b"\n".join(sorted(counts)))
        digest.update(str(emulator.emulator_prefetched_bytes()).encode())
        for t in results:
            digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def choose(strategy: str) -> None:
    os.environ["CBAM_CUDA_STRATEGY"] = strategy


def make_run(case: Case, dtype: torch.dtype, layout: str, *resident: object) -> Run:
    words = (str(case), str(dtype).removeprefix("torch."), layout, *map(str, resident))
    x, grad = (LAYOUTS[layout](make_x(case, dtype, seed=seed)) for seed in (1, 2))
    return Run(", ".join(words), (x, grad), make_weights(case, dtype), *resident)


def make_runs() -> list[Run]:
    streaming = [
        make_run(case, dtype, layout)
        for case, dtypes, layouts in RUNS
        for dtype in dtypes
        for layout in layouts
    ]
    on_slices = [
        make_run(case, dtype, layout, device, direction, strategy)
        for direction, strategy, cases in (("", "streaming", SLICED), *HELD)
        for case, dtypes, layouts, devices in cases
        for dtype in dtypes
        for layout in layouts
        for device in devices
    ]
    return streaming + on_slices


def load(path: Path) -> ctypes.CDLL:
    torch.ops.load_library(str(path))
    emulator = ctypes.CDLL(str(path))
    emulator.emulator_counts.restype = ctypes.c_char_p
    emulator.emulator_prefetched_bytes.restype = ctypes.c_ulonglong
    return emulator


def first_difference(path: Path, runs: list[Run], expected: list[str], sources: list[str]) -> str:
    """The first run that notices, under one schedule or the other; empty where none does.

    `sources` are the files that were compiled with the mistake.
    """
    emulator = load(path)
    for schedule in SCHEDULES:
        emulator.emulator_set_schedule(schedule.encode())
        for run, digest in zip(runs, expected, strict=True):
            if not run.may_notice(sources):
                continue
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
