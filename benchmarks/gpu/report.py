"""What was found, as Markdown: a line a step, then what is worth a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..report import markdown, shape_name

Found = Mapping[str, Any]
HIDDEN = ("state", "summary", "problems", "seconds", "command", "nvidia_smi")
TITLES = {"forward": "Forward", "step": "Forward + backward"}


def overview(steps: Mapping[str, Found | None]) -> str:
    """A line a step."""
    body = [
        [name, found["state"], f"{found.get('seconds', 0):.0f}", one_line(found["summary"])]
        for name, found in steps.items()
        if found
    ]
    return markdown(["step", "result", "seconds", "summary"], body, left=4)


def render(steps: Mapping[str, Found | None]) -> str:
    """The whole report, of the steps that have run."""
    environment = steps.get("environment") or {}
    lines = [f"# GPU run: {environment.get('device', 'unknown device')}", "", overview(steps), ""]
    for name, found in steps.items():
        if found and found["problems"]:
            lines += [f"## What is wrong: {name}", ""]
            lines += [f"- {one_line(problem)}" for problem in found["problems"][:50]] + [""]
    for name, section in SECTIONS.items():
        if found := steps.get(name):
            lines += [*section(found)]
            if found.get("commit") != environment.get("commit", found.get("commit")):
                lines += [f"Found on {found['date']} at commit {found['commit']}.", ""]
    return "\n".join(lines)


def _checks(found: Found) -> Iterator[str]:
    if checks := found.get("checks"):
        body = [[n, c["state"], one_line(c["reason"])] for n, c in checks.items()]
        yield from ("## Checks", "", markdown(["check", "result", "about"], body, left=3), "")


def _timings(found: Found) -> Iterator[str]:
    for direction, title in TITLES.items():
        rows = [row for row in found.get("rows", ()) if row.get("direction") == direction]
        if not rows:
            continue
        yield from (f"## {title}", "", timing_table(rows), "")
    if missing := _reasons(found.get("rows", ())):
        yield from (*(f"- {line}" for line in missing), "")
    if skipped := found.get("skipped"):
        yield from ("Skipped:", "")
        yield from (*(f"- {skip['name']}: {skip['reason']}" for skip in skipped), "")
    if found.get("rows"):
        yield from (NOTE, "")


NOTE = """\
Medians in microseconds a call. "graph": 20 calls inside of a replayed CUDA graph; "launched": calls
one after another from Python. Every sample begins with a cold L2 cache and goes through several
inputs and outputs. The copy is the memory limit: read x, write out; with backward also read x, read
out's gradient, write x's gradient; "of copy" is its time over the fused block's. GB/s counts what
the plan says the device's memory must move. torch.compile runs at one batch size only."""


def timing_table(rows: list[Found]) -> str:
    """Rows of one direction."""
    header = ["NxCxHxW", "dtype", "layout", "by", "copy", "eager", "compile", "fused"]
    header += ["eager/fused", "compile/fused", "of copy", "GB/s"]
    return markdown(header, [_cells(row) for row in rows], left=4)


def _cells(row: Found) -> list[str]:
    method = row["method"]
    times = {n: t[method]["median"] for n, t in row["contestants"].items() if method in t}
    cells = [shape_name(row["shape"]), row["dtype"], row["layout"], method]
    cells += [_number(times.get(name), 1) for name in ("copy", "eager", "compile", "fused")]
    for rival in ("eager", "compile"):
        cells.append(_number(times[rival] / times["fused"] if rival in times else None, 2))
    cells.append(_number(row["fraction_of_copy"], 2))
    return [*cells, _number(row.get("gigabytes_per_second"), 0)]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _reasons(rows: Any) -> list[str]:
    """Why contestants are missing, each reason once."""
    lines = []
    for row in rows:
        lines += [f"{n} is missing: {why}" for n, why in row.get("missing", {}).items()]
        for name, timing in row.get("contestants", {}).items():
            if "no_graph" in timing:
                lines.append(f"{name} is not in a graph: {timing['no_graph']}")
    return list(dict.fromkeys(lines))


def _sanitizers(found: Found) -> Iterator[str]:
    if tools := found.get("tools"):
        body = [
            [name, t["state"], str(t["errors"]), str(t["warnings"]), f"{t['seconds']:.0f}"]
            for name, t in tools.items()
        ]
        header = ["tool", "result", "errors", "warnings", "seconds"]
        yield from ("## compute-sanitizer", "", markdown(header, body, left=2), "")


def _environment(found: Found) -> Iterator[str]:
    yield from ("## Environment", "")
    values = {**found, **found.get("nvidia_smi", {})}
    yield from (f"- {key}: {value}" for key, value in values.items() if key not in HIDDEN)
    yield from (f"- command: `{found.get('command')}`", "")


SECTIONS = {
    "sanitizers": _sanitizers,
    "checks": _checks,
    "timings": _timings,
    "environment": _environment,
}


def one_line(text: str) -> str:
    """As a cell of a table."""
    short = " ".join(text.split()).replace("|", "\\|")
    return short if len(short) <= 160 else f"{short[:157]}..."
