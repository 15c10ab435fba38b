"""Blocks of a mixture that are computed here in the place of transformers' own: the same answers, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from loramux_server.base.architecture.experts import split_experts
from loramux_server.kernels.layers.experts import PROJECTIONS
from loramux_server.kernels.layers.mixture import GatedMixture, InputMixture
from support.tiny_models import tiny_config

QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}
BLOCKS: dict[str, tuple[type[nn.Module], str, dict[str, Any], type[nn.Module]]] = {
    "qwen2": (Qwen2MoeSparseMoeBlock, "qwen2_moe", QWEN, GatedMixture),
    "llama4, top 1": (Llama4TextMoe, "llama4_text", {"num_local_experts": 4, "num_experts_per_tok": 1}, InputMixture),
    "llama4, top 2": (Llama4TextMoe, "llama4_text", {"num_local_experts": 4, "num_experts_per_tok": 2}, InputMixture),
}


class Layer(nn.Module):
    """One block, where a model has it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.mlp = block


def filled(name: str) -> Layer:
    """Transformers' own, with random numbers of bf16, in fp32."""
    kind, architecture, changes, _ = BLOCKS[name]
    untyped: Any = kind
    layer = Layer(untyped(tiny_config(architecture, **changes)))
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) / 4).bfloat16().float()
    return layer


@torch.no_grad()
def ours(name: str) -> Layer:
    """The block that takes its place, with the same numbers."""
    theirs = filled(name)
    kind, architecture, changes, _ = BLOCKS[name]
    untyped: Any = kind
    with torch.device("meta"):
        layer = Layer(untyped(tiny_config(architecture, **changes)))
    split_experts(layer)
    layer.to_empty(device="cpu")
    held = dict(theirs.named_parameters())
    for path, parameter in layer.named_parameters():
        before, _, last = path.rpartition(".experts.")
        if not before:
            parameter.copy_(held[path])
            continue
        whole: Any = theirs.get_submodule(f"{before}.experts")
        number, projection, _ = last.split(".")
        down = projection == "down_proj"
        own = (whole.down_proj if down else whole.gate_up_proj)[int(number)]
        own = own.t() if "llama4" in name else own
        parameter.copy_(own if down else own.chunk(2)[PROJECTIONS.index(projection)])
    return layer


def rows(count: int = 33) -> torch.Tensor:
    return torch.randn(1, count, 64, generator=torch.Generator().manual_seed(5)) / 2


def first(result: Any) -> torch.Tensor:
    """Of a block that gives scores too, what it computes; [rows, width]."""
    y: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return y.reshape(-1, 64)


@pytest.mark.parametrize("name", BLOCKS)
@torch.inference_mode()
def test_a_block_gives_what_transformers_own_gives(name: str) -> None:
    theirs, layer = filled(name), ours(name)
    assert type(layer.mlp) is BLOCKS[name][3]
    torch.testing.assert_close(first(layer.mlp(rows())), first(theirs.mlp(rows())), rtol=1e-4, atol=1e-5)
