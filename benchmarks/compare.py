"""``python -m benchmarks.compare OLD NEW``: two folders of results side by side.

For every row and contestant that both have: microseconds, their ratio, and whether that is more
than noise. Exit code 1 where the fused block became slower.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .rows import Found, fused, geometric_mean, timing
from .text import markdown, microseconds, number

LEAST = 0.05  # differences below are noise, however narrow the quartiles
FASTER, SLOWER, SAME = "faster", "SLOWER", ""
FILE = "block.json"


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


def changes(old: Sequence[Found], new: Sequence[Found]) -> Iterator[Change]:
    """Of the rows that both have, in the order of the new ones."""
    before = {(row["name"], row["direction"]): row for row in old if "error" not in row}
    for row in new:
        was = before.get((row["name"], row.get("direction", "")))
        if was is None or "error" in row:
            continue
        for name in row["contestants"]:
            one, other = timing(was, name), timing(row, name)
            if one and other:
                shown = "fused" if name == fused(row) else name
                yield Change(row["name"], row["direction"], shown, one, other)


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


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder.

    Raises:
        SystemExit: there are none.
    """
    file = folder / FILE
    if not file.exists():
        raise SystemExit(f"expected a folder with {FILE}, got {folder}")
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="every contestant, not only fused")
    options = parser.parse_args(arguments)
    found = list(changes(read(options.old), read(options.new)))
    if not found:
        print("no row is in both")
        return 1
    print(render(found, [c.contestant for c in found] if options.all else ["fused"]))
    return int(any(c.verdict == SLOWER and c.contestant == "fused" for c in found))


if __name__ == "__main__":
    sys.exit(main())
