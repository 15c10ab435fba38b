"""CSV rows as examples: which column is what, and strict reading with the line of whatever is wrong."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, NoReturn

from loramux_adapters.artifact.reading.strict_json import quoted
from loramux_adapters.errors import DataError
from loramux_adapters.training.data.conversation import Example, LineError, Message

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """How the rows of a CSV file become examples. Raises DataError.

    Attributes:
        prompt: column of the user's text.
        completion: column of the answer.
        template: the user's message, with `{column}` for a column's text and `{{` for a brace; empty means the prompt
            column as it is.
        system: a system message that every example begins with; empty means none.
        labels: what the completion column holds -> the answer to learn; empty means the column as it is.
        delimiter: the character between two fields.
    """

    prompt: str
    completion: str
    template: str = ""
    system: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    delimiter: str = ","

    def __post_init__(self) -> None:
        if not self.prompt or not self.completion:
            raise DataError("CSV needs the name of its prompt column and the name of its completion column")
        if self.prompt == self.completion:
            raise DataError(f"the prompt and the completion are both in column {self.prompt!r}; name two columns")
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise DataError(f"the CSV delimiter must be one character, got {self.delimiter!r}")
        fields = list(_FIELD.finditer(self.template))
        if any(match.group() in ("{", "}") for match in fields):
            raise DataError("the CSV template has a single brace; write {{ and }} for braces that are not columns")
        if self.template and self.prompt not in [match.group(1) for match in fields]:
            raise DataError(
                f"the CSV template does not use the prompt column: write {{{self.prompt}}} where it belongs"
            )

    @staticmethod
    def parse_labels(text: str) -> tuple[tuple[str, str], ...]:
        """The mapping that "0=ham,1=spam" means. Raises DataError."""
        pairs = [tuple(part.strip() for part in entry.split("=", 1)) for entry in text.split(",")] if text else []
        if any(len(pair) != 2 or not all(pair) for pair in pairs):
            raise DataError(f"labels must look like 0=ham,1=spam, got {text!r}")
        if len({pair[0] for pair in pairs}) != len(pairs):
            raise DataError(f"labels name the same value twice: {text!r}")
        return tuple((pair[0], pair[1]) for pair in pairs)

    def read(self, row: dict[str, str], line: int) -> Example:
        """The example in this row. Raises LineError."""
        for name in (self.prompt, self.completion):
            if not row[name].strip():
                raise LineError(line, f"has nothing in column {name!r}")
        answer = row[self.completion]
        if self.labels:
            known = dict(self.labels)
            if answer.strip() not in known:
                named = ", ".join(f"{value}={label}" for value, label in self.labels)
                raise LineError(
                    line, f"has {quoted(answer, 40)} in column {self.completion!r}; the labels name {named}"
                )
            answer = known[answer.strip()]
        return Example(
            (
                *([Message("system", self.system)] if self.system else []),
                Message("user", self._fill(row) if self.template else row[self.prompt]),
                Message("assistant", answer),
            ),
            line,
            is_pair=True,
        )

    def columns(self) -> set[str]:
        """All columns that must be there."""
        used = {match.group(1) for match in _FIELD.finditer(self.template) if match.group(1) is not None}
        return used | {self.prompt, self.completion}

    def _fill(self, row: dict[str, str]) -> str:
        return _FIELD.sub(
            lambda match: match.group()[0] if match.group(1) is None else row[match.group(1)], self.template
        )


def read_csv(file: BinaryIO, columns: Columns, path: Path) -> Iterator[Example | LineError]:
    """What each row after the header is; `path` is for messages. Raises DataError: the header does not fit."""
    # bytes that are not UTF-8 become surrogates, so that the one row is bad and not the whole file
    with TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, delimiter=columns.delimiter, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{path}, line 1 is no CSV header: {error}") from error
        _check_header(header, columns, path)
        while True:
            line = reader.line_num + 1  # a quoted field may hold newlines: where the row starts, not where it ends
            try:
                row = next(reader)
                if row:
                    yield _csv_example(row, header, columns, line)
            except StopIteration:
                return
            except csv.Error as error:
                yield LineError(line, f"is no CSV: {error}; is a quotation mark not closed?")
            except LineError as error:
                yield error


def _csv_example(row: list[str], header: list[str], columns: Columns, line: int) -> Example:
    """Raises LineError."""
    if len(row) != len(header):
        raise LineError(line, f"has {len(row)} fields, the header {len(header)}; quote fields that hold the delimiter")
    if any(_SURROGATE.search(field) for field in row):
        raise LineError(line, "is not UTF-8; save the file as UTF-8")
    return columns.read(dict(zip(header, row, strict=True)), line)


def _check_header(header: list[str], columns: Columns, path: Path) -> None:
    """Raises DataError."""

    def fail(what: str) -> NoReturn:
        raise DataError(f"{path}, line 1: {what}")

    if not header:
        raise DataError(f"{path} holds no examples; write a header and one row for each example")
    if any(_SURROGATE.search(name) for name in header):
        fail("the header is not UTF-8; save the file as UTF-8")
    missing = sorted(columns.columns() - set(header))
    if missing:
        there = ", ".join(quoted(name, 40) for name in header[:20])
        fail(f"there is no column {', '.join(map(repr, missing))}; the columns are {there}")
    twice = sorted({name for name in columns.columns() if header.count(name) > 1})
    if twice:
        fail(f"two columns are called {twice[0]!r}; rename one")
