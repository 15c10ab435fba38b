"""A step on a device that is not the CPU: every tensor is there, and nothing waits for what the device computes.

PyTorch's `meta` device stands for it: it computes shapes only, does not mix with the CPU, and has nothing to wait for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loramux_adapters.grouped import GroupedAddLora
from loramux_adapters.host_cache import HostAdapter
from loramux_adapters.lora_linear import AdapterSlots, head_path
from loramux_adapters.slots import ScaledSlot, Slot
from loramux_server.engine.attention import probe_kv_shape
from loramux_server.engine.kv_cache import KVCache
from loramux_server.engine.model_runner import ModelRunner
from loramux_server.engine.sequence import Batch, SamplingParams, ScheduledSequence, Sequence, SlotLoad
from loramux_server.engine.varlen import VarlenAttend
from tiny_models import tiny_config

META = torch.device("meta")
SLOTS = [(), (ScaledSlot(Slot(0, 8)),), (ScaledSlot(Slot(0, 8)), ScaledSlot(Slot(16, 16), 0.5))]


def kernel(q: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
    """Stands for the library's attention."""
    tensors = [value for value in (q, *others, *more.values()) if isinstance(value, torch.Tensor)]
    assert {tensor.device for tensor in tensors} == {META}
    return torch.empty_like(q)


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi3"])
def test_a_step_stays_on_the_device(architecture: str, paged: bool) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=torch.bfloat16).to(META)
    shape = probe_kv_shape(model, META)
    slots = AdapterSlots(model, 64, GroupedAddLora(), head=head_path(model))
    modules = {
        path: (torch.ones(8, layer.base_layer.in_features), torch.ones(8, layer.base_layer.out_features))
        for path, layer in slots.layers.items()
        if "down_proj" not in path  # of this layer the slot is not used
    }
    adapter = HostAdapter("v", 8, 0, {path: (a.bfloat16(), bt.bfloat16()) for path, (a, bt) in modules.items()})
    runner = ModelRunner(
        model,
        slots=slots,
        cache=KVCache(shape, 16, META, tiled=False),
        attend=VarlenAttend(kernel, paged=paged),
        host_adapter=lambda version: adapter,
        device=META,
    )
    rows = []
    for index, used in enumerate(SLOTS):
        sequence = Sequence(str(index), list(range(20)), SamplingParams(temperature=0.0, max_tokens=4))
        sequence.blocks, sequence.slots = [2 * index, 2 * index + 1], used
        rows.append(ScheduledSequence(sequence, 20 - index, samples=index != 1))
    for slot in (Slot(0, 8), Slot(16, 16)):
        slots.load(slot, adapter)
    logits = runner.forward(Batch(rows, slot_loads=[SlotLoad(Slot(0, 8), "v")]))
    assert logits.device == META
    assert logits.shape == (2, model.config.vocab_size)
