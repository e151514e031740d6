"""A folder of results as one Markdown file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from . import tables
from .outcome import Folder
from .plots import FILES as FILES_OF_PICTURES
from .plots import PICTURES
from .problems import in_stages
from .rows import TITLES, Found

FILES = ("block", "threads", "network")


def render(found: Mapping[str, Found | None]) -> str:
    """The whole report, of the files there are."""
    there = {name: data for name, data in found.items() if data}
    facts = next(iter(there.values()))["environment"]
    lines = [f"# CBAM on {facts['device']}", ""]
    for name, data in there.items():
        rows = [row for row in data["rows"] if "error" not in row]
        if rows:
            lines += SECTIONS[name](rows)
        lines += _left_out(data)
    lines += ["## Environment", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items() if value is not None]
    return "\n".join(lines) + "\n"


def _block(rows: list[Found]) -> Iterator[str]:
    for direction, title in TITLES.items():
        if of := [row for row in rows if row["direction"] == direction]:
            yield from (f"## {title}", "", tables.block_table(of), "")
    yield from (tables.NOTE, "", f"Noise: {tables.noise(rows)}.", "")
    yield from ("## Where something else is faster", "")
    yield from ([f"- {line}" for line in tables.losses(rows)] or ["Nowhere in this table."])
    yield ""
    stages = [str(problem) for problem in in_stages(8)]
    memory = [row for row in rows if row.get("memory")]
    if of := [row for row in memory if row["name"] in stages] or memory:
        yield from ("## Memory of training", "", tables.memory_table(of), "")
        yield from (tables.MEMORY_NOTE, "")
    yield from _pictures("block")


def _pictures(file: str) -> Iterator[str]:
    for name, title in PICTURES.items():
        if FILES_OF_PICTURES.get(name, "block") == file:
            yield from (f"![{title}]({name}.svg)", "")


def _threads(rows: list[Found]) -> Iterator[str]:
    yield from ("## Threads", "", tables.threads_table(rows), "")
    yield from _pictures("threads")


def _network(rows: list[Found]) -> Iterator[str]:
    yield from ("## A whole network", "", tables.network_table(rows), "", tables.NETWORK_NOTE, "")


SECTIONS: dict[str, Callable[[list[Found]], Iterator[str]]] = {
    "block": _block,
    "threads": _threads,
    "network": _network,
}


def _left_out(data: Mapping[str, Any]) -> Iterator[str]:
    """What was not timed, and why."""
    reasons: dict[str, list[str]] = {}
    for row in data["rows"]:
        if "error" in row:
            reasons.setdefault(row["error"], []).append(row["name"])
        for name, why in row.get("missing", {}).items():
            if row.get("direction") == "forward":
                reasons.setdefault(f"without {name}, {why}", []).append(row["name"])
    for skip in data["skipped"]:
        reasons.setdefault(skip["reason"], []).append(skip["name"])
    if reasons:
        yield from ("Left out:", "")
        yield from (f"- {why}: {', '.join(names)}" for why, names in reasons.items())
        yield ""


def read(folder: Folder) -> dict[str, Found | None]:
    """Of a folder, by name."""
    return {name: folder.read(name) for name in FILES}
