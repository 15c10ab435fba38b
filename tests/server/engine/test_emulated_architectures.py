"""Bases that a card runs module by module, on a late device: those of the CPU, and the same bits in any company."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support import triton_interpreter

if triton_interpreter.INSTALLED:
    triton_interpreter.prepare()
else:
    pytest.skip(triton_interpreter.WHY_NOT, allow_module_level=True)

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import Device
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.loader import load_base_model
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from support.adapter_files import write_adapter
from support.emulated import EmulatedDevice
from support.stepping import GREEDY, Stepper, relative_difference
from support.tiny_models import ATTENTION_MIXTURES, save_tiny_model

PROMPT = torch.randint(0, 256, (30,), generator=torch.Generator().manual_seed(1)).tolist()
OTHER = PROMPT[::-1]
SLOTS = (Slot(0, 8), Slot(8, 8))
BOTH = (ScaledSlot(SLOTS[0], 0.5), ScaledSlot(SLOTS[1], -0.7))
ORIGINAL = 32  # tokens of texts that are not long
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
    "long_factor": [2.0 + pair for pair in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}


def stepper_on(device: Device, base: Path, root: Path) -> Stepper:
    """With two adapters, of attention and of all layers of the second decoder layer."""
    loaded = load_base_model(str(base), device=device, cache_dir=root / "cache", report=lambda line: None)
    stepper = Stepper(loaded.model, device=device, rows=16, blocks=64, module_of=loaded.module_of)
    for number, (slot, part) in enumerate(zip(SLOTS, ("self_attn", ".1."), strict=True)):
        directory = root / part
        if not directory.exists():
            linears = {path: shape for path, shape in loaded.linears.items() if part in path}
            write_adapter(directory, linears, rank=4, std_b=0.2, seed=number)
        with device.used():
            stepper.load(slot, load_host_adapter(directory))
    return stepper


BASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "dots1")},
    "latent": ("deepseek_v3", {}),
    "latent mixture": ("deepseek_v2", ATTENTION_MIXTURES["deepseek_v2"]),
    "chunks": ("llama4_text", {}),
    "chunks and experts": ("llama4_text", ATTENTION_MIXTURES["llama4_text"]),
}


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    architecture, changes = BASES[request.param]
    return save_tiny_model(tmp_path / "base", architecture, **changes)


@pytest.mark.parametrize("base", BASES, indirect=True)
def test_a_base_answers_on_a_card_as_on_the_cpu_and_the_same_in_company(base: Path, tmp_path: Path) -> None:
    card, cpu = (stepper_on(device, base, tmp_path) for device in (EmulatedDevice(kernels="triton"), CpuDevice()))
    assert (card.kernels.name, card.kernels.attention, card.runner.decoder) == ("triton", "Triton", None)
    kinds = [(PROMPT, ()), (OTHER, (ScaledSlot(SLOTS[0]),)), (PROMPT, (ScaledSlot(SLOTS[1]),)), (OTHER, BOTH)]

    def sequences(stepper: Stepper) -> list[EngineSequence]:
        return [stepper.sequence(str(at), prompt, slots) for at, (prompt, slots) in enumerate(kinds)]

    logits = []
    for stepper in (card, cpu):
        logits.append([stepper.prefill(one, chunk=13) for one in sequences(stepper)])
    assert max(map(relative_difference, *logits)) < 0.03
    assert relative_difference(logits[1][0], logits[1][2]) > 0.1, "the adapter changes nothing"
    company = sequences(card)
    together = card.logits([(one, len(one.prompt)) for one in company])
    assert all(torch.equal(own, alone) for own, alone in zip(together, logits[0], strict=True))


def test_long_and_short_texts_turn_by_their_own_frequencies_on_a_card_too(tmp_path: Path) -> None:
    base = save_tiny_model(
        tmp_path / "base", "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL
    )
    prompts = (PROMPT[: ORIGINAL // 2], PROMPT + OTHER)
    params = replace(GREEDY, max_tokens=4)
    logits = []
    for device in (EmulatedDevice(kernels="triton"), CpuDevice()):
        stepper = stepper_on(device, base, tmp_path)
        assert stepper.runner.long_from == ORIGINAL and "rotation" in stepper.runner.why_by_modules

        def sequences(long_from: int = ORIGINAL, stepper: Stepper = stepper) -> list[EngineSequence]:
            found = [stepper.sequence(str(at), prompt, params=params) for at, prompt in enumerate(prompts)]
            for one in found:
                one.is_long = one.max_total > long_from
            return found

        alone = [stepper.greedy(one, 3, chunk=13) for one in sequences()]
        company = sequences()
        together = stepper.logits([(one, len(one.prompt)) for one in company])
        assert all(torch.equal(own, steps[0]) for own, steps in zip(together, alone, strict=True))
        logits.append([step for steps in alone for step in steps])
        always = stepper.prefill(sequences(0)[0], chunk=13)
        assert relative_difference(always, alone[0][0]) > 0.05, "the length is not felt"
    assert max(map(relative_difference, *logits)) < 0.03
