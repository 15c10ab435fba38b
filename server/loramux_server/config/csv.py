"""The settings for CSV that several commands have in common, as the columns they mean."""

from __future__ import annotations

from typing import Protocol

from loramux_adapters.errors import DataError
from loramux_adapters.training.data.columns import Columns


class CsvSettings(Protocol):
    """Settings of a command that reads examples; None is not given."""

    @property
    def csv_prompt(self) -> str | None: ...

    @property
    def csv_completion(self) -> str | None: ...

    @property
    def csv_template(self) -> str | None: ...

    @property
    def csv_system(self) -> str | None: ...

    @property
    def csv_labels(self) -> str | None: ...

    @property
    def csv_delimiter(self) -> str | None: ...


def columns_of(settings: CsvSettings) -> Columns | None:
    """How CSV is read; None if no setting says so. Raises DataError."""
    given = {
        "prompt": settings.csv_prompt,
        "completion": settings.csv_completion,
        "template": settings.csv_template,
        "system": settings.csv_system,
        "delimiter": settings.csv_delimiter,
    }
    texts = {name: text for name, text in given.items() if text is not None}
    if not texts and settings.csv_labels is None:
        return None
    if "prompt" not in texts or "completion" not in texts:
        raise DataError("CSV needs both --csv-prompt and --csv-completion")
    return Columns(**texts, labels=Columns.parse_labels(settings.csv_labels or ""))
