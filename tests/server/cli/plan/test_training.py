"""`loramux plan` from the command line, on a tiny base."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import RecipeError
from loramux_server.cli.frame import call
from loramux_server.cli.plan import training as cli_plan
from loramux_server.cli.plan.training import Memory
from loramux_server.errors import BaseModelError, ConfigError
from support.real_server import clean_environment
from support.tiny_models import save_tiny_model

MIB = 2**20


def run(*argv: str, environ: dict[str, str] | None = None) -> int:
    return call(cli_plan.app, "loramux plan", ["--device", "cpu", *argv], environ or {})


@pytest.fixture
def base(tmp_path: Path) -> str:
    return str(save_tiny_model(tmp_path / "base"))


def has(monkeypatch: pytest.MonkeyPatch, mib: float) -> None:
    monkeypatch.setattr(cli_plan, "_memory", lambda device: Memory("this machine", int(mib * MIB), 0))


def test_the_table_adds_up(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--base", base, "--rank", "16", "--batch", "8", "--seq", "128") == 0

    out = capsys.readouterr().out
    rows = [tuple(map(float, found)) for found in re.findall(r"^[a-z, 0-9]+? +([\d.]+) +([\d.]+)$", out, re.MULTILINE)]
    assert len(rows) == 7
    for column in (0, 1):
        assert sum(row[column] for row in rows[:-1]) == pytest.approx(rows[-1][column], abs=0.4)
    assert "8 examples of 128 tokens" in out and "288 bytes of KV cache" in out
    assert "QLoRA needs" in out and "LoRA needs" in out and out.count("and fits") == 2


def test_a_card_that_is_not_here_can_be_planned_for(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--base", base, "--card", "24GB") == 0

    out = capsys.readouterr().out
    assert "a card (24 GiB) has 23,839 MiB free\n" in out
    assert "CUDA itself, about" in out and out.count("and fits") == 2 and "256 bytes of KV cache" in out
    with pytest.raises(ConfigError, match="--card knows no 'RTX 4091'"):
        run("--base", base, "--card", "RTX 4091")


@pytest.mark.parametrize(
    ("architecture", "what"), [("minicpm3", "multi-head latent attention"), ("qwen3_moe", "a mixture of experts")]
)
def test_a_base_that_is_not_trained_here_is_not_planned_for(architecture: str, what: str, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", architecture)
    with pytest.raises(BaseModelError, match=rf"{what}.*train with peft"):
        run("--base", str(base))


def test_what_does_not_fit_is_said_with_what_helps(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(mib: float) -> str:
        has(monkeypatch, mib)
        assert run("--base", base, "--batch", "16", "--seq", "256") == 0
        return capsys.readouterr().out

    assert "--accumulation" not in said(1000)
    assert re.search(r"does NOT fit.*--accumulation \d+ makes it fit", said(8), re.DOTALL)
    assert "--accumulation 16 with --gradient-checkpointing makes it fit" in said(2.9)
    advice = ("--accumulation", "16", "--gradient-checkpointing")
    assert run("--base", base, "--batch", "16", "--seq", "256", *advice) == 0
    assert "QLoRA needs 3 MiB and fits" in capsys.readouterr().out
    assert "lower --seq or --rank" in said(0.1)


def test_nothing_is_said_beside_the_plan(base: str) -> None:
    """In a process of its own, where the libraries are imported for the first time."""
    command = [sys.executable, "-m", "loramux_server", "plan", "--device", "cpu", "--base", base]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=clean_environment())
    assert (done.returncode, done.stderr) == (0, "")


def test_wrong_settings_are_named(base: str) -> None:
    for argv in (("--rank", "0"), ("--seq", "1"), ("--batch", "2", "--accumulation", "4"), ("--device", "tpu")):
        with pytest.raises(ConfigError, match="rank|seq|accumulation|device"):
            run("--base", base, *argv)
    with pytest.raises(RecipeError, match="none_proj"):
        run("--base", base, "--target-modules", "none_proj")
    with pytest.raises(BaseModelError):
        run("--base", "./not-there")


def test_settings_come_from_the_environment_and_a_file_too(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "loramux.toml"
    file.write_text(f'[plan]\nbase = "{base}"\nbatch = 3\n')

    assert run("--config", str(file), environ={"LORAMUX_SEQ": "77", "LORAMUX_PORT": "1"}) == 0

    assert "3 examples of 77 tokens" in capsys.readouterr().out


def test_this_machine_is_measured() -> None:
    memory = cli_plan._memory(CpuDevice())

    assert memory.free > memory.libraries > MIB
