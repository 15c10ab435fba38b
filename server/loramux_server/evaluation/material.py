"""What an evaluation is made from, read before libraries are imported: examples, what adapters say of themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramux_adapters.artifact.format import CARD_FILE, WEIGHTS_FILE, pair_up, read_header
from loramux_adapters.training.data.columns import Columns
from loramux_adapters.training.data.conversation import Example
from loramux_adapters.training.data.examples import ExampleSet, read_examples
from loramux_adapters.training.recipe import QUANTIZATIONS

SMALLEST_ROOM = 8  # rank that there is room for at least
_JSON = (".json", ".jsonl")


def read_held(
    data: Path, train: Path | None, columns: Columns | None, *, skip_bad: bool = False, limit: int = 0
) -> tuple[ExampleSet, Sequence[Example], list[str]]:
    """Held-out examples, training examples, and what is to be said of them. Raises DataError.

    Args:
        limit: take the first so many held-out examples; 0 takes all.
    """
    mixed = train is not None and (data.suffix in _JSON) != (train.suffix in _JSON)

    def read(path: Path) -> ExampleSet:
        return read_examples(path, columns=None if mixed and path.suffix in _JSON else columns, skip_bad=skip_bad)

    held, notes = read(data), []
    if held.skipped:
        notes.append(f"{len(held.skipped)} lines of {data.name} cannot be used and were left out.")
    if 0 < limit < len(held.examples):
        notes.append(f"Only the first {limit:,} of {len(held.examples):,} examples are used.")
        held = ExampleSet(held.examples[:limit], held.skipped, held.sha256, held.path)
    return held, read(train).examples if train is not None else (), notes


def trained_on(directory: Path) -> str:
    """Which precision of the base an adapter was trained on, by its card; NF4 where it has none."""
    try:
        card: Any = json.loads((directory / CARD_FILE).read_text(encoding="utf-8"))
        quantize = card["recipe"]["quantize"]
    except (OSError, ValueError, KeyError, TypeError):
        return "nf4"
    return str(quantize) if quantize in QUANTIZATIONS else "nf4"


def largest_rank(directories: Sequence[Path]) -> int:
    """The largest rank of these adapters, which there must be room for. Raises AdapterRejected."""
    ranks = [
        pair.rank for directory in directories for pair in pair_up(read_header(directory / WEIGHTS_FILE)).pairs.values()
    ]
    return max([SMALLEST_ROOM, *ranks])
