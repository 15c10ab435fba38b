"""`loramux adapters convert`: what comes out computes in peft what the original did; refusals say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from loramux_adapters.artifact.format import CHAT_TEMPLATE_FILE, GENERATION_FILE, read_config
from loramux_server.cli import main as cli
from support.adapter_files import TINY_LINEARS, write_adapter
from support.foreign_adapters import write_gguf_lora, write_kohya, write_mlx
from support.tiny_models import save_tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Unexpected keyword arguments.*'loramux_converted_from':UserWarning",  # peft passes over it
)
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3": ["q_proj", "k_proj", "down_proj"],
    "phi3": ["qkv_proj", "gate_up_proj", "o_proj"],
    "smollm3": ["q_proj", "k_proj"],
}


def trained(base: Path, targets: list[str], into: Path) -> torch.Tensor:
    """An adapter that peft writes; returns its logits [tokens, vocabulary] in fp32."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=24, target_modules=targets, init_lora_weights=False))
    model.save_pretrained(into)
    return logits(model)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.arange(1, 33).reshape(1, -1)).logits[0]
    return found


def computed(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, adapter))


def convert(*argv: str) -> int:
    return cli.main(["adapters", "convert", *map(str, argv)], {})


@pytest.fixture
def scene(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path, torch.Tensor]:
    """Base, adapter, its logits."""
    architecture = getattr(request, "param", "llama")
    base = save_tiny_model(tmp_path / "base", architecture)
    expected = trained(base, TARGETS[architecture], tmp_path / "peft")
    bare = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert (expected - bare).abs().max() > 0.1
    return base, tmp_path / "peft", expected


@pytest.mark.parametrize("scene", sorted(TARGETS), indirect=True)
def test_a_lora_in_gguf_computes_in_peft_what_it_did(
    scene: tuple[Path, Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, expected = scene
    architecture = json.loads((base / "config.json").read_text())["model_type"]
    file = write_gguf_lora(adapter, tmp_path / "l.gguf", architecture, heads=4, kv_heads=2, layers=2)
    assert convert(file, tmp_path / "out", "--base", base) == 0
    assert torch.equal(computed(base, tmp_path / "out"), expected)
    said = capsys.readouterr().out
    count = 2 * len(TARGETS[architecture])
    assert said.startswith(f"{file} -> {tmp_path / 'out'}: {count} modules of rank 4, from llama.cpp's GGUF of a")
    assert said.endswith(f"loramux adapters push {tmp_path / 'out'}\n")


@pytest.mark.parametrize("flat", [None, "lora_te_"])
def test_kohyas_names_compute_in_peft_what_it_did(
    scene: tuple[Path, Path, torch.Tensor], tmp_path: Path, flat: str | None
) -> None:
    base, adapter, expected = scene
    assert convert(write_kohya(adapter, tmp_path / "k.safetensors", flat=flat), tmp_path / "out") == 0
    assert torch.equal(computed(base, tmp_path / "out"), expected)


def test_mlx_computes_in_peft_what_it_did(scene: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    base, adapter, expected = scene
    source = write_mlx(adapter, tmp_path / "mlx", layers=2)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert convert(source, tmp_path / "out") == 0
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert torch.equal(computed(base, tmp_path / "out"), expected)
    assert read_config(tmp_path / "out").notes[0].startswith("converted from mlx-lm's layout")


def test_a_directory_brings_what_lies_beside(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "peft", TINY_LINEARS, targets=["q_proj"], rank=4)
    (tmp_path / "k").mkdir()
    write_kohya(adapter, tmp_path / "k" / "k.safetensors")
    beside = {GENERATION_FILE: '{"top_k": 3}', CHAT_TEMPLATE_FILE: "{{ messages }}", "tokenizer_config.json": "{}"}
    for name, text in (beside | {"README.md": "# k"}).items():
        (tmp_path / "k" / name).write_text(text)
    assert convert(tmp_path / "k", tmp_path / "out") == 0
    got = {path.name for path in (tmp_path / "out").iterdir()}
    assert got == {"adapter_config.json", "adapter_model.safetensors", *beside}


def test_rows_ordered_by_head_need_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(tmp_path / "peft", TINY_LINEARS, targets=["q_proj"], rank=4)
    file = write_gguf_lora(adapter, tmp_path / "l.gguf", "llama", heads=4, kv_heads=2, layers=2)
    assert convert(file, tmp_path / "out") == 1
    assert "name the base with --base; its config says how many heads there are" in capsys.readouterr().err
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "llama", "num_attention_heads": "4"}')
    assert convert(file, tmp_path / "out", "--base", tmp_path / "odd") == 1
    assert "does not say how many attention heads" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.gguf", "odd", "peft"]


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_what_cannot_be_converted_says_why_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = write_adapter(tmp_path / "peft", TINY_LINEARS, targets=["q_proj"], rank=4)
    save_file({"odd": torch.ones(2)}, tmp_path / "odd.safetensors")
    (tmp_path / "empty").mkdir()
    put(tmp_path / "two" / "a.gguf", b"GGUF")
    put(tmp_path / "two" / "b.safetensors", b"")
    put(tmp_path / "config-only" / "adapter_config.json", b"{}")
    cases: dict[Path, str] = {
        tmp_path / "nothing": "there is no",
        peft: "is in PEFT's form already: `loramux adapters push",
        peft / "adapter_model.safetensors": "if it is PEFT's or mlx-lm's, its adapter_config.json belongs beside it",
        tmp_path / "odd.safetensors": "has no names that are known here",
        tmp_path / "empty": "holds no adapter_config.json, and no .gguf or .safetensors file",
        tmp_path / "two": "holds 2 files with weights (a.gguf, b.safetensors): name one of them",
        tmp_path / "config-only": "holds no adapter_model.safetensors and no adapters.safetensors",
        put(tmp_path / "fake.gguf", b"not one"): "is no GGUF file, whatever its name says",
        put(tmp_path / "adapter_model.bin", b"\x80\x02"): "is a pickle, which is never read",
        put(tmp_path / "short.safetensors", b"abc"): "too short to be a safetensors file",
    }
    for source, says in cases.items():
        assert convert(source, tmp_path / "out") == 1, source
        assert says in capsys.readouterr().err, source
        assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".loramux")]


def test_a_directory_that_is_not_empty_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "out" / "mine", b"x")
    assert convert(tmp_path, tmp_path / "out") == 1
    assert "is not empty; name a new directory" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_bytes() == b"x"


def test_help_says_what_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "convert_lora_to_gguf" in said and "lora_down, lora_up and alpha" in said and "--base TEXT" in said
