"""The whole network of the benchmarks, with tiny images on a CPU."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from test_gpu_timings import cells_of, finished
from torch import nn

from benchmarks import network, resnet, rows, tables, timing
from benchmarks.gpu import network as on_gpu
from benchmarks.gpu import report
from benchmarks.gpu import rows as gpu_rows
from benchmarks.outcome import FAILED, PASSED, Folder
from benchmarks.problems import BLOCKS
from cbam_cuda import reference

CPU = torch.device("cpu")
TINY = (2, 3, 32, 32)


def test_it_is_a_resnet_50():
    channels = []
    with torch.device("meta"):
        found = resnet.ResNet50(lambda count: channels.append(count) or nn.Identity())
    assert sum(p.numel() for p in found.parameters()) == 25_557_032
    shapes = []
    for layer in found.features:
        layer.register_forward_hook(lambda layer, inputs, out: shapes.append(tuple(out.shape)))
    assert found(torch.zeros(64, *network.IMAGE, device="meta")).shape == (64, 1000)
    blocks = [shape[1:] for shape in shapes[-16:]]
    assert [blocks.count(block) for block in BLOCKS] == [3, 4, 6, 3]
    assert channels == [block[0] for block in blocks]


def test_cbam_stands_before_the_shortcut():
    block = resnet.Bottleneck(8, 2, 1, lambda channels: nn.Softsign()).eval()
    assert isinstance(block.branch[-1], nn.BatchNorm2d)
    x = torch.randn(2, 8, 5, 5)
    expected = torch.relu(x + nn.functional.softsign(block.branch(x)))
    torch.testing.assert_close(block(x), expected)
    at_once = resnet.Bottleneck(8, 2, 1, lambda channels: reference.CBAM(channels, 2), True).eval()
    plain = copy.deepcopy(at_once)
    plain.at_once = False
    torch.testing.assert_close(at_once(x), plain(x))


@pytest.mark.parametrize("mode", network.WORK)
def test_all_networks_compute_the_same(mode):
    layout = {"training": "contiguous", "inference": "channels_last"}[mode]
    network.assert_agree(network.Setting(mode, layout), CPU, TINY)


def test_settings_are_all_there_are():
    assert len(set(network.settings())) == 4


@pytest.fixture
def on_cpu(monkeypatch):
    """Short networks and tiny images on the CPU; what stands for the device's memory and clock.

    The clock runs what it is given once, and says of all networks 4, 2, 3 and so on milliseconds.
    """
    seen = types.SimpleNamespace(networks=[], events=[])
    networks, images = network.networks, network._images

    def watched(device, layout):
        found = networks(CPU, layout)
        for name, module in found.items():
            module.register_forward_hook(
                lambda module, inputs, out, name=name: seen.events.append((name, out.dtype))
            )
        seen.networks.append(found)
        return found

    def clock(work, device, calls):
        assert (device.type, calls) == ("cuda", 5)
        work()
        seen.events.append("sample")
        return 1e3 * (4, 2, 3)[(seen.events.count("sample") - 1) // len(network.NETWORKS) % 3]

    def peak(work, device):
        seen.events.append("memory")
        work()
        return 5_000_000_000

    monkeypatch.setattr(resnet, "STAGES", ((8, 1, 1), (16, 2, 2)))
    monkeypatch.setattr(network, "networks", watched)
    monkeypatch.setattr(network, "_images", lambda _, device, layout: images(TINY, CPU, layout))
    monkeypatch.setattr(network, "time_once", clock)
    monkeypatch.setitem(network.EFFORT, "cuda", network.Effort(64, 5, 3, 0.0, 1))
    monkeypatch.setattr(network, "peak_bytes", peak)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return seen


@pytest.mark.parametrize("mode", network.WORK)
def test_a_setting(on_cpu, mode):
    found = network.time_setting(network.Setting(mode, "channels_last"), torch.device("cuda"))
    assert not torch.backends.cudnn.allow_tf32
    for name, row in zip(network.NETWORKS, found, strict=True):
        assert row["name"] == f"{mode} channels_last {name}"
        assert (row["mode"], row["layout"], row["contestant"]) == (mode, "channels_last", name)
        assert (row["milliseconds"], row["peak_bytes"]) == (3.0, 5_000_000_000)
        assert row["images_per_second"] == pytest.approx(64 / 3e-3)
        assert row["microseconds"]["raw"] == [4000.0, 2000.0, 3000.0]
    compared = [(name, torch.float32) for name in network.NETWORKS]
    compared.append(("plain", torch.float64))
    if mode == "training":
        compared += [(name, torch.float64) for name in network.NETWORKS]
    calls = [(name, network.DTYPES["cuda"][mode]) for name in network.NETWORKS]
    looked_at = [event for call in calls for event in (call, "memory", call)]
    turns = [event for call in calls for event in (call, "sample")]
    assert on_cpu.events == [*compared, *looked_at, *turns * 3]


def test_there_are_more_samples_where_there_is_time(on_cpu):
    effort = network.Effort(64, 5, 2, 60.0, 1)
    works = {name: lambda: None for name in network.NETWORKS}
    found = network._take_turns(works, torch.device("cuda"), effort)
    assert [len(samples) for samples in found.values()] == [network.MOST_SAMPLES] * 3


def test_gradients_are_part_of_the_memory_of_a_step(on_cpu, monkeypatch):
    """Those that the step before has left are gone, or their places would count for its own."""
    left = []

    def peak(work, device):
        weights = on_cpu.networks[-1][network.NETWORKS[len(left)]].parameters()
        left.append(sum(p.grad is not None for p in weights))
        work()
        return 1

    monkeypatch.setattr(network, "peak_bytes", peak)
    network.time_setting(network.Setting("training", "contiguous"), torch.device("cuda"))
    assert left == [0, 0, 0]


def test_training_changes_the_weights_and_inference_does_not(on_cpu):
    for mode, changes in (("training", True), ("inference", False)):
        found = network.networks(CPU, "contiguous")["fused"]
        work = network.WORK[mode](
            found, network._images(TINY, CPU, "contiguous"), network.DTYPES["cuda"][mode]
        )
        before = {name: p.detach().clone() for name, p in found.named_parameters()}
        work()
        for name, p in found.named_parameters():
            assert (p.grad is not None) == changes, name
            if name.startswith("classifier"):
                assert torch.equal(p, before[name]) != changes
        assert found.training == changes


def test_networks_that_differ_are_not_timed(monkeypatch, on_cpu):
    networks = network.networks

    def differing(device, layout):
        found = networks(device, layout)
        with torch.no_grad():
            found["fused"].features[-1].cbam.conv.bias += 1e-3
        return found

    monkeypatch.setattr(network, "networks", differing)
    with pytest.raises(AssertionError, match="inference contiguous: off by"):
        network.time_setting(network.Setting("inference", "contiguous"), torch.device("cuda"))
    assert "sample" not in on_cpu.events


def test_networks_with_other_gradients_are_not_timed(monkeypatch, on_cpu):
    networks = network.networks

    def differing(device, layout):
        found = networks(device, layout)
        conv = found["fused"].features[-1].cbam.conv
        conv.bias.register_hook(lambda grad: grad * (1 + 1e-9))
        return found

    monkeypatch.setattr(network, "networks", differing)
    with pytest.raises(AssertionError, match=r"training contiguous, .*cbam.conv.bias: off by"):
        network.time_setting(network.Setting("training", "contiguous"), torch.device("cuda"))
    assert "sample" not in on_cpu.events


def row(mode, name, milliseconds):
    return {
        "name": f"{mode} contiguous {name}",
        "mode": mode,
        "layout": "contiguous",
        "contestant": name,
        "dtype": "float16",
        "images": 64,
        "milliseconds": milliseconds,
        "images_per_second": 64e3 / milliseconds,
        "peak_bytes": 1e9 * milliseconds,
        "microseconds": timing.as_found([k * milliseconds for k in (900, 1000, 1260)]),
    }


FOUND = [
    row("training", "plain", 60.0),
    row("training", "fused", 40.0),
    row("training", "ended", 30.0),
    row("inference", "plain", 20.0),
    row("inference", "fused", 16.0),
    row("inference", "ended", 10.0),
]
FAILURE = {"name": "training channels_last", "error": "AssertionError: off by 1"}


def test_table_of_the_network():
    table = tables.network_table([*FOUND, FAILURE])
    assert cells_of(table, 0)[4:7] == ["plain ms", "fused ms", "ended ms"]
    first = ["training", "contiguous", "float16", "64", "60.0 ±9%", "40.0 ±9%", "30.0 ±9%"]
    speeds = ["1066.7", "1600.0", "2133.3"]
    assert cells_of(table) == [*first, *speeds, "60.00", "40.00", "30.00", "1.50", "2.00"]
    assert cells_of(table, 3)[-2:] == ["1.25", "2.00"]
    older = [row for row in FOUND if row["contestant"] != "ended"]
    assert cells_of(tables.network_table(older), 0)[-1] == "plain/fused"
    skipped = [{"name": "inference channels_last", "reason": "no time left"}]
    lines = list(report.SECTIONS["network"]({"rows": [*FOUND, FAILURE], "skipped": skipped}))
    assert table in lines
    assert "- inference channels_last: no time left" in lines


def test_report_without_a_row():
    lines = list(report.SECTIONS["network"]({"rows": [FAILURE]}))
    assert lines == ["## A whole network", ""]


@pytest.mark.parametrize(
    ("found", "state", "summary"),
    [
        (
            FOUND,
            PASSED,
            "6 rows; plain/fused: training contiguous 1.50, inference contiguous 1.25; "
            "plain/ended: training contiguous 2.00, inference contiguous 2.00",
        ),
        ([FAILURE], FAILED, "1 rows; plain/fused: none; plain/ended: none"),
    ],
)
def test_what_the_step_says(monkeypatch, tmp_path, found, state, summary):
    folder = Folder(tmp_path)

    def work(command, seconds):
        assert command[1:] == ["-m", on_gpu.__name__, str(tmp_path), "30"]
        folder.write("network", {"rows": found, "skipped": [], "ended": True})
        return finished("")

    monkeypatch.setattr(gpu_rows, "run", work)
    outcome = on_gpu.step(45, folder)
    assert (outcome.state, outcome.summary) == (state, summary)


def test_settings_are_begun_while_there_is_time(monkeypatch):
    """By a faked clock: each setting takes eleven seconds of thirty."""
    now, kept = [0.0], []
    monkeypatch.setattr(rows.time, "monotonic", lambda: now[0])

    def time_row(setting, left):
        now[0] += 11.0
        return [{"name": str(setting), "left": left}]

    settings = network.settings()
    rows.take(settings, 30.0, on_gpu.ROW_SECONDS, time_row, lambda _: None, kept.append)
    assert kept[-1]["rows"] == [
        {"name": "training contiguous", "left": 30.0},
        {"name": "inference contiguous", "left": 19.0},
        {"name": "training channels_last", "left": 8.0},
    ]
    skipped = {"name": "inference channels_last", "reason": "no time left"}
    assert kept[-1]["skipped"] == [skipped]
