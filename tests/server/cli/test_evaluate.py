"""`loramux eval` on a tiny real base with adapters that lean to one answer, and its settings."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import BaseMismatch, DataError
from loramux_server.base.loader import load_base_model
from loramux_server.cli import evaluate as cli_evaluate
from loramux_server.cli.evaluate import ExampleBar, evaluate_here
from loramux_server.config.evaluate import EvalConfig
from loramux_server.config.load import load
from loramux_server.errors import CommandFailed, ConfigError
from loramux_server.serving.startup import Stages
from support.adapter_files import write_adapter
from support.tiny_models import save_tiny_model

NO_FLAGS: dict[str, object] = {}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters and labelled examples."""
    place = tmp_path_factory.mktemp("eval")
    save_tiny_model(place / "base")
    base = load_base_model(str(place / "base"), device=CpuDevice(), cache_dir=place / "cache", report=lambda line: None)
    named = {"loramux_base_id": base.base_id}
    write_adapter(place / "one" / "adapter", base.linears, std_b=0.1, extra_config=named)
    write_adapter(place / "two", base.linears, std_b=0.1, seed=1, extra_config=named)
    _write(place / "held.jsonl", [(f"text {index}", "h" if index % 3 else "s") for index in range(40)])
    _write(place / "train.jsonl", [(f"other {index}", "s" if index % 4 else "h") for index in range(60)])
    _write(place / "story.jsonl", [(f"tell {index}", f"story number {index}") for index in range(12)])
    return place


def _write(path: Path, pairs: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs]
    path.write_text("\n".join(lines) + "\n")


def config(place: Path, **changes: object) -> EvalConfig:
    given: dict[str, object] = {
        "data": place / "held.jsonl",
        "adapter": str(place / "one"),
        "base": str(place / "base"),
    }
    return EvalConfig(**(given | changes))  # type: ignore[arg-type]


def stages(lines: list[str]) -> Stages:
    return Stages(lines.append)


def test_an_adapter_is_evaluated_beside_base_majority_another_and_16_bit(place: Path, tmp_path: Path) -> None:
    plain = load_base_model(
        str(place / "base"),
        device=CpuDevice(),
        cache_dir=place / "cache",
        report=lambda line: None,
        quantize="none",
    )
    write_adapter(tmp_path / "r", plain.linears, std_b=0.1, extra_config={"loramux_base_id": plain.base_id})
    made = config(
        place, compare=str(place / "two"), reference=str(tmp_path / "r"), train_data=place / "train.jsonl", limit=30
    )

    evaluation = evaluate_here(made, stages([]), cache_dir=place / "cache")

    names = [predictor.name for predictor in evaluation.predictors]
    assert names == ["one", "bare base", "two", "r, 16 bit", "majority: s"]
    assert evaluation.labels == ("h", "s")
    assert evaluation.examples == 30
    assert evaluation.train_examples == 30
    for predictor in evaluation.predictors[:-1]:
        assert predictor.by_logprob is not None and predictor.by_generation is not None and predictor.text is not None
        assert predictor.text.tokens == 60  # a letter and the end token each
    assert {comparison.other for comparison in evaluation.comparisons} == set(names[1:])
    assert evaluation.notes == ("Only the first 30 of 40 examples are used.",)
    assert "NF4" in evaluation.numerics_id
    served = evaluation.fidelity
    assert served is not None and served.examples == 8 and served.tokens == 16
    assert 0 < served.mean < served.max < 0.02, "near fp32 on the same weights, and not the same computation"


def test_free_text_is_scored_token_by_token(place: Path) -> None:
    made = config(place, data=place / "story.jsonl", fidelity=False)

    evaluation = evaluate_here(made, stages([]), cache_dir=place / "cache")

    assert evaluation.fidelity is None
    text = evaluation.adapter.text
    assert evaluation.labels == () and text is not None
    assert text.tokens == sum(len(f"story number {index}") + 1 for index in range(12))
    assert text.perplexity.low < text.perplexity.value < text.perplexity.high


def test_an_evaluation_gives_the_same_each_time(place: Path) -> None:
    whole = evaluate_here(config(place), stages([]), cache_dir=place / "cache")
    again = evaluate_here(config(place), stages([]), cache_dir=place / "cache")

    assert whole.as_json()["predictors"] == again.as_json()["predictors"]


def test_an_adapter_of_another_base_is_refused(place: Path, tmp_path: Path) -> None:
    weights = load_file(place / "two" / "adapter_model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    save_file(weights, other / "adapter_model.safetensors", metadata={"format": "pt"})
    text = (place / "two" / "adapter_config.json").read_text()
    (other / "adapter_config.json").write_text(json.dumps(json.loads(text) | {"loramux_base_id": "e" * 64}))

    with pytest.raises(BaseMismatch):
        evaluate_here(config(place, adapter=str(other)), stages([]), cache_dir=place / "cache")


def test_what_is_wrong_is_found_before_the_base_is_loaded(place: Path) -> None:
    lines: list[str] = []
    with pytest.raises(CommandFailed, match="no adapter 'nobody'"):
        evaluate_here(config(place, adapter="nobody"), stages(lines), cache_dir=place / "cache")
    with pytest.raises(DataError, match="none of the labels h, x"):
        evaluate_here(config(place, labels="h,x"), stages(lines), cache_dir=place / "cache")
    assert not any("load the base" in line for line in lines)


def test_settings_come_from_flags_variables_and_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[eval]\ndata = "held.jsonl"\nadapter = "spam"\nlimit = 7\n')
    loaded = load(
        EvalConfig, {"adapter": "other"}, {"LORAMUX_LIMIT": "9", "LORAMUX_PORT": "8000"}, str(tmp_path / "c.toml")
    )

    assert (loaded.data, loaded.adapter, loaded.limit) == (Path("held.jsonl"), "other", 9)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (NO_FLAGS, "--data is needed"),
        ({"data": "held.jsonl"}, "--adapter is needed"),
        ({"data": "h", "adapter": "a", "url": "http://x", "reference": "r"}, "leave --url out"),
        ({"data": "h", "adapter": "a", "csv_prompt": "text"}, "both --csv-prompt and --csv-completion"),
        ({"data": "h", "adapter": "a", "limit": "-1"}, "--limit must be from 0"),
    ],
)
def test_wrong_settings_are_named(flags: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(EvalConfig, flags, {})


def test_ctrl_c_stops_an_evaluation_between_two_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(held: object, contenders: object, subject: object, **options: Any) -> None:
        options["progress"]("spam", 0, 128)
        signal.raise_signal(signal.SIGINT)
        options["progress"]("spam", 64, 128)
        pytest.fail("went on")

    monkeypatch.setattr("loramux_server.evaluation.contenders.evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        cli_evaluate.evaluate_shown(None, (), None, labels=(), train=())  # type: ignore[arg-type]

    assert "stopping after these examples, and nothing is written; press Ctrl-C again" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_names_the_next_adapter_at_once_and_a_file_gets_a_line_now_and_then(terminal: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    bar = ExampleBar(stream)
    bar.told("one", 0, 8)
    bar.told("one", 8, 8)
    bar.told("two", 0, 8)
    bar.told("two", 1, 8)
    bar.end()
    shown = stream.getvalue()
    assert "one: 0 of 8 examples" in shown and "one: 8 of 8 examples" in shown
    assert ("two: 0 of 8 examples" in shown) is terminal and "two: 1 of 8" not in shown
