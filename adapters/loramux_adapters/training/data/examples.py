"""Examples from files: JSONL and CSV, read strictly; whatever is wrong is said with its line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from loramux_adapters.artifact.reading.strict_json import StrictJSONError, parse_object, quoted
from loramux_adapters.errors import DataError
from loramux_adapters.training.data.columns import Columns, read_csv
from loramux_adapters.training.data.conversation import ROLES, Example, LineError, Message, Skipped

__all__ = ["Columns", "Example", "ExampleSet", "LineError", "Message", "Skipped", "read_examples", "refusal"]

MAX_LINE = 4 << 20  # bytes; a longer line is no example but a file of another kind
SHOWN = 5  # bad lines that an error names
_BOM = b"\xef\xbb\xbf"
_JSONL = "write one JSON object per line, in UTF-8"


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """The examples of one file; `sha256` is of the file's bytes, in hex."""

    examples: tuple[Example, ...]
    skipped: tuple[Skipped, ...]
    sha256: str
    path: Path


def read_examples(path: Path, *, columns: Columns | None = None, skip_bad: bool = False) -> ExampleSet:
    """The examples of a JSONL file, or of a CSV file if `columns` says how.

    Args:
        skip_bad: leave out lines that cannot be used, each with its reason in `skipped`, instead of refusing the file.
    Raises:
        DataError: the file cannot be read, has a bad line, or has no example.
    """
    if path.suffix.lower() in (".csv", ".tsv") and columns is None:
        raise DataError(f"{path} is CSV: say which column is the prompt and which is the completion")
    if path.suffix.lower() in (".jsonl", ".json") and columns is not None:
        raise DataError(f"{path} is JSON, which has no columns: leave the settings for CSV out")
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a file")
    examples: list[Example] = []
    skipped: list[Skipped] = []
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            for found in _jsonl(file) if columns is None else read_csv(file, columns, path):
                if isinstance(found, Example):
                    examples.append(found)
                else:
                    skipped.append(Skipped(found.line, found.reason))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if skipped and not (skip_bad and examples):
        raise refusal(path, skipped, len(examples) + len(skipped))
    if not examples:
        how = _JSONL if columns is None else "write a header and one row for each example"
        raise DataError(f"{path} holds no examples; {how}")
    return ExampleSet(tuple(examples), tuple(skipped), sha256, path)


def refusal(path: Path, bad: Sequence[Skipped], total: int) -> DataError:
    """The error that names the first of the bad lines, out of `total` examples, and says what can be done."""
    lines = [f"{path}: {len(bad)} of {total} examples cannot be used", *(f"  {each}" for each in bad[:SHOWN])]
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN} more")
    usable = len(bad) < total
    lines.append("Repair them, or leave them out with --skip-bad." if usable else "None is left; repair the file.")
    return DataError("\n".join(lines))


def _jsonl(file: BinaryIO) -> Iterator[Example | LineError]:
    line = 0
    while raw := file.readline(MAX_LINE + 1):
        line += 1
        if len(raw) > MAX_LINE:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE)
            yield LineError(line, f"has more than {MAX_LINE >> 20} MiB; {_JSONL}")
            continue
        raw = raw.removeprefix(_BOM) if line == 1 else raw
        if raw.strip():
            try:
                yield _example(raw, line)
            except LineError as error:
                yield error


def _example(raw: bytes, line: int) -> Example:
    """Raises LineError."""
    try:
        record = parse_object(raw, limit=MAX_LINE)
    except StrictJSONError as error:
        start = "is a list" if raw.lstrip().startswith(b"[") else str(error)
        raise LineError(line, f"{start}; {_JSONL}") from error
    if record.keys() == {"prompt", "completion"}:
        pair = (("prompt", "user"), ("completion", "assistant"))
        return Example(tuple(Message(role, _text(record[key], repr(key), line)) for key, role in pair), line, True)
    if record.keys() != {"messages"}:
        named = ", ".join(quoted(name, 40) for name in list(record)[:SHOWN]) or "nothing"
        raise LineError(line, f"names {named}; it must name 'messages', or 'prompt' and 'completion', and nothing else")
    return Example(_conversation(record["messages"], line), line)


def _conversation(value: object, line: int) -> tuple[Message, ...]:
    """Raises LineError."""
    if not isinstance(value, list) or not value:
        raise LineError(line, "has 'messages' that are not a list of at least two messages")
    messages = []
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, dict) or entry.keys() != {"role", "content"}:
            raise LineError(line, f"has a message {number} that is not an object of just 'role' and 'content'")
        role = entry["role"]
        if role not in ROLES:
            shown = quoted(role, 40) if isinstance(role, str) else "no text"
            raise LineError(line, f"has {shown} as the role of message {number}; it must be one of {', '.join(ROLES)}")
        messages.append(Message(role, _text(entry["content"], f"the content of message {number}", line)))
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise LineError(line, "has no assistant message, so there is nothing to learn; add the answer")
    if roles[-1] != "assistant":
        raise LineError(line, f"ends with a {roles[-1]} message; the last must be the assistant's answer")
    if roles[0] == "assistant":
        raise LineError(line, "starts with an assistant message; put before it what it answers")
    return tuple(messages)


def _text(value: object, what: str, line: int) -> str:
    """Raises LineError."""
    if not isinstance(value, str):
        raise LineError(line, f"has no text as {what}; it must be a string")
    if not value.strip():
        raise LineError(line, f"has an empty text as {what}; fill it, or take the line out")
    return value
