"""Reports: readable, complete, and files that other programs can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loramux_adapters.errors import TrainingError
from loramux_adapters.evaluation.bootstrap import Difference
from loramux_adapters.evaluation.evaluated import Evaluation, Role
from loramux_adapters.evaluation.report import WIDTH, markdown, summary, text_report, write_evaluation
from support.evaluations import HAM, NONE, flipped, labelled, text, truth_of

TRUTH = truth_of(690, 110)
PNG = b"\x89PNG\r\n\x1a\n"


def whole() -> Evaluation:
    judged = flipped(TRUTH, ham=3, spam=5)
    return labelled(
        TRUTH,
        judged,
        {
            Role.BASE: flipped(TRUTH, ham=200, spam=60),
            Role.REFERENCE: flipped(TRUTH, ham=2, spam=4),
            Role.MAJORITY: [HAM] * 800,
        },
        generated=[*judged[:-1], NONE],
        train_gap=Difference(0.01, -0.01, 0.03, 0.4),
        from_gguf=True,
    )


def test_the_report_fits_a_terminal_and_says_everything() -> None:
    report = text_report(whole())
    lines = report.splitlines()

    assert max(map(len, lines)) <= WIDTH
    for part in (
        "Evaluation of spam",
        "800 held-out examples of held.jsonl; labels ham, spam",
        "Only the first 800 of 837 examples are used.",
        "Verdict",
    ):
        assert part in report
    row = next(line for line in lines if line.startswith("  spam") and "logprob" in line)
    assert row.split()[:4] == ["spam", "logprob", "800", "99.0"]
    assert "[98.2, 99.6]" in row or "[98.3, 99.6]" in row or "[98.2, 99.5]" in row
    assert any(line.split() == ["spam", "5", "105", "0"] for line in lines) or any(
        line.split() == ["spam", "5", "105"] for line in lines
    )
    assert any("bare base" in line and "F1 of spam" in line and "< 0.001" in line for line in lines)


def test_an_undefined_score_is_a_dash_not_a_number() -> None:
    report = text_report(labelled(TRUTH, [HAM] * 800, {}))

    assert "nan" not in report
    assert any(line.split()[:3] == ["spam", "110", "-"] for line in report.splitlines())


def test_free_text_has_perplexity_and_no_confusion() -> None:
    report = text_report(text([0.5] * 20, [1.5] * 20))

    assert "perplexity" in report and "1.65 [1.65, 1.65]" in report
    assert "Confusion" not in report


def test_many_labels_are_listed_where_a_table_would_be_too_wide() -> None:
    labels = [f"a label of some length {index}" for index in range(12)]
    truth = [index % 12 for index in range(120)]
    wrong = [(index + 1) % 12 if place < 12 else index for place, index in enumerate(truth)]
    report = text_report(labelled(truth, wrong, {}, labels=labels))

    assert "taken for" in report
    assert max(map(len, report.splitlines())) <= WIDTH


def test_the_files_of_an_evaluation_are_written(tmp_path: Path) -> None:
    paths = write_evaluation(tmp_path / "out", whole())

    assert [path.name for path in paths] == ["evaluation.json", "evaluation.md", "confusion.png"]
    data = json.loads(paths[0].read_text())
    assert data["format"] == 1
    assert data["bootstrap"] == {"level": 0.95, "resamples": 2000, "seed": 0}
    assert data["predictors"][0]["by_logprob"]["confusion"] == [[687, 3, 0], [5, 105, 0]]
    assert data["predictors"][0]["role"] == "adapter"
    assert data["comparisons"][0]["difference"]["low"] > 0
    assert data["predictors"][-1]["by_logprob"]["classes"][1]["precision"]["value"] is None
    assert {remark["level"] for remark in data["remarks"]} <= {"good", "note", "warning", "bad"}
    assert paths[2].read_bytes().startswith(PNG)
    assert paths[1].read_text().startswith("# Evaluation of spam\n")


def test_free_text_has_no_figure(tmp_path: Path) -> None:
    paths = write_evaluation(tmp_path, text([0.5] * 20, [1.5] * 20))
    assert [path.name for path in paths] == ["evaluation.json", "evaluation.md"]


def test_a_directory_that_cannot_be_written_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match="cannot be written to"):
        write_evaluation(tmp_path / "file", whole())


def test_markdown_keeps_tables_in_code_and_leads_with_the_verdict() -> None:
    page = markdown(whole())
    assert page.index("- **good**") < page.index("```")
    assert page.count("```") == 2


def test_the_card_gets_scores_and_a_summary() -> None:
    evaluation = whole()
    scores = evaluation.card_scores()

    assert json.dumps(scores, allow_nan=False)
    assert scores["examples"] == 800
    lines = summary(evaluation)
    assert lines[1].startswith("by log probability: F1 of spam 96.3 [")
    assert any("Better than the bare base" in line for line in lines)
