"""What a step found, and the folder that keeps it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
REPORT = "report.md"


class SkippedError(Exception):
    """Raised by a check that cannot be made on this machine; says why."""


@dataclass(frozen=True)
class Outcome:
    """Of one step: one line about it, a line for each thing that is wrong, and the data."""

    state: str
    summary: str
    problems: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the step's file."""
        head = {"state": self.state, "summary": self.summary, "problems": self.problems}
        return {**head, **self.details}


class Folder:
    """A file a step, `<step>.json`; `stamp` becomes part of each."""

    def __init__(self, path: Path, stamp: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.stamp = dict(stamp or {})
        path.mkdir(parents=True, exist_ok=True)

    def file(self, step: str) -> Path:
        """Of a step."""
        return self.path / f"{step}.json"

    def write(self, step: str, data: Mapping[str, Any]) -> None:
        """Replace the file of a step; never leaves half a file."""
        text = json.dumps({**self.stamp, **data}, indent=1) + "\n"
        _replace(self.file(step), text)

    def read(self, step: str) -> dict[str, Any] | None:
        """What was written, or None."""
        file = self.file(step)
        found: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
        return found

    def forget(self, step: str) -> None:
        """Remove the file of a step, so that none of an earlier run is taken for this one's."""
        self.file(step).unlink(missing_ok=True)

    def write_report(self, text: str) -> None:
        """Replace the report."""
        _replace(self.path / REPORT, text)


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    os.replace(partial, file)
