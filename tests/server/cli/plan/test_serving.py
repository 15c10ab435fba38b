"""`loramux plan serve` from the command line: by a config alone, offline, with no card and no weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loramux_server.cli.frame import call
from loramux_server.cli.plan import commands
from loramux_server.errors import BaseModelError, ConfigError
from support.shapes import LLAMA_8B

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"} | LLAMA_8B


@pytest.fixture
def base(tmp_path: Path) -> str:
    directory = tmp_path / "llama-8b"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return str(directory)


def run(*argv: str, environ: dict[str, str] | None = None) -> int:
    return call(commands.app, "loramux plan", list(argv), environ or {})


def test_fifty_adapters_on_24_gib(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", base, "--card", "8GiB,24GiB", "--adapters", "50", "--rank", "16") == 0

    out = capsys.readouterr().out
    assert "8,030,261,248 parameters" in out and "built for 131,072 tokens" in out
    assert "an adapter of rank 16 on every layer takes 84.0 MiB" in out
    assert "24 GiB: fits with --adapter-memory-mib" in out
    assert "8 GiB: does NOT fit, short by" in out and "the others wait in host memory" in out
    assert max(map(len, out.partition("\nMiB ")[2].splitlines())) <= 100


def test_room_for_magnitudes_is_planned_for_by_the_server_s_flag(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", base, "--card", "24GiB", "--adapters", "50", "--rank", "16", "--adapter-vectors") == 0

    out = capsys.readouterr().out
    assert "an adapter of rank 16 on every layer takes 107.0 MiB with room for magnitudes and biases" in out
    assert "24 GiB: fits with --adapter-memory-mib 5350" in out


def test_many_cards_stand_below_each_other(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        "RTX 4060 Ti 16GB",
        "A100 80GB",
        "RTX 4090",
        "24 GiB",
        "24576 MiB",
        "H200",
        "L40S",
        "RTX A4000",
        "99999 GiB",
    ]
    assert run("serve", base, "--card", ",".join(names)) == 0

    lines = capsys.readouterr().out.partition("\nMiB ")[2].splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("KV cache") for line in lines) == 2
    assert len(next(line for line in lines if line.startswith("KV cache")).split()) > 2 + 3


def test_json_is_all_that_is_printed_and_adds_up(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "--base", base, "--card", "RTX 4090", "--json") == 0

    printed = capsys.readouterr()
    assert "count its layers" in printed.err
    told = json.loads(printed.out)
    (card,) = told["cards"]
    sizes = card["sizes"]
    parts = [sizes[f"{name}_bytes"] for name in ("workspace", "graphs", "arena", "cache", "tokens", "left")]
    base_bytes = sum(told["base"][f"{name}_bytes"] for name in ("nf4", "head", "other"))
    together = card["libraries_bytes"] + base_bytes + sum(parts)
    assert together == pytest.approx(card["total_bytes"], abs=64 * 2**20)  # what whole slots and blocks leave
    assert card["fits"] and sizes["kv_tokens"] >= sizes["context"] > 2048
    assert sizes["max_num_seqs"] == 256 and sizes["max_batch_tokens"] == 2048


def test_a_servers_own_file_and_environment_are_planned(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "loramux.toml"
    file.write_text(f'[serve]\nbase = "{base}"\nport = 8001\nmax_num_seqs = 16\n[plan]\nseq = 99\n')

    environ = {"LORAMUX_MAX_MODEL_LEN": "4096", "LORAMUX_CARD": "T4", "LORAMUX_PORT": "1"}
    assert run("serve", "--config", str(file), "--json", environ=environ) == 0

    (card,) = json.loads(capsys.readouterr().out)["cards"]
    assert (card["name"], card["sizes"]["max_num_seqs"], card["sizes"]["context"]) == ("T4", 16, 4096)

    file.write_text("[serve]\nprot = 1\n")
    with pytest.raises(ConfigError, match=r"unknown key prot in \[serve\]"):
        run("serve", "--config", str(file))


def test_what_is_wrong_is_named(base: str) -> None:
    with pytest.raises(ConfigError, match="--card knows no 'huge'"):
        run("serve", base, "--card", "huge")
    with pytest.raises(ConfigError, match="--max-summed-rank 64 is less than"):
        run("serve", base, "--max-summed-rank", "64")
    with pytest.raises(ConfigError, match="--rank 512 is more than the server takes, --max-lora-rank 256"):
        run("serve", base, "--rank", "512")
    with pytest.raises(BaseModelError):
        run("serve", "./not-there")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hidden_size": 4100}, r"The hidden size \(4100\) is not a multiple"),
        ({"hidden_size": "big"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "by zero"),
    ],
)
def test_a_config_against_transformers_own_rules_is_refused_in_a_line(
    base: str, wrong: dict[str, object], said: str
) -> None:
    Path(base, "config.json").write_text(json.dumps(CONFIG | wrong))
    with pytest.raises(BaseModelError, match=f"the base's config cannot be read: .*{said}"):
        run("serve", base)


def test_a_card_on_which_products_are_slow_is_named(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", base, "--card", "T4,L4") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "tensor cores" in line]
    assert told == ["T4: our kernels do without its tensor cores, so only small bases make sense"]


def test_a_training_is_planned_for_one_card(base: str) -> None:
    with pytest.raises(ConfigError, match="--card takes one card at a time"):
        run("train", "--base", base, "--card", "8GiB,24GiB")


def test_without_a_word_a_training_is_planned(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), ("train",)):
        assert run(*words, "--device", "cpu", "--base", base, "--batch", "1", "--seq", "64") == 0
        assert "QLoRA needs" in capsys.readouterr().out
    assert run("--help") == 0
    assert "loramux plan serve" in capsys.readouterr().out
