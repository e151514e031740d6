"""Words and tables of reports."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def shape_name(shape: Iterable[int]) -> str:
    """As in the tables: 8x256x56x56."""
    return "x".join(map(str, shape))


def slugify(text: str) -> str:
    """`text` as a file name: lower-case words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def markdown(header: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table: so many columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (w + 2) if index < left else "-" * (w + 1) + ":" for index, w in enumerate(widths)
    ]
    return "\n".join([line(header), f"|{'|'.join(rule)}|", *map(line, body)])


def number(value: float | None, digits: int) -> str:
    """A cell."""
    return "-" if value is None else f"{value:.{digits}f}"


def microseconds(value: float | None) -> str:
    """A cell, of three digits or more."""
    return number(value, 0 if value is not None and value >= 100 else 1)
