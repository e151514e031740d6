"""The CUDA backend on the emulator: every schedule and every build of it gives the same bits and
finds nothing, and the bytes that kernels move are those that the plan says.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from math import prod

import pytest
import torch
from cases import CASES, LAYOUTS, NATIVE_LAYOUTS, Case, make_weights, make_x
from conftest import why_not
from emulated_run import LARGE, Device, counting, planned, run
from regimes import device, plan_of
from tolerance import assert_as_good_as_eager

import cbam_cuda
from cbam_cuda.plan import plan

pytestmark = pytest.mark.skipif(why_not("emulated") is not None, reason="make emulator builds it")


# Clusters and bulk copies; teams that come back for more samples; whole grids, with asynchronous
# copies and with none.
WHOLE, SLICE, OLDER, OLDEST = (
    Device("H100"),
    Device("H100", 2),
    Device("A100", 8),
    Device("T4", 8),
)


@pytest.fixture(scope="session")
def expected():
    """Digests of the plain build, blocks and threads in their order, for a GPU."""
    return functools.cache(lambda what, device: run("plain", what, device=device))


@pytest.mark.parametrize(
    ("kind", "schedule", "what", "device"),
    [
        ("race", "descending", "steps", WHOLE),
        ("race", "random:3", "steps", SLICE),
        ("race", "random:5", "steps", OLDER),
        ("race", "random:6", "others", OLDER),
        ("plain", "descending", "steps", OLDEST),
        # In float32, which is all that this build has: it is several times as slow as the others.
        ("asan", "random:4", "others", SLICE),
    ],
    ids=str,
)
def test_every_schedule_gives_the_same_bits_and_no_findings(expected, kind, schedule, what, device):
    assert run(kind, what, schedule=schedule, device=device) == expected(what, device)


def test_the_sanitizers_find_nothing_in_a_step(expected):
    found = run("asan", "steps", "float32", schedule="random:4", device=SLICE)
    of_both = expected("steps", SLICE)
    assert found == {key: value for key, value in of_both.items() if "float32" in key}


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
GROUPED_LARGER = dataclasses.replace(GROUPED, name="the same, of a larger MLP", hidden=40)


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize(("case", "launches"), [(GROUPED, 4), (GROUPED_LARGER, 5)], ids=str)
def test_groups_of_samples(case, launches, layout, emulator, strategy):
    """A device whose cache holds 8 of 19 samples walks them in three groups, the last one short."""
    x = LAYOUTS[layout](make_x(case, torch.float32))
    weights = make_weights(case, torch.float32)
    sample = x[0].numel() * 4
    strategy("streaming")
    # Slow memory, as on no real device, makes groups worth their launches.
    residual = LAYOUTS[layout](make_x(case, torch.float32, seed=3))
    with device(emulator, "H100", l2=9 * sample * 5 // 2, bandwidth=1):
        emulator.emulator_reset_counts()
        out = cbam_cuda.cbam(x, *weights, residual=residual, backend="emulated")
        assert emulator.emulator_launches() == 3 * launches
    eager = cbam_cuda.cbam(x, *weights, residual=residual, backend="reference")
    wide = [w.double() for w in weights]
    more = {"residual": residual.double(), "backend": "reference"}
    truth = cbam_cuda.cbam(x.double(), *wide, **more)
    assert_as_good_as_eager("out", out, eager, truth)


# More channels, and units, than a chunk, products in large tiles; and both layers in one launch.
WALKED = (
    Case("walks over the weights", (11, 1100, 3, 3), 133, (3, 3)),
    Case("walks over few weights", (11, 300, 3, 3), 24, (3, 3)),
)


@pytest.mark.parametrize("case", WALKED, ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 16, 132])
def test_walks_over_the_weights(multiprocessors, case, emulator, strategy):
    """Devices of any size cut the MLP in their own ways, and find the same but for roundings."""
    x, grad = (make_x(case, torch.float64, seed=seed) for seed in (1, 2))
    given = (x, *make_weights(case, torch.float64))
    strategy("streaming")
    found = []
    for backend in (torch.ops.cbam_cuda, torch.ops.cbam_cuda_emulated):
        with device(emulator, "H100", multiprocessors):
            forward = backend.forward_train(*given)
            arguments = (grad, *forward[1:3], *given, *forward[1:], [True] * 7)
            found.append((*forward, *backend.backward(*arguments)))
    for cpu, emulated in zip(*found, strict=True):
        torch.testing.assert_close(emulated, cpu, rtol=1e-11, atol=1e-12)


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
    found = planned(problem)
    held, traffic = found["passes"].get("resident", {}), found["traffic"]
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
    assert launches == len(found["stages"]) + found["summing_launches"]
    assert not resident or len(found["stages"]) == 1
    small = [c for name, c in counts.items() if name not in (*LARGE, "mlp_weights")]
    assert counts["mlp_weights"] == [traffic["weights_read"], 0]
    assert sum(read for read, _ in small) == traffic["small_read"] + traffic["sums_read"]
    written = traffic["small_written"] + traffic["sums_written"]
    assert sum(written for _, written in small) == written

    biases = 0 if backward else channels + hidden
    one_walk = (2 * hidden * channels + biases) * element
    # Teams of a batch as small as this hold a sample each, so that there is work for more blocks.
    # Streaming ones may walk over the weights for two samples at a time.
    assert resident or counts["mlp_weights"][0] <= -(-shape[0] // 2) * one_walk


PIXELS = "resident-pixels:grid"


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("direction", ["inference", "training", "backward"])
def test_bytes_where_blocks_of_a_grid_hold_pixels(direction, layout):
    """Unequal shares of them; two visits of some teams."""
    shape, sliced = (3, 64, 44, 44), Device("T4", 29)
    asked = {name: name == direction for name in ("training", "backward")}
    last = layout == "channels_last"
    found = plan(
        shape, "float32", "T4", multiprocessors=29, channels_last=last, strategy=PIXELS, **asked
    )
    held = found["passes"]["resident"]
    assert held["teams"] < 3
    assert held["team"] * held["pixels"] > 44 * 44
    listed = counting([shape], "float32", [(direction, PIXELS)])
    (problem,) = (problem for problem in listed if problem["layout"] == layout)
    (counts,) = run("race", "bytes", json.dumps([problem]), device=sliced)
    small = [c for name, c in counts.items() if name not in (*LARGE, "mlp_weights", "launches")]
    traffic = found["traffic"]
    assert [sum(column) for column in zip(*small, strict=True)] == [
        traffic["small_read"] + traffic["sums_read"],
        traffic["small_written"] + traffic["sums_written"],
    ]
    assert counts["mlp_weights"] == [traffic["weights_read"], 0]


# Batches of which a visit has 8 samples on an H100, the last one fewer.
@pytest.mark.parametrize(
    ("batch", "direction", "layout"),
    [(23, "training", "channels_last"), (23, "backward", "contiguous")],
)
def test_weights_are_read_once_for_eight_samples_of_7x7(batch, direction, layout):
    """Counted with all channels that a ResNet-50 has there."""
    listed = counting([(batch, 2048, 7, 7)], "float32", [(direction, "resident:grid:0:0:8")])
    (problem,) = (p for p in listed if p["layout"] == layout)
    (counts,) = run("race", "bytes", json.dumps([problem]))
    held = planned(problem)["passes"]["resident"]
    assert held["samples"] == 8
    visits = -(-batch // 8)
    # By every block that adds the sums of a hidden unit, and once for every gate.
    adding = 1 if held["shares_units"] else held["team"]
    biases = visits * 8 * 128 * adding + batch * 2048 if direction == "training" else 0
    assert counts["mlp_weights"] == [4 * (visits * 2 * 128 * 2048 + biases), 0]


@pytest.mark.parametrize("direction", ["inference", "training", "backward"])
def test_weights_that_stay_are_read_once_by_a_team(direction):
    """However many samples it visits; biases are read in every visit."""
    case, sliced = Case("", (7, 32, 14, 14), 2, (7, 7)), Device("H100", 2)
    listed = counting([case.shape], "float32", [(direction, "resident")])
    asked = {"training": direction == "training", "backward": direction == "backward"}
    found = plan_of(case, torch.float32, "contiguous", sliced.name, sliced.multiprocessors, **asked)
    held, weights = found["passes"]["resident"], 2 * 32 * 2
    assert held["holds_weights"]
    assert held["teams"] < 7
    biases = 0 if direction == "backward" else 7 * (2 * held["team"] + 32)
    assert found["traffic"]["weights_read"] == 4 * (held["teams"] * weights + biases)
    for counts in run("race", "bytes", json.dumps(listed), device=sliced):
        assert counts["mlp_weights"] == [found["traffic"]["weights_read"], 0]


def test_parts_read_as_often_as_the_whole():
    """x thrice forwards and twice backwards, its gradient twice; and not what nobody needs."""
    listed = counting([(2, 256, 14, 14)], "float32", [("by parts", "streaming")])
    size = 4 * 2 * 256 * 14 * 14
    for counts in run("race", "bytes", json.dumps(listed)):
        assert {name: counts[name] for name in LARGE if name in counts} == {
            "x": [5 * size, 0],
            "dout": [2 * size, 0],
            "out": [0, size],
            "dx": [0, size],
        }


def test_a_residual_is_read_once():
    runs = [("with a residual", "streaming"), ("with a residual", "resident")]
    listed = counting([(2, 256, 14, 14), (2, 512, 7, 7)], "float16", runs)
    assert len(listed) == 8
    for problem, counts in zip(listed, run("race", "bytes", json.dumps(listed)), strict=True):
        size = 2 * prod(problem["shape"])
        assert {name: counts[name] for name in LARGE if name in counts} == {
            "x": [(3 if problem["strategy"] == "streaming" else 1) * size, 0],
            "residual": [size, 0],
            "out": [0, size],
        }
        found = planned(problem)
        assert found["traffic"]["residual_read"] == size
        assert found["device_memory_bytes"] >= 3 * size


RESNET = ((256, 256, 56, 56), (256, 512, 28, 28), (256, 1024, 14, 14), (256, 2048, 7, 7))
LARGE_BATCHES = counting(RESNET, "float32", RUNS)

# What is no pass over x is less than this share of it, but for what follows.
LITTLE = 0.10
# Of a channel of 7x7, x has 49 words. Each launch needs some from the one before; several blocks
# need the same ones. And blocks that are no cluster tell each other everything through memory, at
# most from the cache; an H100 is the faster for it, by up to a quarter of a forward. By pixels,
# direction, and strategy or kind of team; behind it what least_words gives, of the largest teams.
NOT_LITTLE = {
    (49, "inference", "streaming"): 0.33,  # 0.150
    (49, "training", "streaming"): 0.36,  # 0.172
    (49, "backward", "streaming"): 0.40,  # 0.280
    (196, "backward", "streaming"): 0.11,  # 0.083
    (3136, "backward", "streaming"): 0.12,  # 0.063
    (49, "inference", "grid"): 0.36,  # 0.284
    (49, "training", "grid"): 0.51,  # 0.284
    (49, "backward", "grid"): 0.24,  # 0.132
    (196, "inference", "grid"): 0.13,  # 0.053
    (196, "training", "grid"): 0.19,  # 0.053
    (196, "backward", "grid"): 0.13,  # 0.081
    (784, "inference", "grid"): 0.35,  # 0.154
    (784, "training", "grid"): 0.50,  # 0.154
    (784, "backward", "grid"): 0.33,  # 0.212
    (3136, "inference", "grid"): 0.51,  # 0.318
    (3136, "training", "grid"): 0.74,  # 0.318
    (3136, "backward", "grid"): 0.14,  # 0.111
}


def least_words(shape, hidden: int, direction: str, held: dict) -> int:
    """Of a sample, where every small value that one step needs of another one's is written once and
    read once by each launch, or by each block of a grid's team, that needs it.
    """
    channels, pixels, team = shape[1], prod(shape[2:]), held.get("team", 0)
    if team and held["split"] == "pixels":
        # Backwards. All blocks put out their shares of the sums of hidden units and of channels, of
        # which one adds up a channel's; all read all sums of units with both saved values, and of
        # a channel its gate, its position and both gradients of the pool, which one puts out. Of a
        # pixel one block puts out dz, and it is staged beside its gate, both maps and position.
        of_channels = channels * (6 * team + 2)
        return of_channels + hidden * team * (team + 3) + 6 * pixels
    if team and direction != "backward":
        # Each block puts out its share of the sums of hidden units and of both maps; one of them
        # reads those, and puts out what it makes of them, which all read: a unit's value, a pixel's
        # gate.
        return 4 * team * (hidden + pixels) + (team + 1) * (hidden + pixels)
    if team:
        # Backwards. The same of the sums of units, of which two values are made, and of pixels, of
        # which four are.
        put_out = 2 * team * (hidden + pixels) + 2 * hidden + 4 * pixels
        return put_out + team * (2 * hidden + 4 * pixels) + 3 * channels + 4 * pixels
    if direction == "backward":
        # Of a channel: its gate thrice, sums of dout * x, terms, dm, both gradients of the pool
        # and the position. Of a pixel: its gate thrice, sums, maps, their gradients with two
        # readers, the position twice. Of a unit: both values, both gradients.
        return 13 * channels + 15 * pixels + 6 * hidden
    # Mean and maximum of a channel, its gate with two readers; of a pixel both maps; of a unit both
    # values. In training what is kept beside them.
    kept = channels + 4 * pixels if direction == "training" else 0
    return 7 * channels + 4 * pixels + 4 * hidden + kept


@pytest.mark.parametrize("problem", LARGE_BATCHES, ids=describe)
def test_all_but_x_is_little_where_the_batch_fills_the_device(problem):
    """By the plan, whose bytes are those that are counted. In float32, from 256 channels on."""
    found, (shape, direction) = planned(problem), (problem["shape"], problem["direction"])
    held, traffic = found["passes"].get("resident", {}), found["traffic"]
    share = (traffic["small_read"] + traffic["small_written"]) / traffic["out_written"]
    kind = held.get("kind", "streaming")
    assert share < NOT_LITTLE.get((prod(shape[2:]), direction, kind), LITTLE), share
    if kind != "cluster":
        least = least_words(shape, problem["hidden"], direction, held) / prod(shape[1:])
        assert least <= share
