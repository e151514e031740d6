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
from cases import LAYOUTS, Case, make_weights, make_x, operators

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
