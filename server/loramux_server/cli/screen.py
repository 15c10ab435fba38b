"""What a person sees: tables and bars on a terminal, by rich; plain columns, or nothing, where no terminal is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

BAR_SECONDS = 0.2  # least time between two drawings
LINE_SECONDS = 30.0  # between two lines where there is no terminal


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> None:
    """Prints rows under the names of their columns, if these have any; `numbers` stand to the right."""
    if not sys.stdout.isatty():
        lines = [columns, *rows] if columns else rows
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        for line in lines:
            cells = [f"{cell:{'>' if numbers and at else '<'}{widths[at]}}" for at, cell in enumerate(line)]
            print("  ".join(cells).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD if columns else None, show_header=bool(columns), pad_edge=False)
    for at in range(len(rows[0])):
        table.add_column(
            Text(columns[at]) if columns else "",
            justify="right" if numbers and at else "left",
            style="" if at else "bold",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


@contextmanager
def transfer_bar(stream: TextIO) -> Iterator[Callable[[int, int], None]]:
    """Gives a function that is told the bytes sent so far and in all; a terminal shows them as a bar."""
    if not stream.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TransferSpeedColumn

    columns = (BarColumn(), TaskProgressColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    progress = Progress(*columns, console=Console(file=stream))
    task = progress.add_task("upload", total=None)

    def show(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)
        progress.start()  # if it is not yet: where nothing is sent, no bar is drawn

    try:
        yield show
    finally:
        progress.stop()


class LineBar:
    """How far a long work is: a bar and a text that are drawn in place on a terminal; elsewhere a line now and then.

    It draws when it is told something, in the thread that tells it.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._pause = BAR_SECONDS if stream.isatty() else LINE_SECONDS
        self._shown_at: float | None = None
        self._drawn: tuple[Progress, TaskID] | None = None

    def show(self, text: str, done: int = 0, total: int = 0) -> None:
        """Tells how far it is; what comes too soon after another is left out, but for the end. No total, no bar."""
        now = self._clock()
        ended = 0 < total <= done
        if self._shown_at is not None and now - self._shown_at < self._pause and not ended:
            return
        self._shown_at = now
        if not self._stream.isatty():
            self.line(text)
            return
        progress, task = self._drawn = self._drawn or self._begin()
        progress.update(task, description=text)
        if total:
            progress.update(task, completed=done, total=total)
        progress.start()  # if it is not yet
        progress.refresh()

    def line(self, text: str) -> None:
        """Adds a line above the bar."""
        if self._drawn is not None:
            self._drawn[0].console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def end(self) -> None:
        """Leaves the bar as it is, on lines of its own; what comes next is written below."""
        if self._drawn is not None:
            self._drawn[0].stop()
            self._drawn = None

    def _begin(self) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
        from rich.table import Column

        share = TaskProgressColumn(table_column=Column(no_wrap=True, min_width=4))
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        progress = Progress(
            BarColumn(bar_width=24), share, text, console=Console(file=self._stream), auto_refresh=False
        )
        return progress, progress.add_task("", total=None)
