"""What was found, as Markdown: a line a step, then what is worth a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .. import variants
from ..rows import TITLES, Found
from ..tables import NETWORK_NOTE, network_table
from ..text import markdown, number
from . import targets
from .tables import (
    HOST_NOTE,
    SWEEP_NOTE,
    TIMINGS_NOTE,
    host_table,
    sweep_table,
    timing_table,
)

CELL = 160  # characters
PROBLEM = 480  # as many, in a list
TRAFFIC_NOTE = """\
Megabytes to and from the device's memory in one call, counted by ncu, beside what must move by its
plan: x, out, and what is read again and does not stay in the cache. Where less moved, the cache
still kept something at the end."""
HIDDEN = ("state", "summary", "problems", "seconds", "command", "nvidia_smi")


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
            problems = found["problems"][:50]
            lines += [f"- {one_line(problem, PROBLEM)}" for problem in problems] + [""]
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
        if long := [f"- {n}: {c['reason']}" for n, c in checks.items() if len(c["reason"]) > CELL]:
            yield from (*long, "")


def _timings(found: Found) -> Iterator[str]:
    if found.get("rows"):
        yield from ("## Targets", "", targets.table(found["rows"]), "", targets.NOTE, "")
    for direction, title in TITLES.items():
        if rows := _of(found, direction):
            yield from (f"## {title}", "", timing_table(rows, direction), "")
    yield from _left_out(found)
    if found.get("rows"):
        yield from (TIMINGS_NOTE, "")


def _traffic(found: Found) -> Iterator[str]:
    header = ["NxCxHxW, dtype, layout", "direction", "strategy", "read", "written", "planned"]
    if rows := found.get("rows"):
        body = [
            [row["name"], row["direction"], row["strategy"]]
            + [number(row[of] / 1e6, 1) for of in ("read", "written", "planned_bytes")]
            + [number(row["of_planned"], 2)]
            for row in rows
        ]
        yield from ("## Bytes moved", "", markdown([*header, "of planned"], body, left=3), "")
        yield from (TRAFFIC_NOTE, "")


def _host(found: Found) -> Iterator[str]:
    yield from ("## The host's time", "")
    if rows := [row for row in found.get("rows", ()) if "contestants" in row]:
        yield from (host_table(rows), "")
    yield from _left_out(found)
    if rows:
        yield from (HOST_NOTE, "")


def _network(found: Found) -> Iterator[str]:
    yield from ("## A whole network", "")
    rows = [row for row in found.get("rows", ()) if "contestant" in row]
    if rows:
        yield from (network_table(rows), "")
    yield from _left_out(found)
    if rows:
        yield from (NETWORK_NOTE, "")


def _variants(found: Found) -> Iterator[str]:
    yield from ("## With a norm in the spatial gate; with a residual and a ReLU", "")
    for mode in variants.MODES:
        times = {r["name"]: r["medians"] for r in found.get("rows", ()) if r.get("mode") == mode}
        if times:
            yield from (variants.table(mode, times), "")
    yield from _left_out(found)


def _sweep(found: Found) -> Iterator[str]:
    yield from ("## Streaming or resident", "")
    for direction, title in TITLES.items():
        if rows := _of(found, direction):
            yield from (f"### {title}", "", sweep_table(rows), "")
    yield from _left_out(found)
    if found.get("rows"):
        yield from (SWEEP_NOTE, "")


def _of(found: Found, direction: str) -> list[Found]:
    """Rows of one direction; those that failed have none."""
    return [row for row in found.get("rows", ()) if row.get("direction") == direction]


def _left_out(found: Found) -> Iterator[str]:
    if missing := _reasons(found.get("rows", ())):
        yield from (*(f"- {line}" for line in missing), "")
    if skipped := found.get("skipped"):
        yield from ("Skipped:", "")
        yield from (*(f"- {skip['name']}: {skip['reason']}" for skip in skipped), "")


def _reasons(rows: Any) -> list[str]:
    """Why contestants are missing, each reason once."""
    lines = []
    for row in rows:
        direction = TITLES.get(row.get("direction"), row["name"])
        lines += [f"{direction}: {n} is missing: {w}" for n, w in row.get("missing", {}).items()]
        for name, timing in row.get("contestants", {}).items():
            if "no_graph" in timing:
                lines.append(f"{direction}: {name} is not in a graph: {timing['no_graph']}")
    return list(dict.fromkeys(lines))


def _sanitizers(found: Found) -> Iterator[str]:
    if tools := found.get("tools"):
        body = [
            [name, t["state"], str(t["errors"]), str(t["warnings"]), f"{t['seconds']:.0f}"]
            for name, t in tools.items()
        ]
        header = ["tool", "result", "errors", "warnings", "seconds"]
        yield from ("## compute-sanitizer", "", markdown(header, body, left=2), "")
        watched = dict.fromkeys(line for tool in tools.values() for line in tool["watched"])
        yield from (*(f"- watched, {line}" for line in watched), "")


def _environment(found: Found) -> Iterator[str]:
    yield from ("## Environment", "")
    values = {**found, **found.get("nvidia_smi", {})}
    yield from (f"- {key}: {value}" for key, value in values.items() if key not in HIDDEN)
    yield from (f"- command: `{found.get('command')}`", "")


SECTIONS = {
    "sanitizers": _sanitizers,
    "checks": _checks,
    "traffic": _traffic,
    "host": _host,
    "timings": _timings,
    "network": _network,
    "variants": _variants,
    "sweep": _sweep,
    "environment": _environment,
}


def one_line(text: str, most: int = CELL) -> str:
    """As a cell of a table, or an entry of a list."""
    short = " ".join(text.split()).replace("|", "\\|")
    return short if len(short) <= most else f"{short[: most - 3]}..."
