"""The CUDA backend on the emulator: every schedule and every build of it gives the same bits and
finds nothing, and the bytes that kernels move are those that the plan says.
"""

from __future__ import annotations

import functools
import itertools
import json

import pytest
import torch
from cases import CASES, LAYOUTS, NATIVE_LAYOUTS, Case, make_weights, make_x
from conftest import why_not
from emulated_run import LARGE, Device, counting, planned, run
from regimes import device
from tolerance import assert_as_good_as_eager

import cbam_cuda

pytestmark = pytest.mark.skipif(why_not("emulated") is not None, reason="make emulator builds it")


@pytest.fixture(scope="session")
def expected():
    """Digests of the plain build, blocks and threads in their order, for a GPU."""
    return functools.cache(lambda device: run("plain", "digests", device=device))


# Clusters and bulk copies; teams that come back for more samples; whole grids, with asynchronous
# copies and with none.
WHOLE, SLICE, OLDER, OLDEST = (
    Device("H100"),
    Device("H100", 2),
    Device("A100", 8),
    Device("T4", 8),
)


@pytest.mark.parametrize(
    ("kind", "schedule", "device"),
    [
        ("race", "descending", WHOLE),
        ("race", "random:3", SLICE),
        ("race", "random:5", OLDER),
        ("plain", "descending", OLDEST),
    ],
    ids=str,
)
def test_every_schedule_gives_the_same_bits_and_no_findings(expected, kind, schedule, device):
    assert run(kind, "digests", schedule=schedule, device=device) == expected(device)


def test_the_sanitizers_find_nothing(expected):
    """In float32: the build is several times as slow as the others."""
    found = run("asan", "digests", "float32", schedule="random:4", device=SLICE)
    assert found == {key: value for key, value in expected(SLICE).items() if "float32" in key}


def test_positions_are_those_of_the_cpu():
    """Which of several equals wins does not depend on how the work is cut."""
    for case in CASES:
        for layout in NATIVE_LAYOUTS:
            x = LAYOUTS[layout](make_x(case, torch.float32).mul(2).round())
            weights = make_weights(case, torch.float32)
            # Gates of 1/2, so that ties between pixels stay ties between channels.
            flat = weights._replace(
                fc2_weight=torch.zeros_like(weights.fc2_weight),
                fc2_bias=torch.zeros_like(weights.fc2_bias),
            )
            emulated = torch.ops.cbam_cuda_emulated.forward_train(x, *flat)
            cpu = torch.ops.cbam_cuda.forward_train(x, *flat)
            assert torch.equal(emulated[-2], cpu[-2]), (case, layout)
            assert torch.equal(emulated[-1], cpu[-1]), (case, layout)


GROUPED = Case("several groups of samples", (19, 12, 10, 10), 3, (5, 5))


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
def test_groups_of_samples(layout, emulator, strategy):
    """A device whose cache holds 8 of 19 samples walks them in three groups, the last one short."""
    x = LAYOUTS[layout](make_x(GROUPED, torch.float32))
    weights = make_weights(GROUPED, torch.float32)
    sample = x[0].numel() * 4
    strategy("streaming")
    # Slow memory, as on no real device, makes groups worth their launches.
    with device(emulator, "H100", l2=9 * sample * 5 // 2, bandwidth=1):
        emulator.emulator_reset_counts()
        out = cbam_cuda.cbam(x, *weights, backend="emulated")
        assert emulator.emulator_launches() == 3 * 5
    eager = cbam_cuda.cbam(x, *weights, backend="reference")
    wide = [w.double() for w in weights]
    truth = cbam_cuda.cbam(x.double(), *wide, backend="reference")
    assert_as_good_as_eager("out", out, eager, truth)


# Bytes, of a quarter of the channels that a ResNet-50 has; `make traffic` counts with all of them.
SHAPES = ((1, 64, 56, 56), (1, 128, 28, 28), (2, 256, 14, 14), (9, 512, 7, 7))
RUNS = tuple(itertools.product(("inference", "training", "backward"), ("streaming", "resident")))


def problems():
    return counting(SHAPES, "float32", RUNS) + counting(SHAPES[-1:], "float16", RUNS)


def describe(problem) -> str:
    shape = "x".join(map(str, problem["shape"]))
    words = (problem[name] for name in ("dtype", "layout", "direction", "strategy"))
    return " ".join((shape, *words))


@pytest.fixture(scope="session")
def counted():
    """What the race build counts for every problem."""
    listed = problems()
    counts = run("race", "bytes", json.dumps(listed))
    return {describe(p): c for p, c in zip(listed, counts, strict=True)}


@pytest.mark.parametrize("problem", problems(), ids=describe)
def test_bytes_are_those_of_the_plan(counted, problem):
    counts = dict(counted[describe(problem)])
    launches, resident = counts.pop("launches"), problem["strategy"] == "resident"
    shape, channels, hidden = problem["shape"], problem["shape"][1], problem["hidden"]
    element = 4 if problem["dtype"] == "float32" else 2
    x_bytes = torch.Size(shape).numel() * element
    backward = problem["direction"] == "backward"
    plan = planned(problem)
    held, traffic = plan["passes"].get("resident", {}), plan["traffic"]
    if backward:
        x_read = 1 if held.get("x") == "stays" else 2
        assert [counts[name] for name in ("x", "dout", "dx")] == [
            [x_read * x_bytes, 0],
            [(1 if resident else 2) * x_bytes, 0],
            [0, x_bytes],
        ]
    else:
        assert counts["x"] == [(1 if resident else 3) * x_bytes, 0]
        assert counts["out"] == [0, x_bytes]
    assert launches == len(plan["stages"]) + plan["summing_launches"]
    assert not resident or len(plan["stages"]) == 1
    small = [c for name, c in counts.items() if name not in (*LARGE, "mlp_weights")]
    assert counts["mlp_weights"] == [traffic["weights_read"], 0]
    assert sum(read for read, _ in small) == traffic["small_read"] + traffic["sums_read"]
    written = traffic["small_written"] + traffic["sums_written"]
    assert sum(written for _, written in small) == written

    biases = 0 if backward else channels + hidden
    one_walk = (2 * hidden * channels + biases) * element
    # Teams of a batch as small as this hold a sample each, so that there is work for more blocks.
    assert resident or counts["mlp_weights"][0] <= -(-shape[0] // 8) * one_walk


RESNET = ((256, 256, 56, 56), (256, 512, 28, 28), (256, 1024, 14, 14))
LARGE_BATCHES = counting(RESNET, "float32", RUNS)


@pytest.mark.parametrize("problem", LARGE_BATCHES, ids=describe)
def test_all_but_x_is_little_where_the_batch_fills_the_device(problem):
    """By the plan, whose bytes are those that are counted. In float32, from 256 channels on."""
    plan = planned(problem)
    if plan["passes"].get("resident", {}).get("kind") == "grid":
        pytest.skip("blocks that are no cluster tell each other everything through memory")
    traffic = plan["traffic"]
    share = (traffic["small_read"] + traffic["small_written"]) / traffic["out_written"]
    assert share < 0.10, share
