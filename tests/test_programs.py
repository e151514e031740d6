"""The logic of the benchmark and of the demo, without the waiting."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("sklearn")

import cbam_cuda
from benchmarks import block, report
from benchmarks.timing import Timing, environment, summarize, time_call
from examples import agreement
from examples.network import Network


def row(shape=(8, 256, 56, 56), compiled=True):
    def timings(**medians):
        return {n: Timing(m, m, m, 5) for n, m in medians.items() if compiled or n != "compile"}

    return report.Row(
        shape,
        timings(copy=100.0, eager=1000.0, compile=400.0, fused=200.0),
        timings(copy=300.0, eager=4000.0, compile=3000.0, fused=500.0),
        None if compiled else "no compiler",
    )


def test_ratios_are_to_the_fused_block():
    assert row().ratio("forward", "eager") == 5.0
    assert row().ratio("step", "compile") == 6.0
    assert row(compiled=False).ratio("step", "compile") is None


def test_bandwidth_counts_one_read_and_one_write():
    assert row((1, 1, 100, 1000)).gigabytes_per_second(4) == pytest.approx(2 * 4e5 / 200e-6 / 1e9)


def test_geometric_mean_passes_over_what_is_missing():
    assert report.geometric_mean([2.0, None, 8.0]) == pytest.approx(4.0)
    assert report.geometric_mean([None]) is None


def test_table_says_what_is_missing():
    table = report.render_table([row(), row(compiled=False)], "forward", 4)
    lines = table.splitlines()
    assert lines[2].startswith("| 8x256x56x56 ")
    assert " - " in lines[3]
    assert lines[-1].startswith("| geometric mean")
    assert len({len(line) for line in lines}) == 1
    assert report.missing([row(), row(compiled=False)]) == ["no compiler"]


@pytest.mark.parametrize(
    ("text", "name"), [("AMD EPYC (2x)", "amd-epyc-2x"), ("NVIDIA H100 80GB", "nvidia-h100-80gb")]
)
def test_file_names(text, name):
    assert report.slugify(text) == name


def test_options_that_are_not_the_default_are_in_the_file_name():
    options = block.parse(["--dtype", "bfloat16", "--threads", "1"])
    assert block.result_name("AMD EPYC", options) == "amd-epyc-bfloat16-threads-1"
    assert block.result_name("AMD EPYC", block.parse([])) == "amd-epyc"


def test_shapes_of_the_command_line():
    assert block.parse(["--shapes", "8x256x56x56", "1x2x3x4"]).shapes[1] == (1, 2, 3, 4)
    with pytest.raises(SystemExit):
        block.parse(["--shapes", "8x256"])


def test_summary_is_median_and_quartiles():
    assert summarize([4.0, 1.0, 2.0, 3.0, 5.0])[:3] == (3.0, 2.0, 4.0)
    assert summarize([7.0]) == Timing(7.0, 7.0, 7.0, 1)


def test_timing_calls_what_it_times():
    calls = []
    timing = time_call(lambda: calls.append(1), torch.device("cpu"), 0.01)
    assert calls
    assert timing.lower <= timing.median <= timing.upper


def test_environment_says_where_numbers_come_from():
    facts = environment(torch.device("cpu"))
    assert {"device", "threads", "torch", "cbam_cuda", "date", "command"} <= set(facts)
    assert facts["cbam_cuda"] == cbam_cuda.__version__


def test_benchmark_end_to_end(tmp_path, capsys):
    arguments = ["--shapes", "1x32x7x7", "--quick", "--no-compile", "--output", str(tmp_path)]
    rows = block.main(arguments)
    assert set(rows[0].forward) == {"copy", "eager", "fused"}
    assert "1x32x7x7" in capsys.readouterr().out
    (raw,) = tmp_path.glob("*.json")
    assert json.loads(raw.read_text())["rows"][0]["shape"] == [1, 32, 7, 7]
    assert raw.with_suffix(".md").exists()


LOSSES = [2.0, 1.5, 1.0, 0.5]


def test_trainings_that_agree_pass():
    near = [loss * (1 + 1e-9) for loss in LOSSES]
    checks = agreement.loss_checks(LOSSES, near, near, LOSSES, LOSSES)
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("step", range(4))
def test_trainings_that_differ_fail(step):
    off = [loss + (0.01 if i == step else 0.0) for i, loss in enumerate(LOSSES)]
    checks = agreement.loss_checks(LOSSES, off, LOSSES, LOSSES, off)
    assert [check.passed for check in checks] == [step != 0, False, False]


def test_nan_agrees_with_nothing():
    nan = [float("nan")] * 4
    assert not any(c.passed for c in agreement.loss_checks(LOSSES, nan, LOSSES, LOSSES, nan))


def test_network_of_the_demo_takes_either_class():
    torch.manual_seed(0)
    plain, fused = Network(cbam_cuda.reference.CBAM).eval(), Network(cbam_cuda.CBAM).eval()
    fused.load_state_dict(plain.state_dict())
    images = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(fused(images), plain(images), rtol=1e-4, atol=1e-5)
    gates = fused.spatial_gates(images)
    assert [tuple(g.shape) for g in gates] == [(2, 1, 28, 28), (2, 1, 14, 14), (2, 1, 7, 7)]
