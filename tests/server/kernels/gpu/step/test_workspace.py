"""What a step works in is known to the byte before it is taken, of a model and of its config alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import ON_CARD
from loramux_adapters.lora.lora_linear import AdapterSlots, head_path
from loramux_adapters.lora.ops import add_lora_segments
from loramux_adapters.lora.slot_copy import copy_slot
from loramux_server.kernels.attention.kv_cache import KVCache, KVShape
from loramux_server.kernels.attention.paged_attention import AttentionParams, probe_kv_shape
from loramux_server.kernels.compiled.library import native_library
from loramux_server.kernels.decoder.description import Description, describe
from loramux_server.kernels.gpu.step.decoder import GpuDecoder
from loramux_server.kernels.gpu.step.form import DecoderForm
from loramux_server.kernels.gpu.step.nf4_linear import kinds_of, pack
from loramux_server.kernels.gpu.step.tables import StepSizes
from loramux_server.kernels.gpu.step.workspace import workspace_bytes
from loramux_server.kernels.layers.recognition import recognize
from loramux_server.kernels.layers.rotary import use_angles
from support.decoders import random_model
from support.emulated import EmulatedDevice
from support.tiny_models import tiny_config

SIZES = [
    StepSizes(rows=64, samples=64, sequences=3, blocks=2, entries=2, ranks=64, programs=3),
    StepSizes(rows=300, samples=9, sequences=7, blocks=40, entries=8, ranks=1024, programs=12),
]


class Interpreted(CpuDevice):
    """Triton's interpreter as a card: fp16, and everything is done at once."""

    layout, is_host, kernels = ON_CARD, False, "cuda"

    @property
    def activations(self) -> torch.dtype:
        return torch.float16


def described(family: str) -> tuple[Any, Description]:
    model, device, library = random_model(family), Interpreted(), native_library()
    assert library is not None
    pack(model, device)
    recognize(model, device)
    use_angles(model, library)
    shape = probe_kv_shape(model, device, whole_numbers=False)
    AdapterSlots(model, 8, add_lora_segments, copy_slot, head=head_path(model), device=device)
    asked = [AttentionParams(scaling=1.0) for _ in range(shape.layers)]
    return model, describe(model, shape, asked, kinds_of(device.activations))


@pytest.mark.parametrize("family", ["Llama 3", "Gemma 3", "Phi-4", "OLMo 2", "one key for all", "long heads"])
def test_a_config_tells_what_a_decoder_takes(family: str) -> None:
    model, description = described(family)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    form = DecoderForm.of(description)
    of_config = DecoderForm.of_skeleton(skeleton)
    assert of_config is not None
    assert replace(of_config, products=tuple(sorted(of_config.products))) == replace(
        form, products=tuple(sorted(form.products))
    )
    device = EmulatedDevice()
    with device.used():
        for layer in description.layers:  # the weights stay in host memory, and are not counted
            for linear in (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down):
                if linear is not None and linear.layer.bias is not None:
                    linear.layer.bias.data = device.put(linear.layer.bias.data)
        shape = KVShape(len(description.layers), description.kv_heads, description.head_dim, device.activations)
        cache = KVCache(shape, 64, device)
        for sizes in SIZES:
            before = device.memory().held
            decoder = GpuDecoder(device, description, cache, sizes)
            assert device.memory().held - before == workspace_bytes(form, sizes)
            device.synchronize()
            del decoder


def test_what_runs_module_by_module_has_no_such_form() -> None:
    for architecture in ("gpt_neox", "starcoder2"):
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=torch.bfloat16)
        assert DecoderForm.of_skeleton(skeleton) is None
