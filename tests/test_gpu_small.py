"""What compute-sanitizer watches: every kind of call, every way to hold samples on the chip."""

from __future__ import annotations

import os

import pytest
import torch
from regimes import NOT_POSSIBLE, Regime

from benchmarks.gpu import small, strategies
from benchmarks.outcome import SkippedError


def test_what_the_tools_watch_reaches_every_call(monkeypatch):
    seen, trained = [], []
    plain, train = small.cbam_cuda.cbam, small.train

    def watched(*arguments, **options):
        seen.append(os.environ.get(strategies.VARIABLE, "auto"))
        return plain(*arguments, **options)

    def watched_training(*arguments):
        trained.append(os.environ.get(strategies.VARIABLE, "auto"))
        return train(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(small, "CASES", small.CASES[:2])
        patched.setattr(small, "FORMS", small.FORMS[-1:])
        patched.setattr(small.cbam_cuda, "cbam", watched)
        patched.setattr(small, "train", watched_training)
        count = 2 * len(small.DTYPES) * 2
        assert small.run("cpu") == {
            "streaming": f"{4 * count} calls",
            "resident": f"{3 * count + 2} calls",
        }
    for strategy in strategies.STRATEGIES:
        assert (seen.count(strategy), trained.count(strategy)) == (3 * count, count)
    form = small.FORMS[-1]
    assert form.calls == ("inference", "training")
    assert (seen.count(form.resident), trained.count(form.resident)) == (2, 1)
    assert {len(case.shape) for case in small.CASES} == {3, 4, 5}


def test_calls_without_a_plan_are_told_and_not_all_may_be(monkeypatch):
    monkeypatch.setattr(small, "CASES", small.CASES[:1])
    monkeypatch.setattr(small, "FORMS", ())
    refused = ["training"]

    def run(case, call):
        if os.environ[strategies.VARIABLE] == "resident" and call in refused:
            raise ValueError("strategy: expected one that is possible, got resident: too large")
        return [torch.zeros(1)]

    monkeypatch.setattr(small, "train", lambda *_: run("", "training"))
    monkeypatch.setattr(
        small.cbam_cuda,
        "cbam",
        lambda *_, activation=None, **__: run("", "ended" if activation else "inference")[0],
    )
    said = small.run("cpu")
    assert said["streaming"] == "24 calls"
    first = "small sample, one thread does it all, float32, contiguous, training"
    assert said["resident"].startswith(f"12 calls, no resident plan for 6: {first}; ")
    refused += ["ended", "inference"]
    with pytest.raises(SkippedError, match="no resident plan for 18"):
        small.run("cpu")
    assert small.run("cpu", 2, 3) == {"streaming": "8 calls"}


def test_a_call_whose_result_is_not_finite_fails(monkeypatch):
    monkeypatch.setattr(small, "train", lambda *_: [torch.tensor(torch.nan)])
    with pytest.raises(AssertionError, match="contiguous, training, streaming: not finite"):
        small.run("cpu")


FORMS = {
    "maps in bands": (bands := {"bands": 2, "copy": "bulk"}, bands, None),
    "pixels of clusters of 16": (
        pixels := {"split": "pixels", "kind": "cluster", "team": 16},
        pixels,
        pixels | {"x": "stays"},
    ),
    "pixels of the whole grid": (
        pixels := {"split": "pixels", "kind": "grid", "copy": "async"},
        pixels,
        pixels | {"x": "stays"},
    ),
    "x comes and goes": (
        {"team": 16},
        {"team": 16},
        {"split": "channels", "x": "is read twice", "copy": "bulk", "kind": "cluster", "team": 16},
    ),
    "pixels, x comes and goes": (
        pixels := {"split": "pixels", "copy": "bulk"},
        pixels,
        pixels | {"x": "is read twice"},
    ),
    "several boxes a block": (grid := {"kind": "grid", "several boxes": True}, grid, None),
    "backward on the whole grid": ({}, {}, {"kind": "grid", "team": 2, "split": "channels"}),
    "several samples, several visits": (
        several := {"samples": 8, "rounds": 2, "team": 4, "holds_weights": True},
        several,
        several | {"x": "stays", "access": "packed"},
    ),
    "shared hidden units": (
        units := {"shares_units": True, "kind": "cluster"},
        units,
        units,
    ),
    "several visits of a team": (
        visits := {"rounds": 2, "copy": "async"},
        visits,
        visits | {"x": "stays", "access": "vector"},
    ),
}
DIRECTIONS = ({}, {"training": True}, {"backward": True})


@pytest.mark.parametrize("form", small.FORMS, ids=lambda form: form.case.name)
def test_each_way_to_hold_samples_is_watched(form):
    """By the plan of an H100, of which the larger shapes are made; None where it has none."""
    case, dtype, layout, strategy, calls = form
    forward, _, backward = FORMS[case.name]
    assert (calls != small.BACKWARD) or backward
    assert (calls == small.FORWARD) == (backward is None)
    assert forward is not None
    for what, expected in zip(DIRECTIONS, FORMS[case.name], strict=True):
        as_regime = Regime(
            case.name,
            case.shape,
            case.hidden,
            dtype=dtype,
            layout=layout,
            plan=expected,
            strategy=strategy,
        )
        assert as_regime.case == case
        if expected is None:
            with pytest.raises(ValueError, match=NOT_POSSIBLE):
                as_regime.facts(**what)
        else:
            assert as_regime.facts(**what) == expected
