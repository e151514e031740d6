"""Plans of the CUDA backend, for GPUs that are not here: limits kept, nothing left out, bytes."""

from __future__ import annotations

import random
from math import gcd, prod

import pytest

from cbam_cuda import ops
from cbam_cuda.__main__ import main
from cbam_cuda.plan import known_devices, plan, render

BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
DEVICES = ("T4", "A100", "RTX 3090", "RTX 4090", "H100", "H200", "B200", "RTX 5090")


def drawn(rng: random.Random) -> dict:
    """A problem of any size: small, odd, long, deep."""
    dim = rng.choice([1, 2, 2, 2, 3])
    space = [rng.choice([1, 2, 3, 7, 8, 14, 17, 28, 32, 56, 57, 100, 224]) for _ in range(dim)]
    if dim == 1 and rng.random() < 0.3:
        space = [rng.choice([5000, 20001, 10**6])]
    if dim == 3:
        space = [min(s, 56) for s in space]
    return {
        "shape": [rng.choice([1, 2, 3, 8, 9, 32, 256]), rng.choice(CHANNELS), *space],
        "hidden": rng.choice([1, 3, 4, 16, 33, 128, 300]),
        "kernel": [rng.choice([1, 3, 5, 7, 7, 7, 11]) for _ in range(dim)],
        "dtype": rng.choice(list(BYTES)),
        "channels_last": rng.random() < 0.5,
        "training": rng.random() < 0.5,
        "aligned": rng.random() < 0.8,
    }


CHANNELS = [1, 2, 3, 5, 8, 20, 48, 64, 100, 256, 257, 512, 1000, 1024, 2048, 5000]


def covers(parts: int, size: int, whole: int) -> bool:
    """Whether `parts` pieces of `size` are just enough for `whole`."""
    return parts * size >= whole > (parts - 1) * size


def check_reduction(g: dict, problem: dict, rows: int, cols: int) -> None:
    vector = 16 // BYTES[problem["dtype"]]
    if "lanes" in g:  # along rows
        assert g["lanes"] in (1, 2, 4, 8, 16, 32, 256)
        assert g["tile"] % (256 // g["lanes"]) == 0
        assert g["tile"] * cols * BYTES[problem["dtype"]] % 16 == 0 or g["lanes"] >= 8
        assert covers(g["tiles"], g["tile"], rows)
        assert covers(g["splits"], g["span"], cols)
        assert g["span"] % vector == 0
        return
    assert covers(g["tiles"], g["tile"], g["period"])
    assert covers(g["splits"], g["span"], rows)
    assert 1 <= g["tile"] <= 256
    check_access(g, problem, rows, cols)
    assert g["span"] % g["row_group"] == 0


def check_access(g: dict, problem: dict, rows: int, cols: int) -> None:
    """16-byte accesses start on multiples of 16 bytes and stay inside."""
    vector = 16 // BYTES[problem["dtype"]]
    if g["access"] == "scalar":
        return
    assert problem["aligned"]
    if g["access"] == "vector":
        assert cols % vector == 0
        assert g["row_group"] == 1
    else:
        common = gcd(cols, vector)
        assert g["row_group"] == vector // common
        assert rows % g["row_group"] == 0
        assert g["period"] == cols // common <= 256


def check_scale(g: dict, problem: dict, channels: int, space: list[int]) -> None:
    vector = 16 // BYTES[problem["dtype"]]
    pixels = prod(space)
    for boxes, box, extent in zip(g["boxes"], g["box"], space, strict=True):
        assert covers(boxes, box, extent)
    assert covers(g["chunks"], g["chunk"], channels)
    first = not problem["channels_last"] or channels == 1
    rows, cols = (channels, pixels) if first else (pixels, channels)
    check_access(g, problem, rows, cols)
    depth, height, width = g["box"]
    if g["access"] == "vector" and first:
        # Every run of `width` pixels starts on a multiple, or the box is one run.
        runs_aligned = width % vector == 0 and space[2] % vector == 0
        one_run = width == space[2] and (
            (depth == 1 and height * width % vector == 0 and space[1] * space[2] % vector == 0)
            or (height == space[1] and depth * height * width % vector == 0)
            or (space[0] == 1 and height * width % vector == 0)
            or prod(g["box"]) == pixels
        )
        assert runs_aligned or one_run
    if g["access"] == "packed":
        assert prod(g["box"]) == pixels
        assert g["chunk"] % g["row_group"] == 0 if first else g["chunk"] == channels
    if g["access"] == "vector" and not first:
        assert g["chunk"] % vector == 0 or g["chunks"] == 1
    least = min(32, g["period"]) if g["access"] == "packed" else 0
    assert least <= g["threads_along"] <= 256


def walks_of(mlp: dict, samples: int, group: int) -> dict[str, int]:
    """How often a batch in such groups reads the weights of each layer."""
    groups = [group] * (samples // group) + [samples % group]
    return {
        name: sum(-(-count // mlp[name]) for count in groups)
        for name in ("hidden_samples", "gate_samples")
    }


def layers_together(problem: dict) -> bool:
    """Whether a block can take all of the MLP's hidden units, and reads the weights fast enough."""
    hidden, channels = problem["hidden"], problem["shape"][1]
    return hidden <= 32 and 2 * hidden * channels * BYTES[problem["dtype"]] <= 128 * 1024


def check_walks(found: dict, group: int, channels: int, hidden: int) -> None:
    """Eight samples share a reading of the weights, but where that leaves most of a device idle."""
    mlp, multiprocessors = found["passes"]["mlp"], found["device"]["multiprocessors"]
    blocks = {"hidden_samples": -(-hidden // 4), "gate_samples": -(-channels // 128)}
    if mlp["together"]:
        blocks = dict.fromkeys(blocks, 1)
    for name, most in blocks.items():
        idle = 4 * -(-group // 8) * most < multiprocessors
        assert mlp[name] == (2 if idle else 8)
    assert mlp["unit_warps"] in (1, 2, 4, 8)


@pytest.mark.parametrize("device", DEVICES)
def test_plans_of_any_problem_keep_the_limits_and_leave_nothing_out(device):
    rng = random.Random(device)
    for _ in range(600):
        problem = drawn(rng)
        found = ops.compiled().plan(**problem, device=device, strategy="streaming")
        assert found == ops.compiled().plan(**problem, device=device, strategy="streaming")
        limits = found["device"]
        samples, channels, *extents = problem["shape"]
        space = [1] * (3 - len(extents)) + extents
        for stage in found["stages"]:
            assert 1 <= stage["blocks"] < 2**31, problem
            assert 32 <= stage["threads"] <= 256
            assert stage["threads"] % 32 == 0
            assert stage["shared_bytes"] <= limits["shared_per_block"], problem
        group = found["group"]
        assert group == samples or (group % 8 == 0 and 8 <= group < samples)
        together = layers_together(problem)
        assert found["passes"]["mlp"]["together"] == together
        assert [s["name"] for s in found["stages"]] == FORWARD_STAGES[together]
        first = not problem["channels_last"] or channels == 1
        rows, cols = (channels, prod(space)) if first else (prod(space), channels)
        check_reduction(found["passes"]["pool"], problem, rows, cols)
        check_reduction(found["passes"]["maps"], problem, rows, cols)
        check_scale(found["passes"]["scale"], problem, channels, space)
        x_bytes = prod(problem["shape"]) * BYTES[problem["dtype"]]
        assert found["traffic"]["x_read"] == 3 * x_bytes
        assert found["traffic"]["out_written"] == x_bytes
        check_walks(found, group, channels, problem["hidden"])
        walks = walks_of(found["passes"]["mlp"], samples, group)
        read = sum(
            walks[name] * (channels * problem["hidden"] + bias)
            for name, bias in (("hidden_samples", problem["hidden"]), ("gate_samples", channels))
        )
        assert found["traffic"]["weights_read"] == read * BYTES[problem["dtype"]]


@pytest.mark.parametrize("device", DEVICES)
def test_backward_plans_keep_the_limits_and_leave_nothing_out(device):
    rng = random.Random(device)
    for _ in range(400):
        problem = drawn(rng)
        found = ops.compiled().plan(**problem, device=device, backward=True, strategy="streaming")
        _, channels, *extents = problem["shape"]
        expected = BACKWARD_STAGES[layers_together(problem)]
        assert [stage["name"] for stage in found["stages"]] == expected
        for stage in found["stages"]:
            assert 1 <= stage["blocks"] < 2**31, problem
            assert stage["threads"] in (128, 256, 512)
            assert stage["shared_bytes"] <= found["device"]["shared_per_block"], problem
        first = not problem["channels_last"] or channels == 1
        rows, cols = (channels, prod(extents)) if first else (prod(extents), channels)
        for name in ("sums", "terms", "dx"):
            g = found["passes"][name]
            assert covers(g["tiles"], g["tile"], cols)
            assert covers(g["splits"], g["span"], rows)
            assert g["span"] % g["row_group"] == 0
            assert g["chunk"] % g["row_group"] == 0
            most = 512 if name == "terms" and not first else 256
            assert name == "dx" or g["tile"] <= most
            vector = 1 if g["access"] == "scalar" else 16 // BYTES[problem["dtype"]]
            if g["access"] == "vector":
                assert problem["aligned"]
                assert g["tile"] % vector == 0 == cols % vector
            if g["access"] == "packed":
                assert g["tile"] == cols
                assert rows % g["row_group"] == 0 == g["row_group"] * cols % vector
        space = [1] * (3 - len(extents)) + extents
        stencil = found["passes"]["stencil"]
        for boxes, box, extent in zip(stencil["boxes"], stencil["box"], space, strict=True):
            assert covers(boxes, box, extent)
        walks = walks_of(found["passes"]["mlp"], problem["shape"][0], found["group"])
        read = sum(walks.values()) * channels * problem["hidden"] * BYTES[problem["dtype"]]
        assert found["traffic"]["weights_read"] == read, problem
        x_bytes = prod(problem["shape"]) * BYTES[problem["dtype"]]
        assert found["traffic"]["x_read"] == 4 * x_bytes
        assert found["traffic"]["out_written"] == x_bytes


# Where the MLP's layers take a launch each, and where one takes both.
LAYERS = (["hidden layer", "channel gate"], ["both layers"])
FORWARD_STAGES = [
    ["channel pool", *layers, "spatial pool", "spatial gate, scale"] for layers in LAYERS
]
BACKWARD_STAGES = [
    ["sums of dout * x", "stencil", "map terms", *reversed(layers), "dx"] for layers in LAYERS
]


def test_the_devices_are_on_record():
    assert tuple(known_devices()) == DEVICES


def test_passes_alternate_their_direction():
    found = plan([8, 64, 56, 56], strategy="streaming")
    assert [found["passes"][name]["reverse"] for name in ("pool", "maps")] == [
        False,
        True,
    ]  # the last forwards


def test_large_images_do_not_use_narrow_boxes():
    for dtype in BYTES:
        for shape in ([8, 256, 56, 56], [2, 64, 512, 512], [1, 16, 2048, 2048]):
            box = plan(shape, dtype, strategy="streaming")["passes"]["scale"]["box"]
            assert box[2] == shape[3] or box[2] * BYTES[dtype] >= 256


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_long_rows_are_split_over_blocks(dtype):
    for shape in ([1, 4, 10**6], [1, 8, 512, 512]):
        found = plan(shape, dtype, strategy="streaming")
        assert found["passes"]["pool"]["splits"] > 1
        assert found["stages"][0]["blocks"] >= 132


def test_groups_where_memory_is_slow_beside_the_cache():
    """An RTX 4090 reads a group again from its large cache; a T4's is too small for one sample."""

    def streamed(*arguments):
        return plan(*arguments, strategy="streaming")

    assert streamed([256, 256, 56, 56], "float16", "RTX 4090")["group"] < 256
    assert streamed([256, 256, 56, 56], "float16", "RTX 4090")["in_cache"]
    assert streamed([32, 256, 56, 56], "float16", "T4")["group"] == 32
    assert streamed([2, 64, 14, 14], "float16", "T4")["in_cache"]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_streaming_launches_overlap_where_the_device_can(device, backward):
    found = plan([8, 64, 14, 14], "float16", device, backward=backward, strategy="streaming")
    can = device in ("H100", "H200", "B200", "RTX 5090")
    assert {stage["overlaps"] for stage in found["stages"]} == {can}
    assert ("each launch starts before the one before it" in render(found)) == can


def test_shared_memory_is_asked_for_only_where_a_kernel_is_large():
    def most(kernel_size):
        stages = plan([1, 8, 64, 64], kernel_size=kernel_size, strategy="streaming")["stages"]
        return max(stage["shared_bytes"] for stage in stages)

    assert most(7) <= 48 * 1024
    assert most(91) > 48 * 1024


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kernel_size", range(31, 80, 4))
def test_what_a_device_can_run_forwards_it_can_run_backwards(kernel_size, dtype):
    for device in ("T4", "RTX 3090"):
        try:
            plan([1, 8, 100, 100], dtype, device, kernel_size=kernel_size)
        except ValueError:
            continue
        plan([1, 8, 100, 100], dtype, device, kernel_size=kernel_size, backward=True)


def test_kernel_that_no_plan_can_take():
    with pytest.raises(
        ValueError, match=r"conv_weight: expected .* 65536 bytes .* T4, got 1x151x151"
    ):
        plan([1, 8, 200, 200], device="T4", kernel_size=151)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": [1, 8]}, "shape: expected 3 to 5 sizes, got 2"),
        ({"shape": [0, 8, 4]}, "shape: expected sizes from 1 to 2.31 - 1, got 0"),
        ({"shape": [1, 8, 4], "dtype": "int8"}, "dtype: expected float32, .* got int8"),
        ({"shape": [1, 8, 4], "device": "V100"}, "device: expected one of T4, .* got V100"),
        ({"shape": [1, 8, 4], "hidden": 0}, "hidden: expected sizes from 1"),
        ({"shape": [1, 8, 4, 4], "kernel_size": [3]}, "kernel: expected a size for each of 2"),
    ],
)
def test_bad_descriptions(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(**arguments)


@pytest.mark.parametrize("device", ["T4", "A100", "H100"])
def test_command(device, capsys):
    arguments = ["plan", "--shape", "8,256,56,56", "--dtype", "float16", "--device", device]
    assert main([*arguments, "--strategy", "streaming"]) == 0
    shown = capsys.readouterr().out
    found = plan([8, 256, 56, 56], "float16", device, strategy="streaming")
    assert shown == render(found) + "\n"
    assert shown.startswith(f"streaming on {device}: groups of 8 samples")
    assert "x 38.5 MB, out 12.8 MB" in shown


def test_command_with_every_option(capsys):
    options = ["--hidden", "3", "--kernel-size", "3,5", "--channels-last", "--training"]
    streaming = ["--strategy", "streaming"]
    assert main(["plan", "--shape", "1,8,9,9", *options, *streaming]) == 0
    without = capsys.readouterr().out
    assert "scale" in without
    assert "residual -" in without
    assert main(["plan", "--shape", "1,8,9,9", *options, *streaming, "--residual"]) == 0
    assert "residual 2.6 kB" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["streaming", "resident"])
def test_a_residual_takes_time(strategy):
    without, added = (
        plan([256, 256, 56, 56], "float16", strategy=strategy, residual=r) for r in (False, True)
    )
    once = 2 * 256 * 256 * 56 * 56
    assert added["traffic"]["residual_read"] == once
    assert added["device_memory_bytes"] == without["device_memory_bytes"] + once
    assert added["predicted_seconds"] > 1.1 * without["predicted_seconds"]


def test_command_takes_the_strategy_of_the_environment(strategy, capsys):
    def chosen(*options):
        assert main(["plan", "--shape", "256,512,28,28", "--dtype", "float16", *options]) == 0
        return capsys.readouterr().out.split()[0]

    assert chosen() == "resident"
    strategy("streaming")
    assert chosen() == "streaming"
    assert chosen("--strategy", "auto") == chosen("--strategy", "resident") == "resident"
    strategy("")
    assert chosen() == "resident"


def test_command_says_what_is_wrong(capsys):
    assert main(["plan", "--shape", "1,8,4", "--device", "V100"]) == 2
    assert capsys.readouterr().err.startswith("plan: device: expected one of T4")


def test_without_the_compiled_module(monkeypatch):
    monkeypatch.setattr(ops, "_C", None)
    with pytest.raises(RuntimeError, match="did not load"):
        plan([1, 8, 4])


@pytest.mark.parametrize(("batch", "lanes"), [(1, 256), (4, 256), (5, 32), (8, 32), (256, 8)])
def test_threads_of_a_row_of_the_pool(batch, lanes):
    """A block for each of few rows, a warp for some thousand, eight threads for more."""
    found = plan([batch, 256, 56, 56], "float16", "H100", strategy="streaming")
    assert found["passes"]["pool"]["lanes"] == lanes
