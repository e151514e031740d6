"""What a reader sees while rows are taken: a bar over a growing table, or plain lines in a pipe."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .rows import Row, fused, median, speedup
from .tables import best
from .text import microseconds, number

COLUMNS = ("problem", "direction", "copy", "eager", "fused", "eager/fused", "best/fused")
AROUND_LINES = 6  # of a terminal: the bar, the table's frame and head, and the cursor's

Say = Callable[[str, list[Row]], None]  # what has just been done, and the rows that it gave


@contextlib.contextmanager
def shown(seconds: float, console: Console | None = None) -> Iterator[Say]:
    """Calls of what is yielded are shown while the context lasts, about so many seconds."""
    console = console or Console()
    with (_terminal if console.is_terminal else _pipe)(seconds, console) as say:
        yield say


@contextlib.contextmanager
def _pipe(seconds: float, console: Console) -> Iterator[Say]:
    def say(what: str, rows: list[Row]) -> None:
        for cells in map(_cells, rows):
            console.print("  ".join(cells), highlight=False, soft_wrap=True)
        if not rows:
            console.print(what, highlight=False, soft_wrap=True)

    yield say


@contextlib.contextmanager
def _terminal(seconds: float, console: Console) -> Iterator[Say]:
    began, lines = time.monotonic(), []
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    task = bar.add_task("", total=seconds)

    def table() -> Table:
        found = Table()
        for index, name in enumerate(COLUMNS):
            found.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
        for cells in lines[-max(1, console.height - AROUND_LINES) :]:
            found.add_row(*cells)
        return found

    with Live(Group(bar, table()), console=console) as live:

        def say(what: str, rows: list[Row]) -> None:
            lines.extend(map(_cells, rows))
            bar.update(task, description=what, completed=time.monotonic() - began)
            live.update(Group(bar, table()))

        yield say


def _cells(row: Row) -> list[str]:
    if "contestants" not in row:
        what = row.get("error") or f"{row.get('milliseconds', 0):.1f} ms"
        return [row["name"], what, *[""] * (len(COLUMNS) - 2)]
    times = (microseconds(median(row, name)) for name in ("copy", "eager", fused(row)))
    ratios = (number(ratio, 2) for ratio in (speedup(row, "eager"), best(row)))
    return [row["name"], row["direction"], *times, *ratios]
