"""Values: shapes of networks, other dimensions, tensors past 2^31 elements, the same many times."""

from __future__ import annotations

import itertools

import torch

from ..outcome import SkippedError
from ..problems import BLOCKS, DTYPES, LAYOUTS, draw
from .inputs import (
    assert_gradients_right,
    assert_right,
    assert_same,
    cases,
    draw_weights,
    run,
    train,
)
from .strategies import Tally

BATCHES = (1, 8, 32)
RUNS = 100
MORE_THAN = 2**31
COPIES = 6  # x, out, their gradients, and room for what else runs
# Those of the suite, and what networks have of sequences and volumes.
OTHER_DIMENSIONS = (
    *(case for case in cases.CASES if len(case.shape) != 4),
    cases.Case("sequence of a network", (8, 256, 512), 16, (7,)),
    cases.Case("volume of a network", (4, 64, 8, 14, 14), 4, (7, 7, 7)),
)
TRAINING_BATCH = 2  # few: where two channels are nearly the same, either may be the maximum


def network_shapes(
    blocks: tuple[tuple[int, int, int], ...] = BLOCKS,
    batches: tuple[int, ...] = BATCHES,
    device: str = "cuda",
) -> str:
    """Every block at every batch, dtype and layout against the reference in float64."""
    tally = Tally()
    for block, n, dtype, layout in itertools.product(blocks, batches, DTYPES, LAYOUTS):
        name = f"{(n, *block)}, {dtype}, {layout}"
        x = draw((n, *block), dtype, layout, device)
        weights = draw_weights(block[0], dtype, device)
        with tally.problem(name):
            assert_right(name, run(x, weights), x, weights)
    return tally.said()


def network_gradients(
    blocks: tuple[tuple[int, int, int], ...] = BLOCKS, device: str = "cuda"
) -> str:
    """Every block's gradients of x and all weights, in every dtype and layout."""
    tally = Tally()
    for block, dtype, layout in itertools.product(blocks, DTYPES, LAYOUTS):
        shape = (TRAINING_BATCH, *block)
        name = f"{shape}, {dtype}, {layout}"
        x, grad = (draw(shape, dtype, layout, device, seed) for seed in (0, 1))
        weights = draw_weights(block[0], dtype, device)
        with tally.problem(name):
            assert_gradients_right(name, train(x, weights, grad), x, weights, grad)
    return tally.said()


def sequences_and_volumes(
    of: tuple[cases.Case, ...] = OTHER_DIMENSIONS, device: str = "cuda"
) -> str:
    """One and three dimensions: forward and all gradients, in every dtype and layout."""
    tally = Tally()
    for case, dtype, layout in itertools.product(of, DTYPES, cases.NATIVE_LAYOUTS):
        place = cases.LAYOUTS[layout]
        x, grad = (place(cases.make_x(case, dtype, device, seed)) for seed in (0, 2))
        weights = cases.make_weights(case, dtype, device)
        name = f"{case}, {dtype}, {layout}"
        with tally.problem(f"{name}, forward"):
            assert_right(name, run(x, weights), x, weights)
        with tally.problem(f"{name}, backward"):
            assert_gradients_right(name, train(x, weights, grad), x, weights, grad)
    return tally.said("forwards and backwards")


def more_than_31_bits(
    block: tuple[int, int, int] = BLOCKS[0], elements: int = MORE_THAN, device: str = "cuda"
) -> str:
    """Samples at both ends, in the middle and across element 2^31 against runs of their own."""
    size = block[0] * block[1] * block[2]
    n = elements // size + 2
    samples = [slice(k, k + 1) for k in (0, n // 2, elements // size, n - 1)]
    tally = Tally()
    for layout in LAYOUTS:
        if device == "cuda":
            _reserve(COPIES * n * size * torch.float16.itemsize)
        with tally.problem(layout):
            _samples_right((n, *block), layout, samples, device)
    return f"[{n}, {', '.join(map(str, block))}], {n * size:,} elements: {tally.said('layouts')}"


def _reserve(needed: int) -> None:
    """Take memory that this process then gives out again; other checks run and want some too."""
    torch.cuda.empty_cache()
    try:
        torch.empty(needed, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError as error:
        free, _ = torch.cuda.mem_get_info()
        reason = f"{needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} are free"
        raise SkippedError(reason) from error


def _samples_right(
    shape: tuple[int, int, int, int], layout: str, samples: list[slice], device: str
) -> None:
    weights = draw_weights(shape[1], torch.float16, device)
    x = torch.empty(shape, dtype=torch.float16, device=device, memory_format=LAYOUTS[layout])
    generator = torch.Generator(device).manual_seed(0)
    x.normal_(generator=generator)
    out = run(x, weights)
    for k in samples:
        assert_right(f"sample {k.start}, {layout}", out[k], x[k], weights)
    del out  # or there would be too little memory for the gradients
    grad = torch.empty_like(x).normal_(generator=generator)
    found = train(x, weights, grad)[:2]
    for k in samples:
        name = f"sample {k.start}, {layout}"
        assert_gradients_right(name, [t[k] for t in found], x[k], weights, grad[k])


def repeated(
    blocks: tuple[tuple[int, int, int], ...] = BLOCKS, runs: int = RUNS, device: str = "cuda"
) -> str:
    """The same call again and again, with other work beside every second one."""
    tally = Tally()
    for block, dtype in itertools.product(blocks, DTYPES):
        x, grad = (draw((8, *block), dtype, device=device, seed=seed) for seed in (0, 1))
        weights = draw_weights(block[0], dtype, device)
        name = f"{block}, {dtype}"
        with tally.problem(name):
            first = train(x, weights, grad)
            for index in range(runs):
                if device == "cuda" and index % 2:
                    _disturb()
                assert_same(f"{name}, run {index}", train(x, weights, grad), first)
    return f"forward and backward, {tally.said()}"


def _disturb() -> None:
    """Keep some multiprocessors busy, so that blocks run elsewhere and at other times."""
    with torch.cuda.stream(torch.cuda.Stream()):
        a = torch.ones(512, 512, device="cuda")
        for _ in range(4):
            a = torch.mm(a, a).clamp_(max=1)
