"""An evaluation on paper: text for a terminal, Markdown, and the files of a run directory."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from loramux_adapters.durable_files import write_whole
from loramux_adapters.errors import TrainingError
from loramux_adapters.evaluation.bootstrap import Interval
from loramux_adapters.evaluation.confusion_plot import draw_confusion
from loramux_adapters.evaluation.evaluated import Evaluation, Fidelity, Level, Role
from loramux_adapters.evaluation.scores import LabelScores, TextScores

JSON_FILE, TEXT_FILE, FIGURE_FILE = "evaluation.json", "evaluation.md", "confusion.png"
WIDTH = 100
NONE = "none of them"
Rows: TypeAlias = Sequence[Sequence[str]]
_CUT = 22  # characters of a label, or of a name, in a table


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report: a title and a table, whose first row names the columns, or lines."""

    title: str
    rows: Rows = ()
    lines: Sequence[str] = ()


def text_report(evaluation: Evaluation) -> str:
    """The whole report in at most 100 columns."""
    return "\n".join([*heading(evaluation), *_body(evaluation)])


def markdown(evaluation: Evaluation) -> str:
    """The same for a file: a heading, the verdict, and the tables as they are."""
    verdict = [f"- **{remark.level.value}**: {remark.text}" for remark in evaluation.remarks]
    tables = "\n".join(_body(evaluation, verdict=False)).strip()
    head = heading(evaluation)
    return "\n".join(
        [f"# {head[0]}", "", *(f"{line}  " for line in head[1:]), "", *verdict, "", "```", tables, "```", ""]
    )


def summary(evaluation: Evaluation) -> list[str]:
    """A few lines for an adapter's card."""
    adapter = evaluation.adapter
    lines = [f"{evaluation.examples:,} held-out examples; 95 % bootstrap intervals in brackets"]
    for how, scores in (("log probability", adapter.by_logprob), ("generation", adapter.by_generation)):
        if scores is not None:
            names = [(scores.headline_name, scores.headline), ("accuracy", scores.accuracy)]
            names += [("macro F1", scores.macro_f1)] if scores.headline_name != "macro F1" else []
            lines.append(f"by {how}: " + ", ".join(f"{name} {_share(value)}" for name, value in names))
    if adapter.text is not None:
        lines.append(f"perplexity of the answers {_number(adapter.text.perplexity, 2)}")
    return [*lines, *(remark.text for remark in evaluation.remarks)]


def write_evaluation(directory: Path, evaluation: Evaluation) -> list[Path]:
    """Writes evaluation.json, evaluation.md and, for labels, confusion.png; gives their paths. Raises TrainingError."""
    paths = [directory / JSON_FILE, directory / TEXT_FILE]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(paths[0], (json.dumps(evaluation.as_json(), indent=2, allow_nan=False) + "\n").encode())
        write_whole(paths[1], markdown(evaluation).encode())
        scores = evaluation.adapter.labelled
        if scores is not None:
            paths.append(directory / FIGURE_FILE)
            title = f"{evaluation.adapter.name}: {scores.examples:,} held-out examples"
            draw_confusion(scores, paths[-1], title=title)
    except OSError as error:
        raise TrainingError(f"the evaluation cannot be written to {directory}: {error.strerror}") from error
    return paths


def heading(evaluation: Evaluation) -> list[str]:
    """What was evaluated, on what."""
    kind = f"labels {', '.join(evaluation.labels)}" if evaluation.labels else "answers as free text"
    lines = [
        f"Evaluation of {evaluation.adapter.name}",
        f"{evaluation.examples:,} held-out examples of {evaluation.data}; {kind}",
        f"base {evaluation.base} ({'NF4' if evaluation.quantize == 'nf4' else '16 bit'}); {evaluation.seconds:.0f} s",
    ]
    return [line for each in [*lines, *evaluation.notes] for line in _wrapped(each)]


def _body(evaluation: Evaluation, *, verdict: bool = True) -> list[str]:
    return [
        line
        for section in sections(evaluation, verdict=verdict)
        for line in ("", section.title, *(_table(section.rows) if section.rows else section.lines))
    ]


def sections(evaluation: Evaluation, *, verdict: bool = True) -> Iterator[Section]:
    """What follows the heading: tables of scores, then the verdict in words."""
    name = evaluation.adapter.name
    if evaluation.labels:
        yield Section("Scores in %, with 95 % bootstrap intervals (n examples each)", _label_table(evaluation))
        for how, scores in _ways(evaluation):
            yield Section(f"{name}, by {how}, label by label", _class_table(scores))
            yield _confusion(f"Confusion by {how}: answers down, predictions across", scores)
    if any(predictor.text for predictor in evaluation.predictors):
        title = "Tokens of the right answers: loss in nats, and how many would have been chosen"
        yield Section(title, _text_table(evaluation))
    if evaluation.fidelity is not None:
        yield Section(
            "The numbers that are served beside fp32 on the same weights", lines=_fidelity(evaluation.fidelity)
        )
    if evaluation.comparisons:
        yield Section(f"{name} minus the others (paired bootstrap)", _comparisons(evaluation))
    if verdict:
        marks = {Level.GOOD: "+", Level.NOTE: " ", Level.WARNING: "!", Level.BAD: "-"}
        remarks = [
            line
            for remark in evaluation.remarks
            for line in _wrapped(remark.text, first=f"  {marks[remark.level]} ", rest="    ")
        ]
        yield Section("Verdict", lines=remarks)


def _ways(evaluation: Evaluation) -> list[tuple[str, LabelScores]]:
    adapter = evaluation.adapter
    ways = (("log probability", adapter.by_logprob), ("generation", adapter.by_generation))
    return [(how, scores) for how, scores in ways if scores is not None]


def _label_table(evaluation: Evaluation) -> Rows:
    rows: list[list[str]] = []
    headline = ""
    for predictor in evaluation.predictors:
        for how, scores in (("logprob", predictor.by_logprob), ("replies", predictor.by_generation)):
            if scores is None:
                continue
            headline = scores.headline_name
            shown = [scores.accuracy, scores.macro_f1] + ([scores.headline] if headline != "macro F1" else [])
            way = "-" if predictor.role is Role.MAJORITY else how
            rows.append([_cut(predictor.name), way, str(scores.examples), *map(_share, shown)])
    columns = ["", "by", "n", "accuracy", "macro F1"] + ([_cut(headline)] if headline != "macro F1" else [])
    return [columns, *rows]


def _class_table(scores: LabelScores) -> Rows:
    rows = [
        [_cut(each.label), str(each.support), _share(each.precision), _share(each.recall), _share(each.f1)]
        for each in scores.classes
    ]
    means = [_share(scores.macro_precision), _share(scores.macro_recall), _share(scores.macro_f1)]
    return [["", "n", "precision", "recall", "F1"], *rows, ["mean", str(scores.examples), *means]]


def _confusion(title: str, scores: LabelScores) -> Section:
    """As a table where it fits, else as a list of what is mistaken for what."""
    last = [NONE] if scores.unlabelled else []
    head = ["", *map(_cut, scores.labels), *last]
    width = len(scores.labels) + len(last)
    rows = [[_cut(label), *map(str, row[:width])] for label, row in zip(scores.labels, scores.confusion, strict=True)]
    if max(map(len, _table([head, *rows]))) <= WIDTH:
        return Section(title, [head, *rows])
    names = [*scores.labels, NONE]
    mistakes = [
        (count, f"{_cut(scores.labels[row])} taken for {_cut(names[column])}")
        for row, counts in enumerate(scores.confusion)
        for column, count in enumerate(counts)
        if row != column and count
    ]
    most = sorted(mistakes, key=lambda found: (-found[0], found[1]))[:30]
    return Section(title, lines=[f"  {count:>6}  {what}" for count, what in most])


def _text_table(evaluation: Evaluation) -> Rows:
    def row(name: str, scores: TextScores) -> list[str]:
        counts = [f"{scores.examples:,}", f"{scores.tokens:,}"]
        return [_cut(name), *counts, f"{scores.loss.value:.3f}", _number(scores.perplexity, 2), _share(scores.accuracy)]

    found = [row(predictor.name, predictor.text) for predictor in evaluation.predictors if predictor.text is not None]
    return [["", "n", "tokens", "loss", "perplexity", "right, %"], *found]


def _fidelity(found: Fidelity) -> list[str]:
    text = (
        f"{found.tokens:,} tokens of {found.examples:,} answers: log probabilities differ by {found.mean:.5f} on "
        f"average and {found.max:.5f} at most; "
    )
    text += (
        f"{found.unlike:,} of them are the likeliest in one of the two alone"
        if found.unlike
        else "the likeliest tokens are the same in both"
    )
    return _wrapped(text, first="  ", rest="  ")


def _comparisons(evaluation: Evaluation) -> Rows:
    rows = []
    for comparison in evaluation.comparisons:
        found = comparison.difference
        scale, digits = (1, 3) if comparison.score == "loss" else (100, 1)
        value, low, high = (f"{scale * number:+.{digits}f}" for number in (found.value, found.low, found.high))
        p = "< 0.001" if found.p < 0.001 else f"{found.p:.3f}"
        rows.append([_cut(comparison.other), _cut(comparison.score), f"{value} [{low}, {high}]", p])
    return [["", "score", "points, or nats", "p"], *rows]


def _table(rows: Rows) -> list[str]:
    """First column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _share(interval: Interval) -> str:
    """In percent."""
    if not interval.is_defined:
        return "-"
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _number(interval: Interval, digits: int) -> str:
    if not interval.is_defined:
        return "-"
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _cut(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _CUT else plain[: _CUT - 1] + "…"


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest) or [first.rstrip()]
