from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.artifact.config import BASE_ID_KEY
from loramux_adapters.errors import TrainingError
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run.card import add_scores, make_card, read_card, versions, write_card
from loramux_adapters.training.run.trace import EpochRecord, StepRecord, Trace
from loramux_adapters.training.run.trainer import Plan, TrainingOutcome

DATA = {"sha256": "d" * 64, "rows": 4837, "skipped": 2, "truncated": 3, "tokens": 90000, "learned_tokens": 9000}


def card(tmp_path: Path, *, held: bool = True, **recipe: Any) -> dict[str, Any]:
    trace = Trace(tmp_path / "log.jsonl")
    if held:
        trace.add(EpochRecord(0, 0.0, None, None, 2.5, 0.1, 1.0))
    trace.add(StepRecord(1, 0.5, 1.5, 0.5, 20, 400, 1e-3, 0.7, 2.0))
    trace.add(StepRecord(2, 1.0, 1.0, 0.6, 20, 600, 1e-3, 0.7, 3.0))
    trace.add(EpochRecord(2, 1.0, 1.25, 0.55, 0.75 if held else None, 0.9 if held else None, 1.0))
    plan = Plan(
        steps=2,
        first=0,
        steps_per_epoch=2,
        tokens_per_epoch=1000,
        learned_per_epoch=40,
        left_out=0,
        passed_over=(),
    )
    outcome = TrainingOutcome(finished=True, step=2, plan=plan, trace=trace, seconds=7.0, peak_bytes=500 << 20)
    return make_card(
        name="spam",
        base_name="tiny",
        base_id="b" * 64,
        recipe=Recipe(**recipe),
        data=DATA,
        held=DATA | {"rows": 800} if held else None,
        outcome=outcome,
        device="CPU, 2 threads",
    )


def test_a_card_says_what_was_trained_on_what_and_how(tmp_path: Path) -> None:
    made = card(tmp_path, rank=16)

    assert (made["format"], made["name"], made["base"], made[BASE_ID_KEY]) == (1, "spam", "tiny", "b" * 64)
    assert made["recipe"] == Recipe(rank=16).as_json()
    assert made["data"] == DATA and made["held_out"]["rows"] == 800
    training = made["training"]
    assert (training["steps"], training["epochs"], training["tokens"], training["learned_tokens"]) == (2, 1.0, 1000, 40)
    assert (training["train_loss"], training["held_loss_before"], training["held_loss"]) == (1.25, 2.5, 0.75)
    assert (training["seconds"], training["tokens_per_second"], training["peak_bytes"]) == (7.0, 200.0, 500 << 20)
    assert made["libraries"] == versions() and {"python", "torch", "peft"} <= set(made["libraries"])
    assert made["scores"] is None


def test_a_card_is_written_for_programs_and_for_people(tmp_path: Path) -> None:
    made = card(tmp_path)

    write_card(tmp_path, made)

    assert read_card(tmp_path) == json.loads((tmp_path / "card.json").read_text()) == made
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# spam\n")
    for said in (
        "LoRA adapter for `tiny`",
        "NF4 with double quantization",
        "b" * 64,
        "4,837 examples",
        "2 skipped; 3 truncated",
        "2 steps of 16 examples (1.00 epochs)",
        "| held-out, before | 2.5000 |",
        "| held-out, after | 0.7500 | 90.0% |",
        "at most 500 MiB",
        "Not evaluated yet",
    ):
        assert said in text, said


def test_a_card_without_held_out_examples_says_so(tmp_path: Path) -> None:
    write_card(tmp_path, card(tmp_path, held=False, quantize="none"))

    text = (tmp_path / "README.md").read_text()
    assert "Held-out: none" in text and "| held-out, after | - | - |" in text
    assert "16 bit, not quantized" in text


def test_an_evaluation_is_filled_in_later(tmp_path: Path) -> None:
    made = card(tmp_path)
    write_card(tmp_path, made)

    add_scores(tmp_path, {"f1": 0.96}, ["spam F1 0.96 (0.94 to 0.98, 800 messages)"])

    assert read_card(tmp_path) == made | {
        "scores": {"f1": 0.96, "summary": ["spam F1 0.96 (0.94 to 0.98, 800 messages)"]}
    }
    text = (tmp_path / "README.md").read_text()
    assert "- spam F1 0.96 (0.94 to 0.98, 800 messages)" in text and "Not evaluated" not in text


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 99}'])
def test_what_is_no_card_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "card.json").write_text(content)

    with pytest.raises(TrainingError, match=r"card\.json"):
        read_card(tmp_path)


def test_a_card_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be written"):
        write_card(tmp_path / "missing", card(tmp_path))
