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
    device = next(iter(there.values()))["environment"]["device"]
    lines = [f"# CBAM on {device}", ""]
    for name, data in there.items():
        rows = [row for row in data["rows"] if "error" not in row]
        if rows:
            lines += SECTIONS[name](rows)
        if wrong := list(failed(data)):
            lines += ["Failed:", "", *(f"- {line}" for line in wrong), ""]
        lines += _left_out(data)
    lines += ["## Environment", "", *_environment(there)]
    return "\n".join(lines) + "\n"


def _environment(there: Mapping[str, Found]) -> Iterator[str]:
    """A line a fact; files of several runs may differ in it."""
    facts = {
        n: {**data["environment"], "seconds": data.get("seconds")} for n, data in there.items()
    }
    for key in dict.fromkeys(key for found in facts.values() for key in found):
        files: dict[str, list[str]] = {}
        for name, found in facts.items():
            if (value := found.get(key)) is not None:
                files.setdefault(_shown(value), []).append(name)
        one = len(files) == 1
        said = (v if one else f"{v} ({', '.join(names)})" for v, names in files.items())
        if files:
            yield f"- {key}: {'; '.join(said)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return str(value)


def _block(rows: list[Found]) -> Iterator[str]:
    for direction, title in TITLES.items():
        if of := [row for row in rows if row["direction"] == direction]:
            yield from (f"## {title}", "", tables.block_table(of), "")
            yield from (tables.copy_table(of), "")
    yield from (tables.NOTE, "")
    if any(name in row["contestants"] for row in rows for name in tables.STRATEGIES):
        yield from (tables.STRATEGIES_NOTE, "")
    yield from (f"Noise: {tables.noise(rows)}.", "")
    yield from ("## Where something else is faster", "")
    yield from ([f"- {line}" for line in tables.losses(rows)] or ["Nowhere in this table."])
    yield ""
    stages = [str(problem) for problem in in_stages(8)]
    memory = [row for row in rows if row.get("memory")]
    if of := [row for row in memory if row["name"] in stages] or memory:
        yield from ("## Memory of training", "", tables.memory_table(of), "")
        yield from (tables.memory_note(of), "")
    yield from _pictures("block")


def _pictures(file: str) -> Iterator[str]:
    for name, title in PICTURES.items():
        if FILES_OF_PICTURES.get(name, "block") == file:
            yield from (f"![{title}]({name}.svg)", "")


def _threads(rows: list[Found]) -> Iterator[str]:
    yield from ("## Threads", "", tables.threads_table(rows), "")
    yield from (f"Noise: {tables.noise(rows)}.", "")
    yield from _pictures("threads")


def _network(rows: list[Found]) -> Iterator[str]:
    yield from ("## A whole network", "", tables.network_table(rows), "", tables.NETWORK_NOTE, "")


SECTIONS: dict[str, Callable[[list[Found]], Iterator[str]]] = {
    "block": _block,
    "threads": _threads,
    "network": _network,
}


def failed(data: Mapping[str, Any]) -> Iterator[str]:
    """A line for each row that is none: what was wrong."""
    return (f"{row['name']}: {row['error']}" for row in data["rows"] if "error" in row)


def _left_out(data: Mapping[str, Any]) -> Iterator[str]:
    """What was not timed, or not as the others of its row were, and why."""
    reasons: dict[str, dict[str, None]] = {}  # in order, each name once
    for row in data["rows"]:
        for name, why in row.get("missing", {}).items():
            reasons.setdefault(f"without {name}, {why}", {})[row["name"]] = None
        for name, found in row.get("contestants", {}).items():
            if "no_graph" in found:
                why = f"{name} is in no CUDA graph, {found['no_graph']}"
                reasons.setdefault(why, {})[f"{row['name']} {row['direction']}"] = None
    for skip in data["skipped"]:
        reasons.setdefault(skip["reason"], {})[skip["name"]] = None
    if reasons:
        yield from ("Left out:", "")
        yield from (f"- {why}: {', '.join(names)}" for why, names in reasons.items())
        yield ""


def read(folder: Folder) -> dict[str, Found | None]:
    """Of a folder, by name."""
    return {name: folder.read(name) for name in FILES}
