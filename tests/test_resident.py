"""The resident forward on the emulator: every way to hold samples on the chip gives what streaming
gives, in one launch. That it reads x once, and gives the same bits in every schedule, is shown in
test_emulated.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import CASES, LAYOUTS, NATIVE_LAYOUTS, Case, make_weights, make_x, operators
from conftest import why_not
from regimes import (
    CHANNELS_LAST,
    HELD,
    IN_EITHER_DIRECTION,
    NOT_POSSIBLE,
    SPLITS,
    STAYING,
    WEIGHTS_THAT_STAY,
    Regime,
    device,
    plan_of,
)
from tolerance import assert_as_good_as_eager, assert_strategies_agree

import cbam_cuda

pytestmark = pytest.mark.skipif(why_not("emulated") is not None, reason="make emulator builds it")

NAMES = (
    "out",
    "channel_gate",
    "spatial_gate",
    "pooled",
    "hidden",
    "maps",
    "pixel_argmax",
    "channel_argmax",
)


def assert_agree(resident, streaming, dtype) -> None:
    """What both strategies leave."""
    for name, *both in zip(NAMES, resident, streaming, strict=True):
        rounded_to = dtype if name in ("out", "maps") else torch.float32
        assert_strategies_agree(name, *both, rounded_to)


def assert_is_right(case: Case, dtype, layout: str, strategy, name: str = "resident") -> None:
    """Both forms of the forward, against streaming and against the reference in float64."""
    run = operators("emulated")
    x, weights = LAYOUTS[layout](make_x(case, dtype)), make_weights(case, dtype)
    strategy("streaming")
    streaming = run.forward_train(x, *weights)
    strategy(name)
    resident = run.forward_train(x, *weights)
    assert_agree(resident, streaming, dtype)
    eager = cbam_cuda.cbam(x, *weights, backend="reference")
    wide = [w.double() for w in weights]
    truth = cbam_cuda.cbam(x.double(), *wide, backend="reference")
    for out in (resident[0], run.forward(x, *weights)):
        assert out.stride() == x.stride()
        assert_as_good_as_eager("out", out, eager, truth)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("dtype", HELD, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_streaming(case, dtype, layout, split, strategy):
    try:
        plan_of(case, dtype, layout, strategy=split, training=True)
    except ValueError as error:
        strategy(split)
        x, weights = LAYOUTS[layout](make_x(case, dtype)), make_weights(case, dtype)
        with pytest.raises(ValueError, match=NOT_POSSIBLE):
            operators("emulated").forward(x, *weights)
        pytest.skip(str(error))
    assert_is_right(case, dtype, layout, strategy, split)


REGIMES = (
    *IN_EITHER_DIRECTION,
    Regime(
        "rows long enough for bulk copies",
        (5, 512, 8, 8),
        4,
        multiprocessors=1,
        layout=CHANNELS_LAST,
        plan={"team": 1, "copy": "bulk"},
    ),
    Regime(
        "a cluster of 16",
        (2, 256, 56, 56),
        16,
        plan={"team": 16},
        strategy="resident-channels:cluster:16",
    ),
    Regime(
        "several samples on the whole grid",
        (19, 512, 7, 7),
        128,
        "A100",
        8,
        plan={"kind": "grid", "samples": 8, "rounds": 2, "holds_weights": False},
    ),
    Regime("many visits of each team", (23, 32, 8, 8), 2, multiprocessors=4, plan={"rounds": 3}),
    Regime(
        "maps in bands",
        (1, 48, 106, 106),
        16,
        multiprocessors=16,
        plan={"bands": 2},
        strategy="resident-channels:cluster:8",
    ),
    Regime(
        "bands, channels last",
        (8, 128, 52, 52),
        16,
        "H100",
        8,
        CHANNELS_LAST,
        plan={"bands": 2, "rounds": 4, "copy": "async"},
        strategy="resident-channels:cluster:8",
    ),
    Regime(
        "a short last band",
        (2, 64, 74, 74),
        16,
        multiprocessors=8,
        plan={"bands": 2, "a short last band": True},
        strategy="resident-channels:cluster:4",
    ),
    Regime(
        "a short last chunk",
        (1, 16, 19, 19),
        3,
        multiprocessors=2,
        layout=CHANNELS_LAST,
        plan={"a short last chunk": True, "chunk": 91, "groups": 32},
    ),
    Regime(
        "several samples of a visit",
        (33, 512, 7, 7),
        128,
        multiprocessors=8,
        plan={"samples": 8, "rounds": 3, "holds_weights": True},
        strategy="resident-channels:cluster:4",
    ),
    Regime(
        "the same, channels last",
        (21, 512, 7, 7),
        128,
        "H100",
        8,
        CHANNELS_LAST,
        plan={"samples": 8, "rounds": 2},
    ),
    Regime(
        "several boxes a block",
        (1, 256, 56, 56),
        16,
        "T4",
        32,
        plan={"several boxes": True},
        strategy="resident-channels",
    ),
    Regime(
        "asynchronous copies, the whole grid",
        (5, 128, 14, 14),
        8,
        "A100",
        plan={"kind": "grid", "copy": "async"},
    ),
    Regime(
        "the same, channels last",
        (7, 128, 14, 14),
        8,
        "A100",
        8,
        CHANNELS_LAST,
        plan={"kind": "grid", "copy": "async"},
    ),
    Regime(
        "copies through registers",
        (9, 128, 14, 14),
        8,
        "T4",
        8,
        plan={"kind": "grid", "copy": "plain", "rounds": 2},
    ),
    Regime(
        "the same, channels last",
        (5, 128, 14, 14),
        8,
        "T4",
        8,
        CHANNELS_LAST,
        dtype=torch.float32,
        plan={"copy": "plain"},
    ),
    Regime(
        "pixels of a cluster",
        (3, 64, 56, 56),
        8,
        "H100",
        4,
        CHANNELS_LAST,
        torch.float32,
        plan={"split": "pixels", "kind": "cluster", "copy": "bulk", "rounds": 3},
        strategy="resident-pixels",
    ),
    Regime(
        "pixels of a cluster, in short pieces",
        (3, 128, 28, 28),
        8,
        multiprocessors=2,
        plan={"split": "pixels", "copy": "async", "threads": 256, "rounds": 2},
        strategy="resident-pixels",
    ),
    Regime(
        "more blocks than channels",
        (2, 8, 100, 100),
        2,
        dtype=torch.float32,
        plan={"split": "pixels", "blocks without channels": True, "copy": "bulk", "uneven": True},
    ),
    Regime(
        "unequal pixels of the whole grid, through registers",
        (2, 104, 52, 52),
        13,
        "T4",
        16,
        plan={"split": "pixels", "kind": "grid", "copy": "plain", "uneven": True, "rounds": 2},
        strategy="resident-pixels",
    ),
    Regime(
        "unequal pixels of the whole grid, channels last",
        (5, 64, 56, 56),
        8,
        "A100",
        13,
        CHANNELS_LAST,
        plan={"split": "pixels", "kind": "grid", "uneven": True, "a short last chunk": True},
    ),
    Regime(
        "pixels of a volume",
        (2, 16, 8, 12, 16),
        2,
        "T4",
        8,
        CHANNELS_LAST,
        torch.float32,
        plan={"split": "pixels", "team": 4},
    ),
    Regime(
        "pixels of a sequence",
        (1, 40, 4096),
        5,
        "RTX 5090",
        16,
        dtype=torch.float32,
        plan={"split": "pixels", "team": 8},
        strategy="resident-pixels:cluster:8",
    ),
)


@pytest.mark.parametrize("regime", REGIMES, ids=str)
def test_every_regime(regime, emulator, strategy):
    assert regime.facts(training=True) == regime.plan
    with device(emulator, regime.gpu, regime.multiprocessors):
        assert_is_right(regime.case, regime.dtype, regime.layout, strategy, regime.strategy)


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("weights", WEIGHTS_THAT_STAY, ids=str)
def test_weights_that_stay(weights, layout, emulator, strategy):
    """On their way to the chip: of another type than x, and at any address."""
    assert dataclasses.replace(STAYING, layout=layout).facts() == STAYING.plan
    x, run = LAYOUTS[layout](make_x(STAYING.case, STAYING.dtype)), operators("emulated")
    with device(emulator, STAYING.gpu, STAYING.multiprocessors):
        found = []
        for name in ("resident", "streaming"):
            strategy(name)
            found.append(run.forward_train(x, *WEIGHTS_THAT_STAY[weights]))
    assert_agree(*found, x.dtype)


LARGE_KERNEL = Case("large kernel", (2, 32, 24, 40), 2, (41, 41))


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
def test_a_large_kernel(layout, strategy):
    assert_is_right(LARGE_KERNEL, torch.float32, layout, strategy)


def test_one_launch(emulator, strategy):
    case = CASES[2]
    x, weights = make_x(case, torch.float32), make_weights(case, torch.float32)
    strategy("resident")
    for run in (operators("emulated").forward, operators("emulated").forward_train):
        emulator.emulator_reset_counts()
        run(x, *weights)
        assert emulator.emulator_launches() == 1


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
def test_a_nan_in_any_block_of_a_team(layout, split, emulator, strategy):
    """It makes its own sample NaN and touches no other, whichever block of the team holds it."""
    case, run = Case("NaN", (3, 64, 16, 16), 4, (7, 7)), operators("emulated")
    weights = make_weights(case, torch.float32)
    for channel, row in ((0, 0), (17, 5), (63, 15)):
        x = LAYOUTS[layout](make_x(case, torch.float32))
        x[1, channel, row, 3] = torch.nan
        strategy("streaming")
        streaming = run.forward_train(x, *weights)
        strategy(split)
        with device(emulator, "H100", 16):
            assert_agree(run.forward_train(x, *weights), streaming, torch.float32)
            out = run.forward(x, *weights)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
def test_ties_between_blocks_of_a_team(layout, split, emulator, strategy):
    """The first of equals, across channels of different blocks, and where all is minus infinity."""
    case, run = Case("ties", (2, 64, 16, 16), 4, (7, 7)), operators("emulated")
    weights = make_weights(case, torch.float32)
    flat = weights._replace(
        fc2_weight=torch.zeros_like(weights.fc2_weight), fc2_bias=torch.zeros_like(weights.fc2_bias)
    )
    for x in (torch.ones(case.shape), make_x(case, torch.float32).round().relu()):
        x = LAYOUTS[layout](x)
        strategy(split)
        with device(emulator, "H100", 16):
            resident = run.forward_train(x, *flat)
        cpu = torch.ops.cbam_cuda.forward_train(x, *flat)
        assert torch.equal(resident[-2], cpu[-2])
        assert torch.equal(resident[-1], cpu[-1])
