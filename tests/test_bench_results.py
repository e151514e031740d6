"""Rows of ``python -m benchmarks``, their tables and pictures, and two runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import compare, plots, report, rows, tables, text, timing
from benchmarks.problems import Problem

TINY = Problem((2, 16, 6, 5))


def timed(**medians):
    return {n: {"launched": timing.as_found([m, m, m])} for n, m in medians.items()}


def on_gpu(auto, found=None):
    """The same row with both strategies forced in place of the block, one of which is picked."""
    found = found or row()
    ours = {"cuda streaming": 200.0, "cuda resident": 100.0}
    contestants = {**found["contestants"], **timed(**ours)}
    del contestants["fused"]
    return {**found, "contestants": contestants, "auto": auto, "buffers": 4}


def row(problem=TINY, direction="forward", missing=(), **medians):
    times = {"copy": 100.0, "eager": 1000.0, "compile": 400.0, "fused": 200.0} | medians
    found = timed(**{name: time for name, time in times.items() if name not in missing})
    return rows.describe(
        problem, direction, found, dict.fromkeys(missing, "no compiler"), ["fused"]
    )


# Rows and tables.


def test_ratios_are_to_the_fused_block():
    found = row()
    assert (rows.speedup(found, "eager"), tables.best(found)) == (5.0, 2.0)
    assert found["fraction_of_copy"] == {"fused": 0.5}
    assert found["copy_gigabytes_per_second"] == pytest.approx(2 * TINY.bytes / 100e-6 / 1e9)
    assert rows.speedup(row(missing=["compile"]), "compile") is None
    assert rows.speedup(on_gpu("streaming"), "eager") == 5.0
    assert rows.speedup(on_gpu("resident"), "eager") == 10.0


def test_a_row_is_expected_to_take_what_the_nearest_took():
    costs = rows.Costs()
    assert costs.expected("plain", 100.0) == 0.0
    for size, seconds in ((100.0, 2.0), (1000.0, 5.0)):
        costs.add("plain", size, seconds)
    assert [costs.expected("plain", size) for size in (10.0, 200.0, 900.0)] == [2.0, 4.0, 5.0]
    assert costs.expected("plain", 4000.0) == 20.0
    assert costs.expected("compiled", 100.0) == 0.0


def test_geometric_mean_passes_over_what_is_missing():
    assert rows.geometric_mean([2.0, None, 8.0]) == pytest.approx(4.0)
    assert rows.geometric_mean([None]) is None


def test_table_says_what_is_missing():
    lines = tables.block_table([row(), row(missing=["compile"])]).splitlines()
    assert lines[2].startswith("| 2x16x6x5 ")
    assert cells_of(lines[3])[5] == "-"
    assert lines[-1].startswith("| geometric mean")
    assert len({len(line) for line in lines}) == 1


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_spread_is_beside_each_time():
    found = row()
    found["contestants"]["eager"]["launched"] = timing.as_found([800.0, 900.0, 1000.0, 1200.0])
    found["contestants"]["fused"]["launched"] = timing.as_found([200.0])
    header, _, line = tables.block_table([found]).splitlines()
    cells = dict(zip(cells_of(header), cells_of(line), strict=True))
    assert (cells["eager"], cells["copy"], cells["fused"]) == ("950 ±9%", "100 ±0%", "200")


def test_table_of_a_gpu_has_each_strategy():
    found = [on_gpu("streaming"), on_gpu("resident")]
    header, _, *lines, _ = tables.block_table(found).splitlines()
    streaming, resident = (dict(zip(cells_of(header), cells_of(x), strict=True)) for x in lines)
    for cells in (streaming, resident):
        assert (cells["streaming"], cells["resident"]) == ("200 ±0%", "100 ±0%")
    assert (streaming["fused"], streaming["eager/fused"]) == ("200 ±0%", "5.00")
    assert (resident["fused"], resident["eager/fused"]) == ("100 ±0%", "10.00")
    assert tables.STRATEGIES_NOTE in report.render({"block": as_file(found)})


def test_each_contestant_is_compared_with_the_copy():
    header, _, line = tables.copy_table([row(missing=["compile"])]).splitlines()
    cells = dict(zip(cells_of(header), cells_of(line), strict=True))
    assert cells["MB"] == f"{2 * TINY.bytes / 1e6:.1f}"
    assert (cells["eager of copy"], cells["fused of copy"]) == ("0.100", "0.500")
    assert "compile of copy" not in cells


def test_every_loss_is_shown():
    name = "2x16x6x5 float32 contiguous, forward"
    (line,) = tables.losses([row(), row(compile=196.0)])
    assert line == f"{name}: compile takes 0.98 of our time"
    near = row(compile=196.0)
    near["contestants"]["compile"]["launched"] = timing.as_found([150.0, 196.0, 250.0])
    (line,) = tables.losses([near])
    assert line == f"{name}: compile takes 0.98 of our time, within the noise"


def as_file(found, **facts):
    environment = {"device": "A CPU", "commit": "abc", "nvidia_smi": None, **facts}
    return {"environment": environment, "rows": found, "skipped": [], "seconds": 12.5}


def test_report_says_of_which_run_each_file_is():
    threads = {**row(), "threads": 1}
    files = {
        "block": as_file([row()]),
        "threads": as_file([threads], commit="def", nvidia_smi={"driver": 1, "clock": 2}),
    }
    lines = report.render(files).splitlines()
    assert "- commit: abc (block); def (threads)" in lines
    assert "- device: A CPU" in lines
    assert "- seconds: 12.5" in lines
    assert "- nvidia_smi: driver 1, clock 2" in lines


def test_report_says_who_is_missing_and_who_is_in_no_graph():
    found = row(missing=["compile"])
    found["method"] = "graph"
    for name, contestant in found["contestants"].items():
        if name == "eager":
            contestant["no_graph"] = "RuntimeError: not permitted"
        else:
            contestant["graph"] = contestant["launched"]
    lines = report.render({"block": as_file([found, {**found, "direction": "backward"}])})
    name = "2x16x6x5 float32 contiguous"
    why = "eager is in no CUDA graph, RuntimeError: not permitted"
    assert f"- {why}: {name} forward, {name} backward\n" in lines
    assert f"- without compile, no compiler: {name}\n" in lines


@pytest.mark.parametrize(("found", "note"), [(row(), "ON_CPU"), (on_gpu("streaming"), "ON_CUDA")])
def test_report_says_what_its_memory_lacks(found, note):
    used = {"saved_bytes": 1e3, "peak_bytes": 2e3}
    found = {**found, "direction": "step", "bytes": 1e3, "memory": {"eager": used}}
    text = report.render({"block": as_file([found])})
    for name in ("ON_CPU", "ON_CUDA"):
        assert (getattr(tables, f"MEMORY_{name}_NOTE") in text) == (name == note)


def test_copy_is_a_roof():
    larger = row(Problem((4, 16, 6, 5)))
    axes = plots.plt.figure().subplots(1, 2)
    plots.draw_bandwidth(axes, [row(), larger])
    drawn = {line.get_label(): line for line in axes[0].get_lines()}
    roof = drawn[plots.LABELS["copy"]]
    assert (roof.get_linestyle(), len(roof.get_xdata())) == ("-", 2)
    assert (drawn[plots.LABELS["fused"]].get_ydata() < roof.get_ydata()).all()


def test_pictures_of_rows_that_lack_different_contestants(tmp_path):
    """As where one form of torch.compile fails in one row, and another in the next."""
    found = []
    used = {"saved_bytes": 1e3, "peak_bytes": 2e3}
    for name, lacks in (("compile", "tuned compile"), ("tuned compile", "compile")):
        for direction in plots.DIRECTIONS:
            of = row(TINY, direction, **{name: 300.0})
            of["contestants"].pop(lacks, None)
            found.append({**of, "memory": dict.fromkeys(("eager", name, "fused"), used)})
    found.append(row(Problem((4, 16, 6, 5)), missing=["compile"]))
    for name in ("speed", "memory"):
        plots.draw(name, found, tmp_path / f"{name}.svg")
        drawn = (tmp_path / f"{name}.svg").read_text()
        for label in ("compile", "tuned compile", "fused"):
            assert f">{plots.LABELS[label]}<" in drawn
        assert "4x" not in drawn
    assert plots.with_compiled(found[-1:]) == found[-1:]


def test_threads_are_compared_with_one():
    one = {**row(), "threads": 1}
    two = {**row(copy=50.0, fused=125.0), "threads": 2}
    cells = cells_of(tables.threads_table([one, two]).splitlines()[3])
    assert cells[2:7] == ["2", "50.0 ±0%", "125 ±0%", "2.00", "1.60"]


@pytest.mark.parametrize(
    ("name", "file"), [("AMD EPYC (2x)", "amd-epyc-2x"), ("NVIDIA H100 80GB", "nvidia-h100-80gb")]
)
def test_file_names(name, file):
    assert text.slugify(name) == file


@pytest.mark.parametrize("disturbed", [0, 1, 2])
def test_rows_beside_other_programs_are_said(disturbed):
    """All samples of theirs may wait as long: the quartiles agree."""
    rows_ = [{**row(), "preempted": 200.0 if i < disturbed else 3.0} for i in range(3)]
    told = f"; other programs took processors in {disturbed} of 3 rows" if disturbed else ""
    told += "; a busy machine, measure again" if disturbed == 2 else ""
    text = "the quartiles are 0% of the median away from it, at worst 0%" + told
    assert tables.noise(rows_) == text
    threads = [{**found, "threads": 1} for found in rows_]
    for file, of in (("block", rows_), ("threads", threads)):
        assert f"\nNoise: {text}.\n" in report.render({file: as_file(of)})


# Two runs side by side.


def written(folder: Path, file: str, *found) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{file}.json").write_text(json.dumps({"rows": found}))
    return folder


def test_compare(tmp_path, capsys):
    old = tmp_path / "old"
    written(old, "block", row(), row(direction="step"), row(Problem((1, 2, 3))))
    new = written(tmp_path / "new", "block", row(fused=300.0), row(direction="step", fused=150.0))
    assert compare.main([str(old), str(new)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"old: {old}"
    assert cells_of(lines[5])[5:7] == ["1.50", compare.SLOWER]
    assert "faster" in lines[6]
    assert "only in the old one: 1x2x3 float32 contiguous" in lines
    assert "eager: 1.000 of the old time, geometric mean" in lines
    assert compare.main([str(old), str(old)]) == 0
    with pytest.raises(SystemExit, match=r"expected a folder with block\.json or threads\.json"):
        compare.main([str(tmp_path), str(new)])


def test_a_row_that_fails_now_is_no_improvement(tmp_path, capsys):
    """Of one block, and of the network."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        written(folder, "block", row())
    written(old, "network", in_network("plain", 600.0), in_network("fused", 400.0))
    facts = {"environment": {"device": "A CPU", "cpu_target": "avx2"}}
    error = "AssertionError: fused, inference: off by 1"
    for file, name in (("threads", str(TINY)), ("network", "training contiguous")):
        folder = tmp_path / file
        written(folder, "block", row())
        failed = {**facts, "rows": [{"name": name, "error": error}]}
        (folder / f"{file}.json").write_text(json.dumps(failed))
        assert compare.main([str(old), str(folder)]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert f"FAILED in the new one: {name}: {error}" in lines
        assert f"new: {folder}, A CPU, avx2" in lines
    assert compare.main([str(new), str(tmp_path / "network")]) == 0  # it was not timed before
    assert compare.main([str(old), str(new)]) == 0
    assert "only in the old one: training contiguous" in capsys.readouterr().out


def in_network(name, milliseconds):
    found = timing.as_found([1e3 * milliseconds] * 3)
    kind = {"name": f"training contiguous {name}", "mode": "training", "layout": "contiguous"}
    return {**kind, "contestant": name, "microseconds": found}


def test_compare_looks_at_all_files(tmp_path, capsys):
    folders = old, new = tmp_path / "old", tmp_path / "new"
    for folder, fused in zip(folders, (400.0, 600.0), strict=True):
        written(folder, "network", in_network("plain", 600.0), in_network("fused", fused))
        written(folder, "threads", {**row(fused=fused), "threads": 2})
    assert compare.main([str(old), str(new)]) == 1
    out = capsys.readouterr().out
    threads, network = (cells_of(line) for line in out.splitlines()[5:7])
    assert threads[:3] == ["2x16x6x5 float32 contiguous, 2 threads", "forward", "fused"]
    assert network[:3] == ["network", "training contiguous", "fused"]
    assert [cells[5:] for cells in (threads, network)] == [["1.50", compare.SLOWER]] * 2


def change_of(name, old, new):
    found = compare.changes(compare.of_blocks([old]), compare.of_blocks([new]))
    (change,) = [change for change in found if change.contestant == name]
    return change


def test_noise_is_no_regression():
    old, new = row(), row()
    new["contestants"]["fused"]["launched"] = timing.as_found([190.0, 230.0, 260.0])
    assert change_of("fused", old, new).verdict == compare.SLOWER
    old["contestants"]["fused"]["launched"] = timing.as_found([180.0, 200.0, 240.0])
    assert change_of("fused", old, new).verdict == compare.SAME


def test_fused_is_what_a_user_got_in_each():
    """Not the same strategy twice, where the plan has changed."""
    old, new = on_gpu("streaming"), on_gpu("resident")
    assert change_of("fused", old, new).ratio == 0.5
    assert change_of("cuda resident", old, new).ratio == 1.0


def test_times_are_compared_with_times_of_the_same_method():
    old, new = row(), row()
    for one in new["contestants"].values():
        one["graph"] = timing.as_found([50.0] * 3)
    new["method"] = "graph"
    assert change_of("fused", old, new).ratio == 1.0
    assert change_of("fused", new, new).new["median"] == 50.0
