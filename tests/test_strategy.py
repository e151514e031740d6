"""Strategies by name, and the ways to hold samples that they ask for."""

from __future__ import annotations

import itertools

import pytest
from test_plan_resident import RESNET

from cbam_cuda.plan import plan

SHAPE = [64, *RESNET[1]]


@pytest.mark.parametrize(
    "name",
    [
        "fast",
        "resident-",
        "resident:",
        "resident:blocks",
        "streaming:grid",
        "auto:cluster:8",
        "resident:grid:x",
        "resident:grid:-1",
        "resident:grid:10000",
        "resident:grid:8:3",
        "resident:grid:8:1:3",
        "resident:grid:8:1:16",
        "resident:grid:8:1:1:1",
        "resident:ahead",
        "streaming:ahead",
        "resident:grid:ahead:8",
    ],
)
def test_a_strategy_that_is_unknown(name):
    with pytest.raises(ValueError, match=f"expected auto, streaming or resident, .*, got {name}$"):
        plan(SHAPE, strategy=name)


@pytest.mark.parametrize(
    ("name", "team", "threads", "samples"),
    [
        ("resident-channels:cluster:4:1:1", 4, 512, 1),
        ("resident-channels:grid:8:2:1", 8, 256, 1),
        ("resident-channels:grid:16:0:2", 16, 256, 2),
        ("resident-pixels:cluster", 4, 512, 1),
        ("resident-pixels:cluster:ahead", 4, 512, 1),
        ("resident-channels:grid:8:2:1:ahead", 8, 256, 1),
    ],
)
def test_how_samples_are_held_can_be_asked_for(name, team, threads, samples):
    held = plan(SHAPE, "float16", strategy=name)["passes"]["resident"]
    assert held["fetches_ahead"] == name.endswith("ahead")
    assert name.startswith(f"resident-{held['split']}:{held['kind']}")
    assert (held["team"], held["threads"], held["samples"]) == (team, threads, samples)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("resident:cluster:2", "H100"),  # too few blocks
        ("resident:cluster:3", "H100"),
        ("resident:cluster", "A100"),
        ("resident:grid:ahead", "A100"),  # which cannot
        ("resident-pixels:grid:0:0:8", "H100"),
    ],
)
def test_a_way_that_is_not_possible(name, device):
    with pytest.raises(ValueError, match="got resident: samples cannot be held in the way that is"):
        plan(SHAPE, "float16", device, strategy=name)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", RESNET[:2], ids=str)
def test_what_blocks_hold_can_be_asked_for(shape, backward):
    found = {
        split: plan([8, *shape], "float16", backward=backward, strategy=f"resident-{split}")
        for split in ("channels", "pixels")
    }
    assert all(f["passes"]["resident"]["split"] == split for split, f in found.items())
    best = plan([8, *shape], "float16", backward=backward, strategy="resident")
    assert best in found.values()
    assert best["predicted_seconds"] == min(f["predicted_seconds"] for f in found.values())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("device", ["H100", "A100"])
def test_no_way_is_predicted_to_be_faster_than_the_plans(device, backward):
    for batch, shape in itertools.product((1, 32, 256), RESNET):
        what = {"dtype": "float16", "device": device, "backward": backward}
        least = plan([batch, *shape], **what, strategy="resident")["predicted_seconds"]
        for split, kind, blocks in itertools.product(
            ("channels", "pixels"), ("cluster", "grid"), "12"
        ):
            try:
                name = f"resident-{split}:{kind}:0:{blocks}:1"
                found = plan([batch, *shape], **what, strategy=name)
            except ValueError:
                continue
            held = found["passes"]["resident"]
            if held["kind"] == "cluster" and held["team"] == 16 and blocks == "2":
                continue  # of which the planner takes none by itself
            assert found["predicted_seconds"] >= least * (1 - 1e-9), (batch, shape, name)
