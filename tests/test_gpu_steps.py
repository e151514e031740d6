"""The steps of ``python -m benchmarks.gpu``: their order, their time, what they leave."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import steps
from benchmarks.outcome import FAILED, PASSED, SKIPPED, Folder, Outcome


def passing(seconds, folder):
    return Outcome(PASSED, "fine")


def failing(seconds, folder):
    return Outcome(FAILED, "1 failed", ["it broke | badly"])


def broken(seconds, folder):
    raise OSError("no such thing")


def run_all(tmp_path, *works, minutes=1.0):
    named = zip(steps.NAMES[1:], works, strict=False)
    some = [steps.Step(name, 30, work) for name, work in named]
    lines = []
    folder = Folder(tmp_path / "results", {"commit": "abc", "date": "2026-01-01"})
    return steps.run_steps(some, folder, steps.Deadline(minutes), lines.append), folder, lines


def test_later_steps_run_after_a_failure(tmp_path):
    outcomes, folder, lines = run_all(tmp_path, failing, broken, passing)
    assert [outcome.state for outcome in outcomes.values()] == [FAILED, FAILED, PASSED]
    assert outcomes["sanitizers"].summary == "OSError: no such thing"
    assert steps.exit_code(outcomes) == 1
    assert folder.read("checks") == {
        "commit": "abc",
        "date": "2026-01-01",
        "state": "passed",
        "summary": "fine",
        "problems": [],
        "seconds": 0.0,
    }
    assert "it broke \\| badly" in (folder.path / "report.md").read_text()
    assert lines[0] == "[1/3] tests, at most 30 s"
    assert not list(folder.path.glob("*.partial"))


def test_exit_code_of_what_passed_or_was_skipped(tmp_path):
    skipping = lambda seconds, folder: Outcome(SKIPPED, "not here")  # noqa: E731
    assert steps.exit_code(run_all(tmp_path, passing, skipping)[0]) == 0


def test_steps_after_the_deadline_are_skipped(tmp_path):
    outcomes, _, _ = run_all(tmp_path, passing, minutes=0.01)
    assert outcomes["tests"] == Outcome(SKIPPED, "no time left: needs 5 s")


def test_files_of_an_earlier_run_are_not_taken_for_this_one(tmp_path):
    folder = Folder(tmp_path / "results")
    folder.write("tests", {"old": True})
    (seen, _, _) = run_all(tmp_path, lambda s, f: Outcome(PASSED, str(f.read("tests"))))
    assert seen["tests"].summary == "None"


def test_time_of_all_steps():
    """If each takes all it may, after a build of a minute and a half."""
    assert steps.NAMES[-4:] == ("timings", "network", "variants", "sweep")
    least = {"tests": 100, "sanitizers": 90, "checks": 60}
    least |= {"host": 18, "timings": 50, "network": 30, "sweep": 25}
    assert all(step.least <= step.seconds for step in steps.STEPS)
    left = 8 * 60 - 90
    for step in steps.STEPS:
        taken = min(step.seconds, step.share * left)
        assert taken >= least.get(step.name, 0), step.name
        left -= taken if taken >= step.least else 0
    assert left >= 0


def test_a_step_that_would_not_end_in_time_is_not_begun(tmp_path):
    step = steps.Step("traffic", 50, passing, share=0.5, least=25)
    for minutes, state in ((0.8, SKIPPED), (0.9, PASSED)):
        found = steps.run_steps([step], Folder(tmp_path), steps.Deadline(minutes), str)
        assert found["traffic"].state == state


def test_a_step_leaves_a_share_to_those_after_it(tmp_path):
    given = []

    def work(seconds, folder):
        given.append(round(seconds))
        return Outcome(PASSED, "fine")

    two = [steps.Step("timings", 50, work, share=0.6), steps.Step("sweep", 50, work)]
    for minutes in (0.5, 2.0):
        steps.run_steps(two, Folder(tmp_path), steps.Deadline(minutes), lambda line: None)
    assert given == [18, 30, 50, 50]


def test_time_before_the_first_step_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.time, "time", lambda: 1000.0)
    assert steps.Deadline(8, 900.0).left() == pytest.approx(380, abs=1)
    assert steps.Deadline(8).left() == pytest.approx(480, abs=1)
    given = steps.Deadline(1, 941.0)
    one = [steps.Step("tests", 30, passing)]
    assert steps.run_steps(one, Folder(tmp_path), given, str)["tests"].state == SKIPPED


def test_options():
    assert program.parse(["--since", "1764000000"]).since == 1764000000
    assert program.parse(["--only", "tests,checks"]).only == ("tests", "checks")
    assert program.parse([]).minutes == 8
    with pytest.raises(SystemExit):
        program.parse(["--only", "dance"])


def test_whole_program(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(program, "why_not", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(program, "STEPS", [steps.Step("checks", 30, passing)])
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    for name in ("network.json", "report.md"):
        Folder(tmp_path / "nvidia-h200").path.joinpath(name).write_text("of make bench")
    assert program.main(["--only", "checks"]) == 0
    assert (tmp_path / "nvidia-h200/acceptance/checks.json").exists()
    assert (tmp_path / "nvidia-h200/report.md").read_text() == "of make bench"
    printed = capsys.readouterr().out
    assert "| checks | passed |" in printed
    assert "not measured" not in printed
    monkeypatch.setattr(program, "STEPS", [steps.Step("checks", 30, failing)])
    assert program.main(["--out", str(tmp_path / "here")]) == 1
    assert (tmp_path / "here/report.md").exists()


def test_targets_are_printed_before_the_steps(monkeypatch, tmp_path, capsys):
    row = {"name": "1x1x1x1", "error": "out of memory"}
    timed = lambda seconds, folder: Outcome(PASSED, "fine", details={"rows": [row]})  # noqa: E731
    monkeypatch.setattr(program, "why_not", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(program, "STEPS", [steps.Step("timings", 30, timed)])
    assert program.main(["--out", str(tmp_path), "--only", "timings"]) == 0
    printed = capsys.readouterr().out
    assert 0 < printed.index("not measured") < printed.index("| timings | passed |")
