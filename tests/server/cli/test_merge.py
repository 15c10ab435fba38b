"""`loramux merge` from the command line, on a tiny base."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux_adapters.artifact.own_tokens import OwnToken, OwnTokens
from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import BaseMismatch, CheckpointError
from loramux_adapters.training.model import merge as model_merge
from loramux_adapters.training.model.merge import Merged
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.cli import merge as cli_merge
from loramux_server.cli.frame import call
from loramux_server.engine.local_engine import LocalEngine
from loramux_server.errors import ConfigError
from loramux_server.fingerprint import fingerprint
from loramux_server.fingerprint.drift import QUESTIONS, drift_prompts
from loramux_server.serving.startup import Stages
from support.adapter_files import write_adapter
from support.tiny_models import save_tiny_model, tiny_tokenizer


def run(*argv: str, environ: dict[str, str] | None = None) -> int:
    return call(cli_merge.app, "loramux merge", argv, environ or {})


def load(tmp_path: Path, spec: Path, quantize: str = "nf4") -> BaseModel:
    return load_base_model(
        str(spec), device=CpuDevice(), cache_dir=tmp_path / "cache", report=lambda line: None, quantize=quantize
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "base")


def adapter(tmp_path: Path, base: Path, *, base_id: str | None, **others: Any) -> Path:
    return write_adapter(
        tmp_path / "adapter",
        load(tmp_path, base).linears,
        std_b=0.2,
        extra_config={} if base_id is None else {"loramux_base_id": base_id},
        **others,
    )


def arguments(tmp_path: Path, base: Path, found: Path) -> Sequence[str]:
    return [
        *("--base", str(base), "--adapter", str(found), "--out", str(tmp_path / "out")),
        *("--cache-dir", str(tmp_path / "cache"), "--device", "cpu"),
    ]


def test_a_merged_checkpoint_answers_like_the_adapter_and_the_report_says_how_much(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = adapter(tmp_path, base, base_id=load(tmp_path, base).base_id)
    engine = LocalEngine.open(load(tmp_path, base), rows=4, tokens=1024, max_rank=8)
    prompts = [list(b"one"), list(b"another one")]
    made = fingerprint.make(engine, prompts, engine.load(found))
    (found / "fingerprint.json").write_text(json.dumps(made))

    assert run(*arguments(tmp_path, base, found)) == 0

    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert report["onto"] == "nf4" and report["layers"] == 15 and report["drift"]["prompts"] == 2
    drift = report["drift"]
    assert 0 < drift["merged"]["mean"] < 0.1 * drift["bare"]["mean"]  # near the adapter, far from the base
    assert drift["merged"]["mean"] < drift["quantized"]["mean"]
    assert 0 < drift["exact"]["mean"] < 0.1 * drift["bare"]["mean"] and drift["exact"]["tokens"] == 32
    out = capsys.readouterr().out
    assert "the adapter itself in fp32 instead of as it is served: log probabilities differ by 0.0" in out
    assert "2 prompts, 32 tokens" in out and "the base without the adapter" in out
    assert load(tmp_path, tmp_path / "out").base_id != load(tmp_path, base).base_id


def test_tokens_that_an_adapter_adds_are_the_checkpoints(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = adapter(tmp_path, base, base_id=load(tmp_path, base).base_id, targets=["q_proj"])
    config = json.loads((found / "adapter_config.json").read_text())
    config["modules_to_save"] = ["embed_tokens", "lm_head"]
    (found / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(found / "adapter_model.safetensors")
    torch.manual_seed(0)
    for name, weight in load_file(base / "model.safetensors").items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            more = weight[:2] + 0.3 * weight.float().std() * torch.randn(2, weight.shape[1])
            tensors[f"base_model.model.{name}"] = torch.cat([weight, more.to(weight.dtype)])
    save_file(tensors, found / "adapter_model.safetensors")
    first = len(tiny_tokenizer())
    own = OwnTokens((OwnToken(first, "@@call"), OwnToken(first + 1, "<|done|>")), (("eos_token", "<|done|>"),))
    (found / "own_tokens.json").write_bytes(own.dump())

    assert run(*arguments(tmp_path, base, found), "--no-fidelity") == 0

    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert report["rows"] == 4 and "and 4 rows of embeddings and output head" in capsys.readouterr().out
    assert report["drift"]["merged"]["mean"] < 0.1 * report["drift"]["bare"]["mean"]
    served = load(tmp_path, tmp_path / "out")
    assert served.config.vocab_size == 322 and served.tokenizer.eos_token == "<|done|>"
    assert served.tokenizer("@@call", add_special_tokens=False).input_ids == [first]


def test_an_adapter_of_the_16_bit_base_is_merged_onto_it(tmp_path: Path, base: Path) -> None:
    found = adapter(tmp_path, base, base_id=load(tmp_path, base, "none").base_id)

    assert run(*arguments(tmp_path, base, found), "--no-fidelity") == 0
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["drift"]["exact"] is None

    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert report["onto"] == "16bit" and report["rounded"] == 0


def test_an_adapter_of_another_base_leaves_nothing_behind(tmp_path: Path, base: Path) -> None:
    found = adapter(tmp_path, base, base_id="0" * 64)

    with pytest.raises(BaseMismatch):
        run(*arguments(tmp_path, base, found))

    assert not (tmp_path / "out").exists()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_directory_is_refused_before_anything_is_loaded(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = adapter(tmp_path, base, base_id=None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    monkeypatch.setattr("loramux_server.base.loader.load_base_model", lambda *_, **__: pytest.fail("loaded"))

    with pytest.raises(CheckpointError, match="not empty"):
        run(*arguments(tmp_path, base, found))


def drift(quantized: float, bare: float, merged: float = 0.01) -> cli_merge.Drift:
    far = [fingerprint.Agreement(8, mean, mean) for mean in (merged, quantized, bare)]
    return cli_merge.Drift(1, 8, *far)


def test_it_is_said_when_nf4_takes_the_adapter_away_again() -> None:
    config = cli_merge.MergeConfig(adapter="a", out=Path("out"))
    merged = Merged(layers=1, rounded=1, rows=0, head_untied=True, delta=0.03)

    undone = "\n".join(cli_merge._lines(config, merged, "nf4", drift(1.5, 2.0), from_gguf=False))
    kept = "\n".join(cli_merge._lines(config, merged, "16bit", drift(0.2, 2.0), from_gguf=True))

    assert "NF4 undoes most of this adapter" in undone and "--onto 16bit" in undone and "head" in undone
    assert "loramux serve --base out" in kept and "GGUF" in kept


@pytest.mark.parametrize(
    ("onto", "hint"), [("16bit", "in 16 bit: try --onto nf4, the weights"), ("nf4", "in 16 bit: serve")]
)
def test_a_checkpoint_that_answers_unlike_the_adapter_is_not_recommended(onto: str, hint: str) -> None:
    config = cli_merge.MergeConfig(adapter="a", out=Path("out"))
    merged = Merged(layers=1, rounded=1, rows=0, head_untied=False, delta=0.001)

    said = cli_merge._lines(config, merged, onto, drift(0.09, 0.2, merged=0.33), from_gguf=False)

    assert "does NOT answer as the adapter does" in said[-1] and hint in said[-1]
    assert not any("serve it with" in line for line in said)


def test_a_long_stage_of_a_merge_says_how_far_it_is() -> None:
    now, written, stream = 0.0, io.StringIO(), io.StringIO()
    stages = Stages(lambda text: written.write(text) and None, lambda: now)
    bar = cli_merge.StageBar(stages, stream, lambda: now)

    with stages.stage("merge"):
        bar.told("merging", 0, 200, "layers")
        now = 1.5
        bar.told("merging", 30, 200, "layers")
        assert stream.getvalue() == ""  # within a moment nothing is said
        now = 10.0
        bar.told("merging", 100, 200, "layers")
        bar.end()

    assert stream.getvalue() == "  merging: 100 of 200 layers, 0:10 left\n"
    assert written.getvalue() == "  merge ...\n  merge 10.0 s\n"


def test_an_interrupted_merge_is_answered_and_leaves_nothing(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = adapter(tmp_path, base, base_id=load(tmp_path, base).base_id)
    before = sorted(tmp_path.rglob("*"))
    through = model_merge.through_nf4

    def interrupted(weight: torch.Tensor) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        return through(weight)

    monkeypatch.setattr(model_merge, "through_nf4", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments(tmp_path, base, found))

    said = capsys.readouterr().out
    assert f"stopping after this part of the merge, and nothing is left in {tmp_path / 'out'}; press Ctrl-C" in said
    assert "write the checkpoint" not in said
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == [
        path for path in before if "cache" not in path.parts
    ]


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("--out", "x"), "--adapter is needed"),
        (("--adapter", "x"), "--out is needed"),
        (("--adapter", "x", "--out", "y", "--onto", "8bit"), "--onto"),
    ],
)
def test_wrong_settings_are_named(argv: tuple[str, ...], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        run(*argv)


def test_variables_of_other_commands_do_not_disturb() -> None:
    with pytest.raises(ConfigError, match="--adapter is needed"):
        run("--out", "x", environ={"LORAMUX_PORT": "1", "LORAMUX_EPOCHS": "2", "LORAMUX_URL": "u"})


def test_without_a_fingerprint_general_questions_are_asked(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()

    prompts = drift_prompts(tmp_path, tokenizer)

    assert len(prompts) == len(QUESTIONS)
    assert tokenizer.decode(prompts[0]) == f"<user>{QUESTIONS[0]}</s><assistant>"
    (tmp_path / "fingerprint.json").write_text("{")
    assert drift_prompts(tmp_path, tokenizer) == prompts
