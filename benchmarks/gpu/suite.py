"""The test suite on backend `cuda`: a process a file, as nothing but pytest is asked for."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..outcome import FAILED, PASSED, Folder, Outcome
from .commands import ROOT, Finished, run_all, tail

SELECTION = "cuda"
# Their tests of that name are about compiling, which needs no GPU.
LEFT_OUT = ("test_build.py", "test_cuda_code.py")
MOST_AT_ONCE = 12
BYTES_A_PROCESS = 2 << 30  # a context of CUDA, its modules, and a test's tensors
SHOWN = 4  # lines of a failure's message: of a comparison the last one says how far apart
FINE = (0, 1, 5)  # exit codes: all passed, some failed, none selected


def step(seconds: float, folder: Folder) -> Outcome:
    """Run it, as many files at a time as cores and memory of the device allow."""
    with tempfile.TemporaryDirectory() as temporary:
        results = {name: Path(temporary) / f"{name}.xml" for name in files()}
        pytest = [sys.executable, "-m", "pytest", "-q", "-k", SELECTION, "-p", "no:cacheprovider"]
        commands = {
            name: [*pytest, f"tests/{name}", f"--junit-xml={file}"]
            for name, file in results.items()
        }
        finished = run_all(commands, seconds, at_once())
        texts = {n: file.read_text() for n, file in results.items() if file.exists()}
    return judge(finished, texts)


def files() -> list[str]:
    """Names of the files of tests."""
    return sorted(f.name for f in (ROOT / "tests").glob("test_*.py") if f.name not in LEFT_OUT)


def at_once() -> int:
    """Processes that share the device."""
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(MOST_AT_ONCE, os.cpu_count() or 1, free // BYTES_A_PROCESS))


def judge(finished: Mapping[str, Finished], junit: Mapping[str, str]) -> Outcome:
    """From how pytest ended for each file, and what it wrote."""
    total = {"passed": 0, "failed": 0, "skipped": 0}
    failures, reasons, ends, output = [], Counter(), [], []
    for name, done in finished.items():
        found = parse_junit(junit.get(name, ""))
        failures += found["failures"]
        reasons.update(found["skip_reasons"])
        total = {key: count + found[key] for key, count in total.items()}
        if done.timed_out:
            ends.append(f"{name}: timeout after {done.seconds:.0f} s")
        elif done.code not in FINE or (done.code == 1 and not found["failed"]):
            ends.append(f"{name}: pytest ended with exit code {done.code}")
        else:
            continue
        output += [f"{name}: {line}" for line in tail(done.text, 30)]
    problems = ends + [f"{f['name']}: {f['message']}" for f in failures]
    if not total["passed"]:
        problems.insert(0, "no test passed")
    summary = "{passed} passed, {failed} failed, {skipped} skipped".format_map(total)
    seconds = {name: round(done.seconds, 1) for name, done in finished.items()}
    details = {**total, "failures": failures, "skip_reasons": dict(reasons.most_common())}
    details |= {"files": seconds, "output": output}
    return Outcome(FAILED if problems else PASSED, summary, problems, details)


def parse_junit(text: str) -> dict[str, Any]:
    """Counts, the failures with the first lines of their message, and reasons of skips."""
    failures, reasons, passed = [], Counter(), 0
    for case in _cases(text):
        wrong = [child for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped")
        if wrong:
            name = f"{case.get('classname', '')}::{case.get('name', '')}"
            failures.append({"name": name, "message": _beginning(wrong[0].get("message"), SHOWN)})
        elif skipped is not None:
            reasons[_beginning(skipped.get("message"), 1)] += 1
        else:
            passed += 1
    return {
        "passed": passed,
        "failed": len(failures),
        "skipped": reasons.total(),
        "failures": failures,
        "skip_reasons": dict(reasons),
    }


def _cases(text: str) -> list[ElementTree.Element]:
    try:
        return list(ElementTree.fromstring(text).iter("testcase"))
    except ElementTree.ParseError:  # pytest was ended before it wrote anything
        return []


def _beginning(message: str | None, lines: int) -> str:
    """The first lines that are not empty, in one."""
    told = (line.strip() for line in (message or "").splitlines() if line.strip())
    return " ".join(itertools.islice(told, lines))
