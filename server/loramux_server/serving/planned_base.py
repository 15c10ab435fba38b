"""What a base takes on a card, to the byte, of its config alone: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loramux_adapters.lora.lora_linear import linears
from loramux_adapters.nf4 import BLOCK
from loramux_adapters.training.run.plan import SCALE_BLOCK
from loramux_server.kernels.attention.kv_cache import KVShape
from loramux_server.kernels.gpu.step.form import DecoderForm
from loramux_server.kernels.layers.mixture import SharedGate
from loramux_server.serving.device_sizes import BaseSizes

_TABLES = 4 * (16 + 256) + 4  # of a layer that bitsandbytes keeps: values of codes and of scale codes, an offset


@dataclass(frozen=True, slots=True)
class PlannedBase:
    """Bytes of a base on a card, and what follows from its shape.

    Attributes:
        parameters: how many weights it has.
        nf4: its linear layers in NF4, with their scales.
        head: embedding and output head in 16 bit.
        others: norms and biases, and the norms once more in fp32, as steps read them.
        sizes: what a server's sizes follow from.
    """

    parameters: int
    nf4: int
    head: int
    others: int
    sizes: BaseSizes

    @property
    def nbytes(self) -> int:
        return self.nf4 + self.head + self.others


def planned_base(skeleton: Any, *, vectors: bool = False) -> PlannedBase:
    """
    Args:
        skeleton: transformers' causal language model on the meta device.
        vectors: slots have room for gain and shift.
    """
    head, embedding = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    in_nf4 = [layer for _, layer in linears(skeleton) if layer is not head and not isinstance(layer, SharedGate)]
    dense = {id(module.weight): module.weight for module in (head, embedding) if module is not None}
    counted = {id(layer.weight) for layer in in_nf4} | dense.keys()
    rest = [parameter for parameter in skeleton.parameters() if id(parameter) not in counted]
    norms = [
        module.weight
        for module in skeleton.modules()
        if "weight" in module._parameters and not isinstance(module, (nn.Linear, nn.Embedding))
    ]
    text = skeleton.config.get_text_config()
    heads = int(text.num_attention_heads)
    return PlannedBase(
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        nf4=sum(map(_nf4_bytes, in_nf4)),
        head=sum(2 * weight.numel() for weight in dense.values()),
        others=sum(2 * parameter.numel() for parameter in rest)
        + sum(4 * weight.numel() for weight in norms)
        + sum(buffer.numel() * buffer.element_size() for buffer in skeleton.buffers()),
        sizes=BaseSizes(
            linears={path: (layer.in_features, layer.out_features) for path, layer in linears(skeleton)},
            kv=KVShape(
                layers=int(text.num_hidden_layers),
                kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
                head_dim=_head_width(text, heads),
                dtype=torch.bfloat16,
            ),
            context=int(getattr(skeleton.config, "max_position_embeddings", 0) or 1 << 20),
            form=DecoderForm.of_skeleton(skeleton),
            vectors=vectors,
        ),
    )


def _head_width(text: Any, heads: int) -> int:
    """Numbers of a head in the cache. Of latent attention, whose keys and values differ, the wider ones'."""
    if getattr(text, "kv_lora_rank", None):
        return int(max(text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim))
    return int(getattr(text, "head_dim", None) or text.hidden_size // heads)


def _nf4_bytes(layer: nn.Linear) -> int:
    """Codes, and scales in fp32 as the kernels read them; or as bitsandbytes has both, where they do not fit these."""
    weights = layer.in_features * layer.out_features
    if layer.in_features % BLOCK == 0:
        return weights // 2 + 4 * (weights // BLOCK)
    scales = -(-weights // BLOCK)
    return -(-weights // 2) + scales + 4 * -(-scales // SCALE_BLOCK) + _TABLES
