"""The data of `loramux train`: read and checked before anything is loaded, turned into tokens before the base is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux_adapters.errors import DataError
from loramux_adapters.training.data.examples import ExampleSet, read_examples
from loramux_adapters.training.data.overlap import Overlap, refuse_overlaps
from loramux_server.config.train import TrainConfig

if TYPE_CHECKING:
    from loramux_adapters.training.data.render import Rendered
    from loramux_server.base.source import BaseSource
    from loramux_server.serving.startup import Stages

REASONS_SHOWN = 3
_JSON = (".json", ".jsonl")


@dataclass(frozen=True, slots=True)
class Material:
    """What was read. `overlaps`: held-out examples that are trained on too, where that is allowed."""

    train: ExampleSet
    held: ExampleSet | None
    overlaps: list[Overlap]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was read, found and asked before libraries are imported.

    Attributes:
        base_there: id of the base on the server that is to get the adapter, where that is known.
    """

    material: Material
    source: BaseSource
    cache_dir: Path
    base_there: str | None


@dataclass(frozen=True, slots=True)
class Tokens:
    """One file as tokens, and what is to be said of it."""

    examples: ExampleSet
    rendered: Rendered

    def summary(self) -> dict[str, Any]:
        """For the card."""
        rows = self.rendered.rows
        return {
            "sha256": self.examples.sha256,
            "rows": len(rows),
            "skipped": len(self.examples.skipped) + len(self.rendered.skipped),
            "truncated": self.rendered.cut_rows,
            "tokens": sum(len(row.ids) for row in rows),
            "learned_tokens": sum(sum(row.learn[1:]) for row in rows),
        }

    def lines(self, what: str, max_length: int) -> list[str]:
        """For people."""
        counts = self.summary()
        lines = [
            f"{what:<9} {self.examples.path}: {counts['rows']:,} examples, {counts['tokens']:,} tokens, "
            f"{counts['learned_tokens']:,} of them learned"
        ]
        if counts["truncated"]:
            lines.append(
                f"          {counts['truncated']:,} of them truncated to {max_length} tokens "
                f"({self.rendered.cut_tokens:,} tokens cut); --max-length says where"
            )
        skipped = [*self.examples.skipped, *self.rendered.skipped]
        if skipped:
            more = f"; and {len(skipped) - REASONS_SHOWN} more" if len(skipped) > REASONS_SHOWN else ""
            reasons = "; ".join(str(each) for each in skipped[:REASONS_SHOWN])
            lines.append(f"          {len(skipped):,} left out: {reasons}{more}")
        return lines


def read_material(config: TrainConfig, *, skip_bad: bool, allow_overlap: bool) -> Material:
    """Reads both files and compares them; imports nothing heavy.

    Raises:
        DataError: a file cannot be used, the two overlap, or the answers do not go with the labels.
    """
    assert config.data is not None
    columns = config.columns()
    mixed = config.eval_data is not None and (config.data.suffix in _JSON) != (config.eval_data.suffix in _JSON)

    def read(path: Path) -> ExampleSet:
        of_this = None if mixed and path.suffix in _JSON else columns
        return read_examples(path, columns=of_this, skip_bad=skip_bad)

    train = read(config.data)
    held = read(config.eval_data) if config.eval_data is not None else None
    if config.label_list:
        for examples in (train, held):
            if examples is not None:
                check_labels(examples, config.label_list)
    overlaps = refuse_overlaps(train, held, allow=allow_overlap) if held is not None else []
    return Material(train, held, overlaps)


def check_labels(examples: ExampleSet, labels: list[str]) -> None:
    """Raises DataError if an answer is none of the labels, or if all are the same one."""
    for example in examples.examples:
        if example.answer.strip() not in labels:
            raise DataError(
                f"{examples.path} line {example.line}: the answer {example.answer.strip()[:40]!r} is none of --labels "
                f"{', '.join(labels)}; correct the data or the labels"
            )
    counts = Counter(example.answer.strip() for example in examples.examples)
    missing = [label for label in labels if not counts[label]]
    if missing:
        raise DataError(
            f"{examples.path} holds no example that is answered {' or '.join(map(repr, missing))}; a classifier needs "
            "examples of every label, in both files"
        )


def render(
    config: TrainConfig, material: Material, stages: Stages, source: BaseSource, *, skip_bad: bool
) -> tuple[Tokens, Tokens | None]:
    """Training and held-out examples as tokens, as the server would render them. Needs the tokenizer, not the base.

    Raises:
        BaseModelError: its tokenizer cannot be read.
        DataError: no example fits, or one cannot be rendered.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from loramux_adapters.training.data.render import Renderer
    from loramux_server.base.support import trained_context
    from loramux_server.base.tokenizer import stop_ids_of
    from loramux_server.errors import BaseModelError

    with stages.stage("turn the examples into tokens"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.directory, local_files_only=True, trust_remote_code=False)
            model_config = AutoConfig.from_pretrained(source.directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise BaseModelError(f"the base's config or tokenizer cannot be read: {error}") from error
        try:
            generation: Any = GenerationConfig.from_pretrained(source.directory, local_files_only=True)
        except OSError:  # a checkpoint may come without one
            generation = model_config
        context = trained_context(model_config) or config.max_length
        if config.max_length > context:
            stages.note(f"--max-length {config.max_length} is more than the base's context of {context}, which it gets")
        length = min(config.max_length, context)
        renderer = Renderer(tokenizer, length, stop_ids=stop_ids_of(tokenizer, generation))

        def tokens(examples: ExampleSet) -> Tokens:
            rendered = renderer.render_set(examples, skip_bad=skip_bad)
            if rendered.cut_rows == len(rendered.rows):
                raise DataError(
                    f"{examples.path}: every example is longer than {length} tokens, so none could be learned whole; "
                    f"raise --max-length (the base's context is {context}) or shorten the examples"
                )
            return Tokens(examples, rendered)

        return tokens(material.train), tokens(material.held) if material.held is not None else None


def data_lines(config: TrainConfig, material: Material, train: Tokens, held: Tokens | None) -> list[str]:
    """What is learned and what is held out."""
    lines = train.lines("data", config.max_length)
    if held is None:
        return [*lines, "held out  nothing: without --eval-data nobody can say what the adapter is worth"]
    lines += held.lines("held out", config.max_length)
    if material.overlaps:
        lines.append(
            f"          {len(material.overlaps):,} of them are in the training data too, as --allow-overlap permits: "
            "scores will be too good"
        )
    else:
        lines.append("          none of them is in the training data, near-copies counted")
    return lines
