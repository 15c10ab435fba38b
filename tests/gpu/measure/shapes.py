"""Bases with random weights, made where they are measured, and the bytes that a step of one has to read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from loramux_adapters.device.device import Device

NF4_BLOCK = 64  # weights that share a scale
WORK_BYTES = 1 << 30  # of libraries and graphs
SPREAD = 0.02  # standard deviation of the weights


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder like Llama 3's, with an output head of its own.

    Attributes:
        context: tokens that a sequence has behind it when a step is measured.
        rank: of the adapters, on all layers but the head.
        room: tokens that a sequence may have.
    """

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    rank: int
    room: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of each linear layer of one layer, in the order q, k, v, o, gate, up, down."""
        queries, values = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, queries), (self.hidden, values), (self.hidden, values), (queries, self.hidden)]
        return [*attention, (self.hidden, self.mlp), (self.hidden, self.mlp), (self.mlp, self.hidden)]

    def bytes_of_step(self, rows: int, adapters: int) -> int:
        """What a decode step cannot but read: codes, fp32 scales, the head in 16 bits, its adapters in 16 bits, keys
        and values in 16 bits of `context` tokens for each row.
        """
        weights = self.layers * sum(wide_in * wide_out for wide_in, wide_out in self.linears)
        base = weights // 2 + weights // NF4_BLOCK * 4 + 2 * self.hidden * self.vocabulary
        adapter = self.layers * self.rank * sum(wide_in + wide_out for wide_in, wide_out in self.linears) * 2
        cache = rows * self.context * self.layers * 2 * self.kv_heads * self.head_dim * 2
        return base + adapters * adapter + cache

    def fits(self, rows: int, adapters: int, free: int, bases: int = 1) -> bool:
        """Whether steps of so many rows and adapters, with `bases` of these side by side, fit into `free` bytes."""
        embedding, work = 2 * self.hidden * self.vocabulary, rows * (self.vocabulary + 4 * self.mlp) * 4
        return bases * (self.bytes_of_step(rows, adapters) + embedding + work) + WORK_BYTES <= free

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.room,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=257,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )


EIGHT_B = Shape("Llama 3 8B", 32, 4096, 14336, 32, 8, 128, 128256, context=512, rank=16, room=8192)
TINY = Shape("tiny", 2, 64, 64, 2, 1, 32, 320, context=20, rank=16, room=2048)


def weights_of(shape: Shape, device: Device, seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """(name as in a checkpoint, weight in bf16 on the device) of every tensor; the same ones for the same seed."""
    on_host = "cpu" if device.place.type == "cpu" else device.place
    random = torch.Generator(on_host).manual_seed(seed)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
    for name, parameter in skeleton.named_parameters():
        if parameter.dim() == 1:
            yield name, device.put(torch.ones(parameter.shape, dtype=torch.bfloat16, device=device.place))
        else:
            numbers = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device.place)
            yield name, device.put(numbers.normal_(0.0, SPREAD, generator=random))


@torch.no_grad()
def random_base(shape: Shape, device: Device, seed: int = 0) -> Any:
    """transformers' model on the device, its layers but the head in NF4 with double quantization as bitsandbytes has
    them; never more than one of them in 16 bits at a time.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16).eval()
    with torch.device(device.place):  # it holds no weights, and buffers that are computed
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, weight in weights_of(shape, device, seed):
        path, _, leaf = name.rpartition(".")
        if path in layers and path != "lm_head":
            model.set_submodule(path, in_nf4(weight))
        else:
            setattr(model.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))
    return model


def in_nf4(weight: torch.Tensor) -> Linear4bit:
    """bitsandbytes' layer of a weight [out, in], quantized where it lies."""
    outputs, inputs = weight.shape
    codes, state = quantize_4bit(weight, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
    with torch.device("meta"):
        layer = Linear4bit(
            inputs, outputs, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
        )
    layer.weight = Params4bit(
        codes, requires_grad=False, quant_state=state, quant_type="nf4", blocksize=NF4_BLOCK, bnb_quantized=True
    )
    layer.quant_state = state
    layer.weight.module = layer
    return layer
