"""What the kernels are meant to reach on a GPU, beside timings made up."""

from __future__ import annotations

import pytest
import torch
from test_gpu_timings import cells_of, plan_on_record

from benchmarks.gpu import rows, targets, timings
from benchmarks.problems import Problem

F16, F32 = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _planned(monkeypatch):
    monkeypatch.setattr(rows, "plan", plan_on_record)


def a_row(shape, direction="forward", dtype=F16, method="launched", auto="resident", **times):
    """Of these times; others are those of a copy at 3 TB/s and of contestants that take longer."""
    problem = Problem(shape, dtype)
    copy = (2 if direction == "forward" else 3) * problem.bytes / 3e6
    times = {"copy": copy, "cuda streaming": 3 * copy, "cuda resident": 2 * copy} | times
    found = {name: {method: {"median": time}} for name, time in times.items()}
    return {**rows.describe(problem, direction, found, 1, {}), "auto": auto}


def line(what, found):
    """Cells of the line that is about it, after the limits."""
    table = targets.table(found)
    (number,) = (i for i, text in enumerate(table.splitlines()) if text.startswith(f"| {what}"))
    return cells_of(table, number)[3:]


NONE = ["not measured", "-", "0", ""]
LARGE, LAST = (256, 256, 56, 56), (256, 2048, 7, 7)


def test_without_timings_nothing_is_measured():
    table = targets.table([])
    assert len(table.splitlines()) == 2 + len(targets.TARGETS)
    for number in range(2, 2 + len(targets.TARGETS)):
        assert cells_of(table, number)[3:] == NONE
    assert targets.table([{"name": "x", "error": "out of memory"}]) == table


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ((1.1, 1.1), ["0.91", "0.91", "2", "stretch"]),
        ((1.0, 1.25), ["0.89", "0.80", "2", "reached"]),
        ((1.0, 1.6), ["0.79", "0.62", "2", "missed"]),
    ],
)
def test_shapes_of_a_line_are_averaged(times, told):
    shapes = (LARGE, (256, 512, 28, 28))
    copies = [2 * Problem(shape, F16).bytes / 3e6 for shape in shapes]
    found = [
        a_row(shape, **{"cuda resident": copy * times})
        for shape, copy, times in zip(shapes, copies, times, strict=True)
    ]
    assert line("forward, 16 bits, 56 to 14, from 100 MB", found) == told
    assert line("forward, float32, 56x56", found) == NONE
    assert line("forward, 2048x7x7", found) == NONE


def test_rows_that_a_line_is_about():
    of_copy = ["0.50", "0.50", "1", "missed"]
    assert line("forward, 2048x7x7", [a_row(LAST), a_row((64, *LAST[1:]))]) == of_copy
    assert line("forward, float32, 56x56", [a_row(LARGE, dtype=F32), a_row(LARGE)]) == of_copy
    small = a_row((32, *LARGE[1:]))
    assert line("forward, 16 bits", [a_row(LARGE), small, a_row(LAST)]) == of_copy
    backward = [a_row(LARGE, "backward", auto="streaming"), a_row((1, *LARGE[1:]), "backward")]
    assert line("backward, resident, from 100 MB", backward) == of_copy


def test_what_auto_picks_is_what_counts():
    found = [a_row(LAST, auto="streaming")]
    assert line("forward, 2048x7x7", found) == ["0.33", "0.33", "1", "missed"]


def test_microseconds():
    medium = (32, 512, 28, 28)
    copy = 2 * Problem(medium, F16).bytes / 3e6
    for beyond, told in ((1.5, "stretch"), (2.5, "reached"), (3.5, "missed")):
        found = [a_row(medium, **{"cuda resident": copy + beyond})]
        cells = [f"{beyond:.2f}"] * 2
        assert line("forward, 13 to 50 MB", found) == [*cells, "1", told]
    two = [a_row(medium, **{"cuda resident": copy + beyond}) for beyond in (-1.0, 4.0)]
    assert line("forward, 13 to 50 MB", two) == ["1.50", "4.00", "2", "stretch"]
    one = (1, *LARGE[1:])
    in_graph = a_row(one, method="graph", **{"cuda resident": 7.0})
    assert line("forward, one sample", [in_graph]) == ["7.00", "7.00", "1", "reached"]
    assert line("forward, one sample", [a_row(one)]) == NONE


@pytest.mark.parametrize("direction", rows.ALONE)
def test_streaming_against_the_bytes_it_asks_for(direction):
    row = a_row(LARGE, direction)
    asked_for = sum(row["plans"]["cuda streaming"]["traffic_bytes"].values())
    passes = {"forward": 4, "backward": 5}[direction] * Problem(LARGE, F16).bytes
    assert passes <= asked_for < 1.1 * passes
    row = a_row(LARGE, direction, **{"cuda streaming": asked_for / 3e6 / 0.92})
    told = ["0.92", "0.92", "1", "reached"]
    assert line(f"{direction}, streaming, from 100 MB", [row]) == told


@pytest.mark.parametrize("direction", rows.ALONE)
@pytest.mark.parametrize(
    ("rival", "what"),
    [("eager", "times as fast as eager"), ("tuned", "as tuned"), ("max-autotune", "as max-auto")],
)
def test_times_of_others(direction, rival, what):
    shape = (targets.COMPARED_BATCH, *LARGE[1:])
    found = [a_row(shape, direction, **{"cuda resident": 10.0, rival: 85.0})]
    told = ["8.50", "8.50", "1"]
    assert line(f"{direction}, 32 samples: {what}", found)[:3] == told
    assert line(f"{direction}, 32 samples: {what}", [a_row(shape, direction)]) == NONE


def test_each_line_has_rows_among_those_that_are_timed():
    """Their shapes; a rival or a graph may still be missing."""
    wanted = [
        {"shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch.")}
        for p in timings.problems()
    ]
    for target in targets.TARGETS:
        assert any(map(target.about, wanted)), target.what
