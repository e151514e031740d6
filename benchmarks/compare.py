"""``python -m benchmarks.compare OLD NEW``: two folders of results side by side.

For every row and contestant that both have, of the block, over threads, and of the network:
microseconds, their ratio, and whether that is more than noise. "fused" is what a user got in each,
whichever strategy that was. Then what only one has. Exit code 1 where the fused block, or a
network with it, became slower, or where a row failed that was timed before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import report
from .network import by_setting
from .outcome import Folder
from .rows import Found, fused, geometric_mean
from .text import markdown, microseconds, number

LEAST = 0.05  # differences below are noise, however narrow the quartiles
FASTER, SLOWER, SAME = "faster", "SLOWER", ""
FUSED = ("fused", "ended")  # of which a loss counts
NETWORK = "network"  # instead of a row's name, beside the setting
FACTS = ("device", "cpu_target", "torch", "commit", "date")
METHODS = ("graph", "launched")  # the first that both have been timed by

Timings = dict[tuple[str, str], dict[str, Found]]  # by row and direction, then by contestant


class Change(NamedTuple):
    """A contestant's time in both."""

    row: str
    direction: str
    contestant: str
    old: Found
    new: Found

    @property
    def ratio(self) -> float:
        """New time over old time."""
        return float(self.new["median"] / self.old["median"])

    @property
    def verdict(self) -> str:
        """Beyond noise: medians differ by LEAST or more, and the quartiles do not overlap."""
        if self.ratio > 1 + LEAST and self.new["lower"] > self.old["upper"]:
            return SLOWER
        if self.ratio < 1 / (1 + LEAST) and self.new["upper"] < self.old["lower"]:
            return FASTER
        return SAME


def of_blocks(rows: Sequence[Found]) -> Timings:
    """All timings of rows of one block, also over threads."""
    found: Timings = {}
    for row in rows:
        if "error" in row:
            continue
        name = f"{row['name']}, {row['threads']} threads" if "threads" in row else row["name"]
        own = found[name, row["direction"]] = dict(row["contestants"])
        if fused(row) in own:
            own["fused"] = own[fused(row)]
    return found


def of_networks(rows: Sequence[Found]) -> Timings:
    """All timings of rows of the network."""
    return {
        (NETWORK, setting): {n: {"launched": row["microseconds"]} for n, row in timed.items()}
        for setting, timed in by_setting(list(rows)).items()
    }


def changes(old: Timings, new: Timings) -> Iterator[Change]:
    """Of what both have, in the order of the new one."""
    for key, contestants in new.items():
        for name, found in contestants.items():
            was = old.get(key, {}).get(name, {})
            if both := [method for method in METHODS if method in was and method in found]:
                yield Change(*key, name, was[both[0]], found[both[0]])


def render(found: Sequence[Change], names: Sequence[str]) -> str:
    """A table of the wanted contestants, and the geometric mean of each one's ratios."""
    header = ["row", "direction", "contestant", "old us", "new us", "new/old", ""]
    body = [
        [
            change.row,
            change.direction,
            change.contestant,
            microseconds(change.old["median"]),
            microseconds(change.new["median"]),
            number(change.ratio, 2),
            change.verdict,
        ]
        for change in found
        if change.contestant in names
    ]
    lines = [markdown(header, body, left=3), ""]
    for name in dict.fromkeys(change.contestant for change in found):
        mean = geometric_mean(change.ratio for change in found if change.contestant == name)
        lines.append(f"{name}: {number(mean, 3)} of the old time, geometric mean")
    return "\n".join(lines)


class Run(NamedTuple):
    """A folder of results."""

    facts: str  # of what run it is
    timings: Timings
    failed: dict[str, str]  # by row, why it is none


def read(path: Path) -> Run:
    """A folder.

    Raises:
        SystemExit: there are no results.
    """
    files = report.read(Folder(path)) if path.is_dir() else {}
    rows = {name: data["rows"] for name, data in files.items() if data}
    if not rows:
        wanted = " or ".join(f"{name}.json" for name in report.FILES)
        raise SystemExit(f"expected a folder with {wanted}, got {path}")
    found: Timings = {}
    for name, of in rows.items():
        found |= of_networks(of) if name == "network" else of_blocks(of)
    facts = [
        {n: data.get("environment", {}).get(n) for n in FACTS} for data in files.values() if data
    ]
    said = dict.fromkeys(", ".join(str(v) for v in of.values() if v) for of in facts)
    failed = {row["name"]: row["error"] for of in rows.values() for row in of if "error" in row}
    return Run("; ".join(filter(None, said)), found, failed)


def only_in_one(old: Run, new: Run) -> list[str]:
    """Lines about rows that cannot be compared."""
    lines = []
    for title, one, other in (("old", old, new), ("new", new, old)):
        there = row_names(other)
        if names := [name for name in row_names(one) if name not in there]:
            lines.append(f"only in the {title} one: {', '.join(names)}")
    return lines + [f"FAILED in the new one: {name}: {why}" for name, why in new.failed.items()]


def row_names(run: Run) -> list[str]:
    """Of what was timed; of the network's settings."""
    names = (kind if name == NETWORK else name for name, kind in run.timings)
    return list(dict.fromkeys(names))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="every contestant, not only fused")
    options = parser.parse_args(arguments)
    old, new = read(options.old), read(options.new)
    for title, path, run in (("old", options.old, old), ("new", options.new, new)):
        print(f"{title}: {path}, {run.facts}".rstrip(", "))
    print()
    found = list(changes(old.timings, new.timings))
    if found:
        print(render(found, [c.contestant for c in found] if options.all else FUSED))
    else:
        print("no row is in both")
    print("\n".join(["", *only_in_one(old, new)]))
    slower = any(c.verdict == SLOWER and c.contestant in FUSED for c in found)
    lost = any(name in new.failed for name in row_names(old))
    return int(not found or slower or lost)


if __name__ == "__main__":
    sys.exit(main())
