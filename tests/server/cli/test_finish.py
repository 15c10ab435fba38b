"""The last act of a training: fingerprint and evaluation of a run directory, on a tiny real base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run.card import FORMAT
from loramux_server.base.loader import load_base_model
from loramux_server.cli.finish import main
from loramux_server.engine.local_engine import LocalEngine
from loramux_server.fingerprint.file import parse
from loramux_server.fingerprint.fingerprint import compare
from support.adapter_files import write_adapter
from support.tiny_models import save_tiny_model

CPU = CpuDevice()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "base")
    return make_run(tmp_path, "nf4")


def make_run(tmp_path: Path, quantize: str) -> Path:
    base = load_base_model(
        str(tmp_path / "base"),
        device=CPU,
        cache_dir=tmp_path / "cache",
        report=lambda line: None,
        quantize=quantize,
    )
    run = tmp_path / "run"
    write_adapter(run / "adapter", base.linears, std_b=0.1, extra_config={"loramux_base_id": base.base_id})
    data = {"sha256": "0" * 64, "rows": 1, "skipped": 0, "truncated": 0, "tokens": 9, "learned_tokens": 2}
    training: dict[str, Any] = dict.fromkeys(
        ("train_loss", "train_accuracy", "held_loss", "held_accuracy", "held_loss_before", "tokens_per_second")
    )
    training |= {"steps": 1, "epochs": 1.0, "tokens": 9, "learned_tokens": 2, "seconds": 1.0, "peak_bytes": 1}
    card = {
        "format": FORMAT,
        "name": "tiny-spam",
        "base": "base",
        "loramux_base_id": base.base_id,
        "created": "2026-01-01T00:00:00+00:00",
        "recipe": Recipe(quantize=quantize).as_json(),
        "data": data,
        "held_out": None,
        "training": training | {"device": "CPU"},
        "libraries": {"torch": "2"},
        "scores": None,
    }
    (run / "adapter" / "card.json").write_text(json.dumps(card))
    return run


def call(run: Path, *more: str) -> int:
    base, cache = run.parent / "base", run.parent / "cache"
    return main([str(run), "--base", str(base), "--cache-dir", str(cache), *more], {})


def held(run: Path, answers: list[str]) -> str:
    path = run.parent / "held.csv"
    path.write_text("text,kind\n" + "".join(f"message {i},{answer}\n" for i, answer in enumerate(answers)))
    return str(path)


COLUMNS = ("--csv-prompt", "text", "--csv-completion", "kind", "--csv-labels", "0=h,1=s")


def test_without_held_out_data_there_is_a_fingerprint_that_replays_exactly(run_dir: Path) -> None:
    assert call(run_dir) == 0

    fingerprint = parse((run_dir / "adapter" / "fingerprint.json").read_bytes())
    base = load_base_model(
        str(run_dir.parent / "base"), device=CPU, cache_dir=run_dir.parent / "cache", report=lambda line: None
    )
    engine = LocalEngine.open(base)
    assert fingerprint.numerics_id == engine.numerics_id
    assert compare(engine, fingerprint.prompts, engine.load(run_dir / "adapter")).equal
    assert sorted(path.name for path in run_dir.iterdir()) == ["adapter"]
    assert json.loads((run_dir / "adapter" / "card.json").read_text())["scores"] is None


def test_held_out_data_gives_the_evaluation_and_the_card_its_scores(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = held(run_dir, ["0", "1", "1"] * 10)

    assert call(run_dir, "--eval-data", data, "--train-data", data, "--labels", "h,s", *COLUMNS) == 0

    assert {path.name for path in run_dir.iterdir()} == {
        "adapter", "evaluation.json", "evaluation.md", "confusion.png"
    }  # fmt: skip
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert [each["name"] for each in evaluation["predictors"]] == ["tiny-spam", "bare base", "majority: s"]
    assert evaluation["train_examples"] == 30
    card = json.loads((run_dir / "adapter" / "card.json").read_text())
    assert card["scores"]["predictors"] == evaluation["predictors"]
    assert card["scores"]["summary"][0].startswith("30 held-out examples")
    assert "F1 of h" in (run_dir / "adapter" / "README.md").read_text()
    assert (run_dir / "adapter" / "fingerprint.json").is_file()
    assert "Evaluation of tiny-spam" in capsys.readouterr().out


def test_one_class_data_fails_and_keeps_the_fingerprint(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(run_dir, "--eval-data", held(run_dir, ["0"] * 12), *COLUMNS) == 1

    assert "one class alone cannot be evaluated" in capsys.readouterr().err
    assert (run_dir / "adapter" / "fingerprint.json").is_file()
    assert not (run_dir / "evaluation.json").exists()


def test_an_adapter_of_the_16_bit_base_is_evaluated_there_and_has_no_fingerprint(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    run = make_run(tmp_path, "none")

    assert call(run, "--eval-data", held(run, ["0", "1", "1"] * 5), *COLUMNS) == 0

    assert json.loads((run / "evaluation.json").read_text())["quantize"] == "none"
    assert not (run / "adapter" / "fingerprint.json").exists()


def test_a_directory_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")], {}) == 1
    assert "card.json" in capsys.readouterr().err
