"""What is timed: the shapes, dtypes and layouts of x, and numbers to fill it with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Outputs of the stages of a ResNet-50, [C, H, W].
BLOCKS = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
BATCHES = (8, 1, 32, 256)  # the most wanted first
SMALL = (1, 64, 56, 56)
# A large image, a sequence, a volume.
OTHERS = ((1, 64, 512, 512), (8, 256, 4096), (2, 64, 16, 56, 56))
LARGEST = (256, 2048, 7, 7)  # of the largest batch, what takes the least time


class Problem(NamedTuple):
    """One x."""

    shape: tuple[int, ...]  # [N, C, *space]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    @property
    def bytes(self) -> int:
        """Of x."""
        return self.dtype.itemsize * self.elements

    @property
    def elements(self) -> int:
        """Of x."""
        return torch.Size(self.shape).numel()

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{'x'.join(map(str, self.shape))} {dtype} {self.layout}"


def in_stages(
    batch: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> list[Problem]:
    """One for each stage of a ResNet-50."""
    return [Problem((batch, *block), dtype, layout) for block in BLOCKS]


def problems(on_gpu: bool = False) -> Iterator[Problem]:
    """All there are, the most wanted first."""
    return iter(dict.fromkeys(_by_wish(on_gpu)))


def _by_wish(on_gpu: bool) -> Iterator[Problem]:
    """Some more than once."""
    kinds = [(dtype, layout) for layout in LAYOUTS for dtype in DTYPES]
    yield from in_stages(8)
    yield from in_stages(1)
    if on_gpu:  # what it is bought for, and takes it no longer than small ones
        yield from in_stages(256, torch.float16)
        yield from in_stages(32, torch.bfloat16, "channels_last")
        yield from in_stages(256)
        yield from map(Problem, OTHERS)
    yield from in_stages(8, torch.bfloat16)
    yield from in_stages(8, layout="channels_last")
    yield from map(Problem, (SMALL, *OTHERS, LARGEST))
    yield from in_stages(8, torch.float16)
    yield from in_stages(32)
    for dtype, layout in kinds:
        # Without dimensions 2 and 3 there is nothing that channels could be behind.
        shapes = [s for s in OTHERS if layout == "contiguous" or len(s) > 3]
        yield from (Problem(shape, dtype, layout) for shape in shapes)
    for n in BATCHES:
        for dtype, layout in kinds:
            yield from in_stages(n, dtype, layout)


def memory_format(layout: str, dims: int) -> torch.memory_format:
    """Of x with so many dimensions; channels_last needs at least 4."""
    if layout == "channels_last" and dims == 5:
        return torch.channels_last_3d
    return LAYOUTS[layout]


def draw(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str = "contiguous",
    device: str | torch.device = "cuda",
    seed: int = 0,
) -> Tensor:
    """Normal random numbers, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, device=device, generator=generator)
    return x.to(dtype, memory_format=memory_format(layout, len(shape)))
