"""What resident teams bring to the cache ahead of a visit: all it will read, and nothing else."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, NATIVE_LAYOUTS, Case, make_weights, make_x, operators
from conftest import why_not
from regimes import SPLITS, device

from cbam_cuda.plan import plan

pytestmark = pytest.mark.skipif(why_not("emulated") is not None, reason="make emulator builds it")

# Blocks of a team have unequal shares of it, and a sample's last chunk has fewer rows.
CASE = Case("ahead", (5, 72, 20, 20), 4, (7, 7))
MULTIPROCESSORS = 8
WAYS = [f"{split}:{team}" for split in SPLITS for team in ("cluster:4:1", "grid:3:1")]


def held(layout: str, backward: bool, way: str) -> dict:
    found = plan(
        CASE.shape,
        "float16",
        hidden=CASE.hidden,
        channels_last=layout == "channels_last",
        backward=backward,
        strategy=way,
        multiprocessors=MULTIPROCESSORS,
    )
    return found["passes"]["resident"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
def test_what_comes_next_is_brought_ahead(layout, way, emulator, strategy):
    x, grad = (LAYOUTS[layout](make_x(CASE, torch.float16, seed=seed)) for seed in (0, 2))
    weights = make_weights(CASE, torch.float16)
    run = operators("emulated")

    def brought(tensor: torch.Tensor, visited: int) -> list[int]:
        """Bytes of the first samples, and of those behind them."""
        return [
            emulator.emulator_prefetched(part.data_ptr(), part.nbytes)
            for part in (tensor[:visited], tensor[visited:])
        ]

    def expected(tensor: torch.Tensor, visited: int) -> list[int]:
        return [0, tensor[visited:].nbytes]

    def call(backward: bool, name: str, saved=()):
        strategy(name)
        with device(emulator, "H100", MULTIPROCESSORS):
            if backward:
                # The gradient of x alone: no launch follows.
                return run.backward(grad, None, None, x, *weights, *saved, [True] + [False] * 6)
            return run.forward_train(x, *weights)

    _, *saved = call(False, way)
    for backward in (False, True):
        plain = call(backward, way, saved)
        assert brought(x, 0) == brought(grad, 0) == [0, 0]
        ahead = call(backward, f"{way}:ahead", saved)
        assert all(torch.equal(*both) for both in zip(plain, ahead, strict=True))
        plan_of = held(layout, backward, f"{way}:ahead")
        visited = plan_of["teams"] * plan_of["samples"]
        assert visited < len(x)
        stays = not backward or plan_of["x"] == "stays"
        assert brought(x, visited) == (expected(x, visited) if stays else [0, 0])
        assert brought(grad, visited) == (expected(grad, visited) if backward else [0, 0])
