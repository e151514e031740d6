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


# Held in the same way in both directions.
IN_EITHER_DIRECTION = (
    Regime("bulk copies, a cluster", (1, 64, 28, 28), 4, plan={"kind": "cluster", "copy": "bulk"}),
    Regime(
        "teams of one block", (5, 16, 6, 8), 2, multiprocessors=1, plan={"team": 1, "rounds": 3}
    ),
    Regime("two blocks on a multiprocessor", (40, 64, 28, 28), 4, plan={"threads": 256}),
    Regime(
        "little shared memory",
        (3, 128, 28, 28),
        8,
        "RTX 5090",
        plan={"kind": "cluster"},
        strategy="resident:cluster",
    ),
    Regime(
        "a block with fewer channels", (2, 30, 16, 16), 6, multiprocessors=16, plan={"uneven": True}
    ),
    Regime(
        "a block with fewer channels, channels last",
        (3, 72, 28, 28),
        4,
        "H100",
        8,
        CHANNELS_LAST,
        plan={"uneven": True, "team": 4},
        strategy="resident-channels:cluster:4",
    ),
    Regime(
        "three blocks of a grid, with unequal channels",
        (3, 64, 28, 28),
        4,
        "A100",
        13,
        plan={"kind": "grid", "team": 3, "uneven": True},
        strategy="resident-channels:grid:3",
    ),
    Regime(
        "three blocks of a grid, channels last",
        (5, 104, 14, 14),
        4,
        "A100",
        13,
        CHANNELS_LAST,
        plan={"kind": "grid", "team": 3, "uneven": True, "rounds": 2},
        strategy="resident-channels:grid:3",
    ),
    Regime(
        "less than a row of pixels",
        (1, 24, 16, 256),
        4,
        "A100",
        dtype=torch.float32,
        plan={"split": "pixels", "kind": "grid", "pixels": 116},
        strategy="resident-pixels:grid:36",
    ),
    Regime(
        "each block adds up some hidden units, clusters",
        (140, 128, 2, 2),
        250,
        dtype=torch.float32,
        plan={"shares_units": True, "kind": "cluster", "team": 16, "rounds": 2},
        strategy="resident-channels:cluster:16:2",
    ),
    Regime(
        "each block adds up some hidden units, the whole grid",
        (69, 256, 2, 2),
        250,
        "A100",
        plan={"shares_units": True, "kind": "grid", "rounds": 2},
        strategy="resident-channels:grid:13",
    ),
    Regime("a sequence", (3, 32, 4096), 4, dtype=torch.bfloat16, plan={"kind": "cluster"}),
    Regime(
        "a volume",
        (2, 64, 8, 12, 16),
        4,
        dtype=torch.float32,
        plan={"kind": "cluster"},
        strategy="resident:cluster",
    ),
)

# A team visits several samples, and its weights stay on the chip: in either direction.
STAYING = Regime(
    "weights that stay", (7, 32, 14, 14), 8, multiprocessors=2, plan={"holds_weights": True}
)
WEIGHTS_THAT_STAY = {
    "float32 beside x of 16 bits": make_weights(STAYING.case, torch.float32),
    "misaligned": misaligned(make_weights(STAYING.case, STAYING.dtype)),
}
