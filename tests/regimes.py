"""Ways in which the resident kernels hold samples: problems on a GPU or on a slice of it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from cases import NATIVE_LAYOUTS, Case, make_weights, misaligned

from cbam_cuda import ops

NOT_POSSIBLE = "expected one that is possible"
SPLITS = ("resident-channels", "resident-pixels")
HELD = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS_LAST = NATIVE_LAYOUTS[1]


@contextlib.contextmanager
def device(
    emulator: ctypes.CDLL, name: str, multiprocessors: int = 0, *, l2: int = 0, bandwidth: int = 0
) -> Iterator[None]:
    """Plans are made for a GPU, or for a slice of it, or with another cache or memory."""
    limits = (ctypes.c_longlong(l2), ctypes.c_longlong(bandwidth))
    assert emulator.emulated_device(name.encode(), *limits, multiprocessors) == 0
    try:
        yield
    finally:
        nothing = ctypes.c_longlong(0)
        emulator.emulated_device(b"H100", nothing, nothing, 0)


def plan_of(
    case: Case,
    dtype,
    layout: str,
    gpu: str = "H100",
    multiprocessors: int = 0,
    strategy: str = "resident",
    **what,
):
    """The resident plan of a case; ValueError where there is none."""
    return ops.compiled().plan(
        list(case.shape),
        case.hidden,
        list(case.kernel),
        str(dtype).removeprefix("torch."),
        gpu,
        channels_last=layout == CHANNELS_LAST,
        strategy=strategy,
        multiprocessors=multiprocessors,
        **what,
    )


@dataclass(frozen=True)
class Regime:
    """A problem on a GPU, or on a slice of it, and what its plan must be like."""

    name: str
    shape: tuple[int, ...]
    hidden: int
    gpu: str = "H100"
    multiprocessors: int = 0
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float16
    plan: dict = field(default_factory=dict)
    strategy: str = "resident"

    def __str__(self) -> str:
        return self.name

    @property
    def case(self) -> Case:
        return Case(self.name, self.shape, self.hidden, (7,) * (len(self.shape) - 2))

    def facts(self, **what) -> dict:
        """What `plan` speaks of, of the plan as it is."""
        gpu = (self.gpu, self.multiprocessors)
        found = plan_of(self.case, self.dtype, self.layout, *gpu, self.strategy, **what)
        g = dict(found["passes"]["resident"])
        pixels, channels = g["pixels"], g["channels"]
        by_pixels = g["split"] == "pixels"
        visits = -(-self.shape[0] // g["samples"])
        g["rounds"] = -(-visits // g["teams"])
        if "band" in g:
            g["bands"] = -(-pixels // g["band"])
            g["a short last band"] = pixels % g["band"] > 0
        held = self.shape[1] if by_pixels else channels
        rows = pixels if self.layout == CHANNELS_LAST else held
        g["a short last chunk"] = rows % g["chunk"] > 0
        shared, share = (self.shape[2:], pixels) if by_pixels else (self.shape[1:2], channels)
        g["uneven"] = torch.Size(shared).numel() < g["team"] * share
        g["blocks without channels"] = self.shape[1] <= (g["team"] - 1) * channels
        g["several boxes"] = g["boxes_each"] > 1
        return {name: g[name] for name in self.plan}


# A team visits several samples, and its weights stay on the chip: in either direction.
STAYING = Regime(
    "weights that stay", (7, 32, 14, 14), 8, multiprocessors=2, plan={"holds_weights": True}
)
WEIGHTS_THAT_STAY = {
    "float32 beside x of 16 bits": make_weights(STAYING.case, torch.float32),
    "misaligned": misaligned(make_weights(STAYING.case, STAYING.dtype)),
}
