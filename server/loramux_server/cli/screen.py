"""What a person sees: tables and bars on a terminal, by rich; plain columns, or nothing, where no terminal is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows under the names of their columns, if these have any."""
    if not sys.stdout.isatty():
        lines = [columns, *rows] if columns else rows
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=box.SIMPLE_HEAD, show_header=bool(columns), pad_edge=False)
    for row in rows:
        table.add_row(Text(row[0], style="bold"), *map(Text, row[1:]))
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
    with Progress(*columns, console=Console(file=stream)) as progress:
        task = progress.add_task("upload")
        yield lambda done, total: progress.update(task, completed=done, total=total)
