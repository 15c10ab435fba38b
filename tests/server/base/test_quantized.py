"""A base is quantized once: what later starts read instead is the same to the last bit, or is not used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base import quantized
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.base.quantized import state_digest
from loramux_server.kernels.choice import choose_kernels, why_not_compiled
from support.tiny_models import ARCHITECTURES, save_tiny_model

CPU = CpuDevice()
QUANTIZING, READING = "loading and quantizing the base to NF4", "reading the quantized base that was kept"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama")


def load(checkpoint: Path, cache: Path) -> tuple[BaseModel, list[str]]:
    """The base as trainers hold it without compiled kernels, and what was said meanwhile."""
    said: list[str] = []
    base = load_base_model(
        str(checkpoint),
        device=CPU,
        cache_dir=cache,
        report=said.append,
        training=True,
        kernels=choose_kernels(CPU, "tensor"),
    )
    assert said[:2] == why_not_compiled(base.kernels, CPU)
    return base, said[2:]


def kept_in(cache: Path) -> Path:
    (place,) = (cache / "quantized").iterdir()
    return place


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_a_base_that_is_read_again_is_the_same_to_the_last_bit(architecture: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture)
    (first, said_first), (second, said_second) = (load(directory, tmp_path / "cache") for _ in range(2))
    assert said_first == [QUANTIZING] and said_second == [READING]
    assert state_digest(first.model) == state_digest(second.model) and first.base_id == second.base_id
    assert first.linears == second.linears and first.floats.keys() == second.floats.keys()
    assert first.bytes_16bit == second.bytes_16bit
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(first.model(input_ids=tokens).logits, second.model(input_ids=tokens).logits)


def test_one_changed_bit_is_noticed_and_the_base_quantized_again(checkpoint: Path, tmp_path: Path) -> None:
    first, _ = load(checkpoint, tmp_path)
    weights = kept_in(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.weight"][5] ^= 1
    save_file(tensors, weights, metadata={"format": "pt"})
    second, said = load(checkpoint, tmp_path)
    assert said[0] == READING and "not those that were kept" in said[1] and said[2:] == [QUANTIZING]
    assert state_digest(first.model) == state_digest(second.model)
    assert load(checkpoint, tmp_path)[1] == [READING]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "digest"])
def test_files_that_are_cut_short_or_missing_are_no_reason_not_to_start(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    load(checkpoint, tmp_path)
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:20]), Path.unlink):
        damage(kept_in(tmp_path) / name)
        _, said = load(checkpoint, tmp_path)
        assert said[0] == READING and "cannot be used" in said[1] and said[2:] == [QUANTIZING]


def test_other_versions_of_the_libraries_quantize_anew_and_leave_one_copy(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(checkpoint, tmp_path)
    before = kept_in(tmp_path)
    monkeypatch.setattr(quantized.metadata, "version", lambda name: "99.0")
    assert load(checkpoint, tmp_path)[1] == [QUANTIZING]
    assert kept_in(tmp_path) != before


def test_a_base_that_cannot_be_kept_serves_all_the_same(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "quantized").write_text("in the way")
    base, said = load(checkpoint, tmp_path)
    assert said[0] == QUANTIZING and "could not be kept" in said[1]
    assert base.linears
