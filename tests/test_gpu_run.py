"""The logic of ``python -m benchmarks.gpu``, without a GPU."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import torch

from benchmarks import stamp
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import architecture, commands, report, sanitizers, small, suite
from benchmarks.gpu.commands import Finished
from benchmarks.outcome import FAILED, PASSED, SKIPPED, Folder

CLEAN = f"""\
========= COMPUTE-SANITIZER
{small.WATCHED}streaming: 165 calls
{small.WATCHED}resident: 100 calls, no resident plan for 65: one, another
{small.FINISHED}
========= ERROR SUMMARY: 0 errors
"""
CLEAN_RACECHECK = CLEAN.replace(
    "ERROR SUMMARY: 0 errors",
    "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
)
ONE_HAZARD = f"""\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at maps(float*)+0x420
=========     and Read access at maps(float*)+0x460 [512 hazards]
=========
{small.FINISHED}
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
ERRORS = f"""\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at pool(float const*)+0x1d0
=========     by thread (31,0,0) in block (0,0,0)
=========
========= Invalid __global__ read of size 4 bytes
=========     at pool(float const*)+0x1d0
========= Invalid __shared__ write of size 16 bytes
{small.FINISHED}
========= ERROR SUMMARY: 3 errors
"""
CRASH = """\
========= COMPUTE-SANITIZER
Traceback (most recent call last):
torch.AcceleratorError: CUDA error: unspecified launch failure
"""


def finished(text, code=0, timed_out=False):
    return Finished(code, text, 12.0, timed_out)


@pytest.mark.parametrize("text", [CLEAN, CLEAN_RACECHECK])
def test_a_clean_tool(text):
    found = sanitizers.parse(finished(text))
    assert found["state"] == PASSED
    assert (found["errors"], found["warnings"], found["reports"]) == (0, 0, [])
    lines = list(report.SECTIONS["sanitizers"]({"tools": {"a": found, "b": found}}))
    assert [line for line in lines if line.startswith("- ")] == [
        "- watched, streaming: 165 calls",
        "- watched, resident: 100 calls, no resident plan for 65: one, another",
    ]


@pytest.mark.parametrize(
    ("done", "wrong"),
    [
        (finished(ERRORS), "3 errors"),
        (finished(ERRORS, code=1), "3 errors"),
        (finished(ONE_HAZARD), "1 error"),
        (finished(CLEAN + CLEAN.replace("0 errors", "2 errors")), "2 errors"),
        (finished(CRASH, code=1), "crash, exit code 1: torch.AcceleratorError: CUDA error.*"),
        (finished(CLEAN, code=-11), "crash, exit code -11.*"),
        (finished(CLEAN.replace(small.FINISHED, "")), "the program did not reach its end"),
        (finished(CRASH), "no summary was printed"),
        (finished(CLEAN, code=-2, timed_out=True), "timeout after 12 s"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tool_that_is_not_clean(done, wrong):
    found = sanitizers.parse(done)
    assert found["state"] == FAILED
    assert re.fullmatch(wrong, found["wrong"])


def test_reports_of_a_tool_are_listed_once():
    reports = sanitizers.parse(finished(ERRORS))["reports"]
    assert reports == [
        "Invalid __global__ read of size 4 bytes",
        "Invalid __shared__ write of size 16 bytes",
    ]


def test_warnings_are_counted_and_do_not_fail():
    text = CLEAN_RACECHECK.replace("0 hazards", "2 hazards").replace("0 warn", "2 warn")
    outcome = sanitizers.judge({"racecheck": sanitizers.parse(finished(text))})
    assert (outcome.state, outcome.summary) == (PASSED, "racecheck clean (2 warnings)")


def test_all_tools_together():
    tools = {"memcheck": finished(ERRORS), "racecheck": finished(CLEAN_RACECHECK)}
    outcome = sanitizers.judge({name: sanitizers.parse(done) for name, done in tools.items()})
    assert outcome.state == FAILED
    assert outcome.summary == "memcheck 3 errors, racecheck clean"
    assert outcome.problems == ["memcheck: 3 errors: Invalid __global__ read of size 4 bytes"]


def test_without_compute_sanitizer(monkeypatch, tmp_path):
    monkeypatch.setattr(sanitizers, "find_tool", lambda _: None)
    outcome = sanitizers.step(1, Folder(tmp_path))
    assert (outcome.state, outcome.summary) == (SKIPPED, "compute-sanitizer is not installed")


def test_a_tool_is_found_in_the_toolkit(monkeypatch, tmp_path):
    file = tmp_path / "bin/compute-sanitizer"
    file.parent.mkdir()
    file.touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert commands.find_tool("compute-sanitizer") == str(file)


def test_every_tool_is_run_over_the_small_program(monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho $PYTORCH_NO_CUDA_MEMORY_CACHING $@\ncat <<'X'\n{CLEAN}X\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizers, "find_tool", lambda _: str(tool))
    outcome = sanitizers.step(20, Folder(tmp_path))
    assert outcome.state == PASSED, outcome
    assert list(outcome.details["tools"]) == list(sanitizers.runs())
    for name, tool in outcome.details["tools"].items():
        assert tool["state"] == PASSED, name


def test_parts_of_a_tool_watch_everything_once(monkeypatch):
    last = [arguments[-2:] for name, arguments in sanitizers.runs().items() if "race" in name]
    parts = len(list(small.problems([torch.float16])))
    assert last == [[f"{part}/{parts}", "float16"] for part in range(1, parts + 1)]
    made = []
    monkeypatch.setattr(small, "_make_calls", lambda problem, *_: made.append(problem))
    monkeypatch.setattr(small.Tally, "said", lambda *_: "")
    for part in range(1, parts + 1):
        small.run("cpu", part, parts, [torch.float16])
    assert sorted(map(str, made)) == sorted(map(str, small.problems([torch.float16])))
    assert {problem.dtype for problem in small.problems()} == set(small.DTYPES)


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_forward" name="test_a[cuda]"/>
<testcase classname="tests.test_forward" name="test_b[cuda]">
<failure message="AssertionError: not close&#10;&#10;Mismatched: 3&#10;Greatest: 1&#10;
Relative: 2&#10;more">trace</failure></testcase>
<testcase classname="tests.test_forward" name="test_c[cuda]"><error message="boom"/></testcase>
<testcase classname="tests.test_backward" name="test_d[cuda]">
<skipped message="cuda: no GPU"/></testcase>
</testsuite></testsuites>"""
ALL_PASSED = '<testsuite><testcase classname="a" name="b"/></testsuite>'


def test_summary_of_the_suite():
    done = {"test_forward.py": finished("", code=1), "test_plan.py": finished("", code=5)}
    outcome = suite.judge(done, {"test_forward.py": JUNIT})
    assert (outcome.state, outcome.summary) == (FAILED, "1 passed, 2 failed, 1 skipped")
    assert outcome.problems == [
        "tests.test_forward::test_b[cuda]: "
        "AssertionError: not close Mismatched: 3 Greatest: 1 Relative: 2",
        "tests.test_forward::test_c[cuda]: boom",
    ]
    assert outcome.details["skip_reasons"] == {"cuda: no GPU": 1}


@pytest.mark.parametrize(
    ("done", "junit", "problems"),
    [
        (finished(""), ALL_PASSED, []),
        (finished("", code=-2, timed_out=True), ALL_PASSED, ["a: timeout after 12 s"]),
        (finished("", code=-9, timed_out=True), "", ["no test passed", "a: timeout after 12 s"]),
        (finished("", code=5), "<testsuite/>", ["no test passed"]),
        (finished("", code=-6), ALL_PASSED, ["a: pytest ended with exit code -6"]),
        (finished("", code=1), ALL_PASSED, ["a: pytest ended with exit code 1"]),
    ],
)
def test_ways_in_which_the_suite_ends(done, junit, problems):
    outcome = suite.judge({"a": done}, {"a": junit})
    assert outcome.state == (FAILED if problems else PASSED)
    assert outcome.problems == problems


def test_the_suite_is_run_file_by_file(monkeypatch, tmp_path):
    assert {"test_forward.py", "test_modules.py"} < set(suite.files())
    assert not set(suite.LEFT_OUT) & set(suite.files())
    seen = {}

    def run_all(wanted, seconds, at_once):
        for name, command in wanted.items():
            seen[name] = command[-2]
            Path(command[-1].partition("=")[2]).write_text(ALL_PASSED)
        return {name: finished("") for name in wanted}

    monkeypatch.setattr(suite, "run_all", run_all)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 << 30, 20 << 30))
    outcome = suite.step(10, Folder(tmp_path))
    assert seen["test_forward.py"] == "tests/test_forward.py"
    assert outcome.summary == f"{len(suite.files())} passed, 0 failed, 0 skipped"


def shell(script):
    return ["sh", "-c", script]


def test_programs_end_in_time_with_all_they_started(monkeypatch):
    monkeypatch.setattr(commands, "GRACE", 0.2)
    begin = time.monotonic()
    wanted = {"a": shell("echo begun; sleep 60 & sleep 60"), "b": shell("echo done; exit 3")}
    done = commands.run_all(wanted, 0.6, at_once=2)
    assert time.monotonic() - begin < 30
    assert (done["a"].text, done["a"].timed_out) == ("begun\n", True)
    assert (done["b"].code, done["b"].text, done["b"].timed_out) == (3, "done\n", False)


def test_a_program_that_was_never_asked_to_end_is_out_of_time_as_well(monkeypatch):
    """On a busy machine nobody looks at it between the last call and the end."""
    monkeypatch.setattr(commands, "GRACE", 0.0)
    assert commands.run(shell("sleep 60"), 0.2).timed_out


def test_a_program_that_is_asked_to_end_may_still_write():
    done = commands.run(shell("trap 'echo results; exit' INT; sleep 60 & wait"), 1.5)
    assert (done.text, done.timed_out) == ("results\n", True)


def test_programs_that_do_not_get_their_turn():
    done = commands.run_all({"long": shell("sleep 60"), "short": shell("")}, 0.4, at_once=1)
    assert done["short"] == Finished(-1, "not begun", 0.0, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("main", [program.main, lambda _: architecture.main()])
def test_without_a_gpu(main, capsys):
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("benchmarks.gpu: no CUDA device is seen by torch")
    assert printed.err.count("\n") == 1


def test_commit_and_what_differs_from_it(monkeypatch):
    answers = {"rev-parse": "abc", "status": " M setup.py"}
    monkeypatch.setattr(stamp, "printed", lambda command: answers[command[3]])
    assert stamp.commit() == "abc-dirty"
    answers["status"] = ""
    assert stamp.commit() == "abc"
    answers["rev-parse"] = ""
    assert stamp.commit() == "unknown"


def test_programs_that_are_missing_say_nothing():
    assert stamp.printed([os.devnull + "/none"]) == ""
