"""What a person sees: tables and bars on a terminal, by rich; plain columns, or nothing, where no terminal is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from loramux_server.plain_text import columns_of, for_reader, printable, wrapped

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

BAR_SECONDS = 0.2  # least time between two drawings
_NO_BREAK = "\xa0"  # a space at which no line is broken
LEAST_REMARK = 12  # columns that the remarks of a table need at least, where there are any
LINE_SECONDS = 30.0  # between two lines where there is no terminal


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False, stacks: bool = False
) -> None:
    """Prints rows under the names of their columns, if these have any; `numbers` stand to the right.

    Args:
        stacks: the last column is remarks, which wrap; where the terminal is too narrow for the others, each row
            becomes a line with its first cell and some with the others.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    width = columns_of(sys.stdout)
    if (
        stacks
        and width is not None
        and _width([columns, *([*row[:-1], row[-1][:LEAST_REMARK]] for row in rows)]) > width
    ):
        for name, *cells in rows:
            print(name)
            told = [f"{label} {cell}" for label, cell in zip(columns[1:], cells, strict=True) if cell not in ("", "-")]
            whole = ", ".join(each.replace(" ", _NO_BREAK) for each in told)
            print(wrapped(f"  {whole}", width).replace(_NO_BREAK, " "))
        return
    if width is None:
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

    table = Table(
        box=box.SIMPLE_HEAD if columns else None,
        show_header=bool(columns),
        padding=(0, 1, 0, 0) if columns else (0, 1),
        pad_edge=False,
    )
    for at in range(len(rows[0])):
        table.add_column(
            Text(columns[at]) if columns else "",
            justify="right" if numbers and at else "left",
            style="" if at else "bold",
            overflow="fold",
            no_wrap=stacks and at < len(rows[0]) - 1,
        )
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _width(lines: Sequence[Sequence[str]]) -> int:
    """Of a table as it is drawn on a terminal."""
    return sum(max(map(len, cells)) + 2 for cells in zip(*lines, strict=True))


class TransferBar:
    """How much of an upload is sent, on a terminal; lines about it everywhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn: tuple[Progress, TaskID] | None = None

    def show(self, done: int, total: int) -> None:
        """Tells the bytes sent so far and in all. A bar is drawn once something is sent."""
        if not self._stream.isatty():
            return
        progress, task = self._drawn = self._drawn or self._begin()
        what = "the server tries it out" if done == total else "upload"
        progress.update(task, completed=done, total=total, description=what)
        progress.start()  # if it is not yet

    def line(self, text: str) -> None:
        """Adds a line in place of the bar: what that said of an upload that starts anew is no longer so."""
        if self._drawn is not None:
            self._drawn[0].live.transient = True
        self.end()
        self._stream.write(f"{for_reader(text, self._stream)}\n")
        self._stream.flush()

    def end(self) -> None:
        """Leaves the bar as it is; what comes next is written below."""
        if self._drawn is not None:
            self._drawn[0].stop()
            self._drawn = None

    def _begin(self) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn

        size = DownloadColumn(binary_units=True)
        bar = BarColumn(bar_width=_bar_width(self._stream))
        text = TextColumn("{task.description}")
        progress = Progress(bar, TaskProgressColumn(), size, text, console=Console(file=self._stream))
        return progress, progress.add_task("upload", total=None)


def _bar_width(stream: TextIO) -> int:
    return 24 if (columns_of(stream) or 0) >= 100 else 10


class LineBar:
    """How far a long work is: a bar and a text that are drawn in place on a terminal; elsewhere a line now and then.

    It draws when it is told something, in the thread that tells it.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._pause = BAR_SECONDS if stream.isatty() else LINE_SECONDS
        self._shown_at: float | None = None
        self._drawn: tuple[Progress, TaskID] | None = None

    def show(self, text: str, done: int = 0, total: int = 0, *, new: bool = False) -> None:
        """Tells how far it is; what comes too soon after another is left out, but for the end. No total, no bar.

        Args:
            new: other work than before: a bar shows it at once.
        """
        now = self._clock()
        at_once = 0 < total <= done or (new and self._stream.isatty())
        if self._shown_at is not None and now - self._shown_at < self._pause and not at_once:
            return
        self._shown_at = now
        if not self._stream.isatty():
            self.line(text)
            return
        progress, task = self._drawn = self._drawn or self._begin()
        progress.update(task, description=printable(text))
        if total:
            progress.update(task, completed=done, total=total)
        progress.start()  # if it is not yet
        progress.refresh()

    def line(self, text: str) -> None:
        """Adds a line above the bar."""
        text = for_reader(text, self._stream)
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
            BarColumn(bar_width=_bar_width(self._stream)),
            share,
            text,
            console=Console(file=self._stream),
            auto_refresh=False,
        )
        return progress, progress.add_task("", total=None)
