"""Puts an evaluation in process together: bases one at a time, and on each the adapters that belong to it."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loramux_adapters.artifact.format import CARD_FILE, WEIGHTS_FILE, pair_up, read_header
from loramux_adapters.evaluation.evaluated import Evaluation, Role
from loramux_adapters.evaluation.report import heading, sections, text_report
from loramux_adapters.training.data.columns import Columns
from loramux_adapters.training.data.conversation import Example
from loramux_adapters.training.data.examples import ExampleSet, read_examples
from loramux_adapters.training.recipe import QUANTIZATIONS
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.base.source import Report
from loramux_server.cli.screen import print_table
from loramux_server.config.environment import kernels_of
from loramux_server.engine.local_engine import LocalAdapter, LocalEngine
from loramux_server.evaluation.contenders import Contender, Subject
from loramux_server.evaluation.local_scorer import LocalScorer
from loramux_server.kernels.choice import choose_kernels

SMALLEST_ROOM = 8  # rank that there is room for at least
_JSON = (".json", ".jsonl")


class Bases:
    """One base in one precision at a time, on the serving path.

    Attributes:
        opened: the last base that was loaded.
    """

    def __init__(self, spec: str, *, device: torch.device, cache_dir: Path, max_rank: int, report: Report) -> None:
        self._spec, self._device, self._cache_dir = spec, device, cache_dir
        self._max_rank, self._report = max_rank, report
        self._engine: LocalEngine | None = None
        self._quantize = ""

    def engine(self, quantize: str) -> LocalEngine:
        """The base in this precision; one of another precision is let go first. Raises BaseModelError."""
        if self._engine is None or self._quantize != quantize:
            self._engine = None
            gc.collect()
            base = self._load(quantize)
            self._engine = LocalEngine.open(base, max_rank=self._max_rank)
            self._quantize = quantize
        return self._engine

    def subject(self, quantize: str, notes: Sequence[str] = ()) -> Subject:
        """This base in an evaluation's words."""
        engine = self.engine(quantize)
        base = engine.base
        return Subject(
            base=base.name,
            base_id=base.base_id,
            quantize=quantize,
            from_gguf=base.source.from_gguf,
            numerics_id=engine.numerics_id,
            notes=tuple(notes),
        )

    def _load(self, quantize: str) -> BaseModel:
        return load_base_model(
            self._spec,
            device=self._device,
            cache_dir=self._cache_dir,
            report=self._report,
            quantize=quantize,
            kernels=choose_kernels(self._device, kernels_of(os.environ)),
        )


def contender(bases: Bases, name: str, role: Role, directory: Path | None, quantize: str) -> Contender:
    """An adapter, or with None the bare base, to be opened when its turn comes."""
    loaded: list[LocalAdapter] = []

    def start() -> LocalScorer:
        engine = bases.engine(quantize)
        if directory is not None:
            loaded.append(engine.load(directory))
        return LocalScorer(engine, loaded[0] if loaded else None)

    def stop() -> None:
        while loaded:
            bases.engine(quantize).unload(loaded.pop())

    return Contender(name, role, start, stop)


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


def print_report(evaluation: Evaluation) -> None:
    """The whole report: as text, with tables drawn on a terminal."""
    print()
    if not sys.stdout.isatty():
        print(text_report(evaluation))
        return
    print("\n".join(heading(evaluation)))
    for section in sections(evaluation):
        print(f"\n{section.title}")
        if section.rows:
            print_table(section.rows[0], section.rows[1:], numbers=True)
        else:
            print("\n".join(section.lines))


def written(paths: Sequence[Path]) -> str:
    """One line on where the files of an evaluation are."""
    return f"written to {paths[0].parent}: {', '.join(path.name for path in paths)}"
