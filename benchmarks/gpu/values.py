"""Values: shapes of real networks, tensors past 2^31 elements, and many runs of the same."""

from __future__ import annotations

import itertools

import torch

from ..outcome import SkippedError
from ..problems import BLOCKS, DTYPES, LAYOUTS, draw
from .inputs import (
    assert_gradients_right,
    assert_right,
    assert_same,
    draw_weights,
    run,
    train,
)
from .strategies import Tally

BATCHES = (1, 8, 32)
RUNS = 100
MORE_THAN = 2**31
COPIES = 6  # x, out, their gradients, and room for what else runs
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


def more_than_31_bits(
    block: tuple[int, int, int] = BLOCKS[0], elements: int = MORE_THAN, device: str = "cuda"
) -> str:
    """Samples at both ends, in the middle and across element 2^31 against runs of their own."""
    size = block[0] * block[1] * block[2]
    n = elements // size + 2
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        needed = COPIES * n * size * torch.float16.itemsize
        if free < needed:
            raise SkippedError(f"{needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} are free")
    samples = [slice(k, k + 1) for k in (0, n // 2, elements // size, n - 1)]
    tally = Tally()
    for layout in LAYOUTS:
        with tally.problem(layout):
            _samples_right((n, *block), layout, samples, device)
    return f"[{n}, {', '.join(map(str, block))}], {n * size:,} elements: {tally.said('layouts')}"


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
