"""The CUDA path on a real device: the same functions, the same answers. Run with `make test-gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapter_files import write_adapter
from loramux_adapters.slots import Slot
from loramux_adapters.weights import load_host_adapter
from loramux_server.base.loader import load_base_model
from loramux_server.engine.start_check import Checker
from stepping import Stepper, relative_difference
from tiny_models import save_tiny_model

PROMPTS = [list(range(40)), [5, 6, 7], list(range(100, 133))]
SLOTS = [None, Slot(0, 8), Slot(16, 16)]


def stepper_on(device: str, tmp_path: Path) -> Stepper:
    base = load_base_model(
        str(tmp_path / "base"), device=torch.device(device), cache_dir=tmp_path / "cache", report=lambda line: None
    )
    stepper = Stepper(base.model, device=torch.device(device))
    for index, slot in enumerate(SLOTS[1:]):
        assert slot is not None
        directory = write_adapter(tmp_path / f"adapter-{index}", dict(base.linears), rank=8, seed=index, std_b=0.2)
        stepper.load(slot, load_host_adapter(directory, f"v{index}"))
    return stepper


def test_a_device_is_there() -> None:
    assert torch.cuda.is_available(), "these tests need a CUDA device"


def test_cuda_gives_the_cpus_answers_within_rounding(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", "llama")
    logits = {}
    for device in ("cpu", "cuda"):
        stepper = stepper_on(device, tmp_path)
        sequences = [stepper.sequence(str(i), p, s) for i, (p, s) in enumerate(zip(PROMPTS, SLOTS, strict=True))]
        logits[device] = stepper.logits([(sequence, len(sequence.prompt)) for sequence in sequences]).cpu()
    for ours, theirs in zip(logits["cuda"], logits["cpu"], strict=True):
        assert relative_difference(ours, theirs) < 0.1


def test_rows_of_a_mixed_batch_agree_with_their_solo_runs(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", "llama")
    stepper = stepper_on("cuda", tmp_path)
    pairs = list(enumerate(zip(PROMPTS, SLOTS, strict=True)))
    alone = [stepper.prefill(stepper.sequence(f"a{i}", prompt, slot), chunk=7) for i, (prompt, slot) in pairs]
    sequences = [stepper.sequence(f"s{i}", prompt, slot) for i, (prompt, slot) in pairs]
    together = stepper.logits([(sequence, len(sequence.prompt)) for sequence in sequences])
    for expected, got in zip(alone, together, strict=True):
        assert relative_difference(got, expected) < 0.05


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi3"])
def test_the_checks_at_start_pass(architecture: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", architecture)
    device = torch.device("cuda")
    base = load_base_model(
        str(tmp_path / "base"), device=device, cache_dir=tmp_path / "cache", report=lambda line: None
    )
    stepper = Stepper(base.model, device=device)
    Checker(stepper.runner, stepper.slots, base.model, vocabulary=256, num_blocks=256, rows=20).run()
