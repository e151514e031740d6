"""What resident teams bring to the cache ahead of a visit: all it will read, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from cases import LAYOUTS, NATIVE_LAYOUTS, Case, make_weights, make_x, operators
from conftest import why_not
from emulated_run import Device
from emulated_run import run as run_apart
from regimes import device

from cbam_cuda.plan import plan

pytestmark = pytest.mark.skipif(why_not("emulated") is not None, reason="make emulator builds it")

MULTIPROCESSORS = 8
UNEVEN = Case("blocks with unequal shares", (5, 72, 20, 20), 4, (7, 7))
SEVERAL = Case("visits of several samples", (11, 64, 7, 7), 8, (7, 7))
TWICE = Case("x of a backward is read twice", (3, 64, 56, 56), 4, (7, 7))
WAYS = [
    (UNEVEN, "resident-channels:cluster:4:1:1"),
    (UNEVEN, "resident-channels:grid:5:1:1"),
    (UNEVEN, "resident-pixels:cluster:4:1:1"),
    (UNEVEN, "resident-pixels:grid:3:1:1"),
    (SEVERAL, "resident-channels:cluster:4:1:2"),
    (SEVERAL, "resident-channels:grid:3:1:2"),
    (TWICE, "resident-channels:cluster:4:1:1"),
]


def held(case: Case, layout: str, backward: bool, way: str) -> dict:
    found = plan(
        case.shape,
        "float16",
        hidden=case.hidden,
        channels_last=layout == "channels_last",
        backward=backward,
        strategy=f"{way}:ahead",
        multiprocessors=MULTIPROCESSORS,
    )
    return found["passes"]["resident"]


@pytest.mark.parametrize(("case", "way"), WAYS, ids=str)
@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
def test_what_comes_next_is_brought_ahead(layout, case, way, emulator, strategy):
    x, grad = (LAYOUTS[layout](make_x(case, torch.float16, seed=seed)) for seed in (0, 2))
    weights = make_weights(case, torch.float16)
    run = operators("emulated")

    def call(backward: bool, name: str, saved=()):
        strategy(name)
        emulator.emulator_reset_counts()
        with device(emulator, "H100", MULTIPROCESSORS):
            if backward:
                # The gradient of x alone: no launch follows.
                return run.backward(grad, None, None, x, *weights, *saved, [True] + [False] * 6)
            return run.forward_train(x, *weights)

    _, *saved = call(False, way)
    for backward in (False, True):
        plain = call(backward, way, saved)
        assert emulator.emulator_prefetched_bytes() == 0
        ahead = call(backward, f"{way}:ahead", saved)
        assert all(torch.equal(*both) for both in zip(plain, ahead, strict=True))
        geometry = held(case, layout, backward, way)
        visited = geometry["teams"] * geometry["samples"]
        assert visited < len(x)
        stays = not backward or geometry["x"] == "stays"
        assert stays != (case is TWICE and backward)
        expected = [x[visited:]] * stays + [grad[visited:]] * backward
        for part in expected:
            assert emulator.emulator_prefetched(part.data_ptr(), part.nbytes) == part.nbytes
        assert emulator.emulator_prefetched_bytes() == sum(part.nbytes for part in expected)


def test_nothing_beyond_the_tensors_is_asked_for():
    """By the race build, which knows where they end, and counts the same bytes as without."""
    problems = [
        {
            "shape": case.shape,
            "hidden": case.hidden,
            "dtype": "float16",
            "layout": layout,
            "direction": direction,
            "strategy": f"resident-channels:cluster:4:1:{samples}{ahead}",
        }
        for case, samples in ((UNEVEN, 1), (SEVERAL, 2))
        for layout in NATIVE_LAYOUTS
        for direction in ("inference", "backward")
        for ahead in ("", ":ahead")
    ]
    counted = run_apart(
        "race", "bytes", json.dumps(problems), device=Device("H100", MULTIPROCESSORS)
    )
    assert counted[::2] == counted[1::2]
