"""A step on a device that is not the CPU: every tensor is there, and nothing waits for what the device computes.

PyTorch's `meta` device stands for it: it computes shapes only, does not mix with the CPU, and has nothing to wait for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_server.engine.scheduling.sequence import Batch, ScheduledSequence
from loramux_server.kernels.attention.varlen_attention import VarlenAttend
from loramux_server.kernels.grouped_lora import GroupedAddLora
from support.meta_device import MetaDevice
from support.stepping import Stepper
from support.tiny_models import tiny_config

META = torch.device("meta")
SLOTS: list[tuple[ScaledSlot, ...]] = [
    (),
    (ScaledSlot(Slot(0, 8)),),
    (ScaledSlot(Slot(0, 8)), ScaledSlot(Slot(16, 16), 0.5)),
]


def kernel(q: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
    """Stands for the library's attention."""
    tensors = [value for value in (q, *others, *more.values()) if isinstance(value, torch.Tensor)]
    assert {tensor.device for tensor in tensors} == {META}
    return torch.empty_like(q)


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi3"])
def test_a_step_stays_on_the_device(architecture: str, paged: bool) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=torch.bfloat16).to(META)
    attend = VarlenAttend(kernel, paged=paged)
    stepper = Stepper(model, rows=64, attend=attend, add_lora=GroupedAddLora(), device=MetaDevice())
    modules = {
        path: (torch.ones(8, layer.base_layer.in_features), torch.ones(8, layer.base_layer.out_features))
        for path, layer in stepper.slots.layers.items()
        if "down_proj" not in path  # of this layer the slot is not used
    }
    adapter = HostAdapter("v", 8, 0, {path: (a.bfloat16(), bt.bfloat16()) for path, (a, bt) in modules.items()})
    for slot in (Slot(0, 8), Slot(16, 16)):
        stepper.load(slot, adapter)
    rows = [
        ScheduledSequence(stepper.sequence(str(index), range(20), used), 20 - index, samples=index != 1)
        for index, used in enumerate(SLOTS)
    ]
    logits = stepper.runner.forward(Batch(rows))
    assert logits.device == META
    assert logits.shape == (2, model.config.vocab_size)
