"""What the suite runs over: shapes with the regime each covers, dtypes, layouts, and inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cbam_cuda
from cbam_cuda.arguments import Weights

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]  # [N, C, *space]
    hidden: int
    kernel: tuple[int, ...]

    def __str__(self) -> str:
        return self.name


CASES = (
    # Two dimensions
    Case("small sample, one thread does it all", (2, 16, 5, 6), 4, (3, 3)),
    Case("rows shorter than a vector", (3, 20, 1, 3), 5, (7, 7)),
    Case("rows of 7x7 leave a rest of every vector", (3, 64, 7, 7), 4, (7, 7)),
    Case("more samples than threads", (9, 32, 14, 14), 8, (7, 7)),
    Case("one sample split over threads", (1, 24, 33, 31), 3, (7, 7)),
    Case("several column tiles, row blocks and pool blocks", (2, 72, 40, 40), 6, (5, 5)),
    Case("more pixels than are staged at a time", (1, 200, 12, 12), 3, (3, 3)),
    Case("row longer than a block of sums", (1, 6, 70, 71), 2, (7, 7)),
    Case("more channels than a column tile", (2, 530, 3, 3), 33, (3, 3)),
    Case("more hidden units than a block's warps take", (5, 72, 4, 4), 40, (3, 3)),
    Case("kernel larger than the image", (2, 8, 4, 3), 2, (11, 11)),
    Case("kernel wider than a block of taps", (2, 8, 9, 40), 2, (19, 19)),
    Case("kernel of one tap", (2, 8, 6, 6), 2, (1, 1)),
    Case("kernel with a size for each dimension", (2, 8, 12, 9), 2, (3, 7)),
    Case("one channel", (2, 1, 9, 9), 1, (3, 3)),
    Case("one pixel", (3, 17, 1, 1), 4, (7, 7)),
    Case("one of everything", (1, 1, 1, 1), 1, (1, 1)),
    # One dimension
    Case("sequence", (2, 12, 100), 3, (7,)),
    Case("sequence longer than many blocks", (1, 4, 20000), 2, (9,)),
    # Three dimensions
    Case("volume", (2, 10, 4, 6, 9), 2, (3, 3, 3)),
    Case("volume, a size for each dimension", (1, 40, 6, 17, 11), 4, (1, 3, 5)),
    Case("volume, large kernel", (1, 4, 5, 8, 9), 2, (7, 7, 7)),
)

# More than 8 MB of float32, or with twice the samples of 16 bits: outputs that the CPU backend
# stores past the caches where rows, or several together, hold whole vectors.
LARGE_CASES = (
    Case("large, rows of several pieces", (10, 64, 60, 60), 4, (7, 7)),
    Case("large, rows that end anywhere", (10, 67, 57, 57), 4, (7, 7)),
    Case("large, short rows", (11, 1052, 14, 14), 4, (7, 7)),
)

# Weights of the MLP that all threads of the CPU backend share, where each has few samples: also of
# samples that are too small to be split, and fewer than there are threads.
HEAVY_CASES = (
    Case("MLP heavier than x", (5, 1024, 4, 4), 257, (3, 3)),
    Case("MLP heavier than small x", (2, 1024, 3, 3), 257, (3, 3)),
)

# Fewer, for tests where the regime does not matter: one of each number of dimensions.
FEW_CASES = tuple(
    c for c in CASES if c.name in ("rows of 7x7 leave a rest of every vector", "sequence", "volume")
)


def device_of(backend: str) -> str:
    """The device whose tensors a backend takes."""
    return "cpu" if backend in ("emulated", "reference") else backend


def operators(backend: str) -> Any:
    """The operators that a backend runs."""
    return getattr(torch.ops, "cbam_cuda_emulated" if backend == "emulated" else "cbam_cuda")


def step_by_parts(library: Any, x: Tensor, weights: Weights, grad: Tensor) -> tuple[Tensor, ...]:
    """All that comes out of a forward and a backward that are made of their parts."""
    channel_gate, logits, *others = library.logits(x, *weights)
    out, gate = library.scale(x, channel_gate, logits)
    of_channels, of_positions = library.scale_backward(grad, x, channel_gate, gate)
    of_logits = of_positions * gate * (1 - gate)
    saved = channel_gate, gate, *others
    mask = [w is not None for w in (x, *weights)]
    found = library.logits_backward(grad, of_channels, of_logits, x, *weights, *saved, mask)
    return (out, channel_gate, logits, *others, gate, of_channels, of_positions, *found)


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _into(view: Tensor, x: Tensor) -> Tensor:
    return view.copy_(x)


def _channels_of_more(x: Tensor) -> Tensor:
    n, c, *space = x.shape
    return _into(x.new_full((n, c + 5, *space), torch.nan)[:, 2 : c + 2], x)


def _channels_last_of_more(x: Tensor) -> Tensor:
    n, c, *space = x.shape
    return _into(x.new_full((n, *space, c + 3), torch.nan)[..., 1 : c + 1].movedim(-1, 1), x)


def _every_second(x: Tensor) -> Tensor:
    return _into(x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)[..., ::2], x)


def _odd_offset(x: Tensor) -> Tensor:
    return _into(x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape), x)


def _space_transposed(x: Tensor) -> Tensor:
    return x.transpose(1, -1).contiguous().transpose(1, -1).transpose(-1, -2).contiguous().mT


def _samples_reversed_in_memory(x: Tensor) -> Tensor:
    return _into(x.new_full((x.shape[1], x.shape[0], *x.shape[2:]), torch.nan).transpose(0, 1), x)


# The same values in other places.
LAYOUTS = {
    "contiguous": _contiguous,
    "channels_last": _channels_last,
    "channels of more": _channels_of_more,
    "channels_last of more": _channels_last_of_more,
    "every second": _every_second,
    "odd offset": _odd_offset,
    "space transposed": _space_transposed,
    "samples inside": _samples_reversed_in_memory,
}
NATIVE_LAYOUTS = ("contiguous", "channels_last")


def make_x(case: Case, dtype: torch.dtype, backend: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.shape, generator=generator, dtype=torch.float64)
    return x.to(device_of(backend), dtype)


def make_weights(
    case: Case, dtype: torch.dtype, backend: str = "cpu", *, bias: bool = True, seed: int = 1
) -> Weights:
    """Weights large enough that every gate varies."""
    generator = torch.Generator().manual_seed(seed)
    channels, dim = case.shape[1], len(case.shape) - 2

    def draw(*sizes: int, fan_in: int) -> Tensor:
        values = torch.randn(sizes, generator=generator, dtype=torch.float64)
        return (values * (2.0 / fan_in**0.5)).to(device_of(backend), dtype)

    ones = (1,) * dim
    taps = 2 * torch.Size(case.kernel).numel()
    return Weights(
        draw(case.hidden, channels, *ones, fan_in=channels),
        draw(case.hidden, fan_in=4) if bias else None,
        draw(channels, case.hidden, *ones, fan_in=case.hidden),
        draw(channels, fan_in=4) if bias else None,
        draw(1, 2, *case.kernel, fan_in=taps),
        draw(1, fan_in=4) if bias else None,
    )


def misaligned(weights: Weights) -> Weights:
    """The same values, none of which start on a multiple of 16 bytes."""
    return Weights(*(None if w is None else _odd_offset(w) for w in weights))


def leaves(x: Tensor, weights: Weights, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """x and the weights, detached, all of which require gradients; layout kept.

    Where the dtype stays they share memory with what was given.
    """
    found: list[Tensor | None] = []
    for t in (x, *weights):
        leaf = None if t is None else t.detach().to(dtype or t.dtype)
        found.append(None if leaf is None else leaf.requires_grad_())
    return found


@contextlib.contextmanager
def threads_of(backend: str) -> Iterator[None]:
    """One for plain PyTorch: the threads of its convolutions spin until the last one has a
    processor, which several workers of pytest share.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if backend == "reference" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def gradients(backend: str, tensors: list[Tensor | None], grad_out: Tensor) -> list[Tensor | None]:
    """The output and the gradient of each tensor, None for those that are None."""
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    with threads_of(backend):
        out = cbam_cuda.cbam(*tensors, backend=backend)
        found = iter(torch.autograd.grad(out, wanted, grad_out))
    grads = [next(found) if t is not None and t.requires_grad else None for t in tensors]
    return [out.detach(), *grads]


def reordered_gradients(tensors: list[Tensor | None], grad_out: Tensor) -> list[Tensor | None]:
    """The reference's `gradients`, from channels and hidden units in reverse: the same sums in
    another order."""
    # Of out, then of each tensor: the dimensions that count channels or hidden units.
    dims = ((1,), (1,), (0, 1), (0,), (0, 1), (0,), (), ())

    def reverse(t: Tensor | None, over: tuple[int, ...]) -> Tensor | None:
        return None if t is None else t.detach().flip(over)

    out, *of_tensors = dims
    reversed_ = [reverse(t, over) for t, over in zip(tensors, of_tensors, strict=True)]
    leaves_ = [None if t is None else t.requires_grad_() for t in reversed_]
    found = gradients("reference", leaves_, grad_out.flip(out))
    return [reverse(t, over) for t, over in zip(found, dims, strict=True)]
