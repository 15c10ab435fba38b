"""Small random models of every family that the compiled step runs, in NF4, and their slow twins in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import AutoModelForCausalLM

from loramux_adapters.lora.lora_linear import LoRALinear
from loramux_adapters.lora.ops import LoraRows
from loramux_adapters.lora.slots import ScaledSlot
from loramux_server.base.architecture.experts import split_experts
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache
from loramux_server.kernels.attention.paged_attention import AttentionStep, probe_kv_shape
from loramux_server.kernels.choice import choose_kernels
from loramux_server.kernels.layers.experts import PROJECTIONS, Experts
from loramux_server.kernels.layers.nf4_linear import NF4Linear
from loramux_server.kernels.layers.packed_embedding import PackedEmbedding
from loramux_server.kernels.layers.packed_head import PackedHead, rows_of
from support.stepping import CPU, Stepper
from support.tiny_models import tiny_config

Forward = Callable[[list[int], list[int], AttentionStep, "LoraRows | None", "LoraRows | None"], torch.Tensor]

SIZES: dict[str, Any] = {
    "vocab_size": 333,  # no multiple of 32: a row of logits is padded
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "initializer_range": 0.1,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# family -> (architecture, what its config says beyond tiny_models and SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama 3": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {
                **_ROPE,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "Mistral": ("mistral", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {}),
    "Gemma 3": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {**_ROPE, "rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": _ROPE,
            },
        },
    ),
    "Phi-3": ("phi3", {"sliding_window": 9}),
    "Phi-4": ("phi3", {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.75}}),
    "Granite": ("granite", {"embedding_multiplier": 12.0, "logits_scaling": 3.0, "residual_multiplier": 0.22}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {"sliding_window": 8}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "Qwen3-MoE": ("qwen3_moe", {"mlp_only_layers": [1], "num_experts": 6}),
    "OLMoE": ("olmoe", {"num_key_value_heads": 4, "clip_qkv": 1.5}),
    "Mixtral": ("mixtral", {}),
    "gpt-oss": ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "one key for all": ("llama", {"num_key_value_heads": 1, "head_dim": 64}),
    "long heads": ("gemma2", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1}),
}


def random_model(family: str, **changes: Any) -> Any:
    """In bf16, its layers in NF4 as bitsandbytes has them; norms and biases are random too."""
    architecture, more = FAMILIES[family]
    torch.manual_seed(5)
    config = tiny_config(architecture, **SIZES | more | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    split_experts(model)
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            module.to_empty(device="cpu")
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=SIZES["initializer_range"])
        elif path.endswith((".gate", ".router")):
            nn.init.normal_(module.weight, std=0.3)  # so that choices are clear
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.empty_like(parameter).uniform_(-0.4, 0.4)
        parameter.requires_grad_(False)
    head = model.get_output_embeddings()
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not head:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _quantized(layer))
    return model


def _quantized(layer: nn.Linear) -> Linear4bit:
    nf4 = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
    )
    nf4.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", blocksize=64)
    nf4.bias = layer.bias
    return nf4.to("cpu")


def slow_twin(model: Any) -> Any:
    """transformers' own code in fp32, with eager attention, over the weights that a packed model's layers stand for."""
    config = type(model.config).from_dict(model.config.to_dict())
    twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    weights = {name.replace(".base_layer", ""): module for name, module in model.named_modules()}
    with torch.no_grad():
        for path, module in twin.named_modules():
            if not any(True for _ in module.parameters()):
                continue
            its = weights[path]
            if isinstance(its, LoRALinear):
                its = its.base_layer
            if isinstance(its, Experts):
                _copy_experts(module, its)
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    parameter.copy_(weight_of(its) if name == "weight" else getattr(its, name))
    return twin


def _copy_experts(module: Any, its: Experts) -> None:
    """Into transformers' module of all experts of a layer, which has them in one tensor."""
    for number, expert in enumerate(its):
        layers = [getattr(expert, name) for name in PROJECTIONS]
        layers = [layer.base_layer if isinstance(layer, LoRALinear) else layer for layer in layers]
        for what in ("", "_bias")[: 1 + its.form.bias]:
            gate, up, down = ((layer.bias if what else weight_of(layer)).float() for layer in layers)
            both = torch.stack([gate, up], dim=1).flatten(0, 1) if its.form.interleaved else torch.cat([gate, up])
            for name, own in (("gate_up_proj", both), ("down_proj", down)):
                getattr(module, name + what)[number] = own.t() if its.form.turned and not what else own


def weight_of(module: Any) -> torch.Tensor:
    """The weight [out, in] that a layer of the base stands for."""
    if isinstance(module, (PackedHead, PackedEmbedding)):
        rows = module.out_features if isinstance(module, PackedHead) else module.num_embeddings
        return rows_of(module.weight, module.scales, torch.arange(rows))
    if (scores := getattr(module, "loramux_scores", None)) is not None:
        return weight_of(scores)
    if isinstance(module, NF4Linear):
        return module.dequantized()
    if isinstance(module, Linear4bit):
        four: Any = module.weight
        return dequantize_4bit(four.data, four.quant_state)
    weight: torch.Tensor = module.weight
    return weight


class Served:
    """A model as the engine runs it: on kernels, with slots for adapters, all of them filled with random numbers.

    Attributes:
        decoder, why_by_modules: the compiled step, if it has one, or why it has none.
        kernels: those it runs on.
    """

    def __init__(self, model: Any, kernels: str = "native", rows: int = 64) -> None:
        chosen = choose_kernels(CPU, kernels)
        chosen.lay_out(model)
        chosen.use_ops(model)
        stepper = Stepper(model, kernels=kernels, rows=rows)
        self.model = model
        self.kernels = stepper.kernels
        self.decoder = stepper.runner.decoder
        self.why_by_modules = stepper.runner.why_by_modules
        self.shape = probe_kv_shape(model, CPU, whole_numbers=True)
        self._slots = stepper.slots
        generator = torch.Generator().manual_seed(2)
        for layer in self._slots.layers.values():
            for weights in (layer.arena.a, layer.arena.bt):
                weights.copy_(torch.randn(weights.shape, generator=generator) * 0.1)
            layer.arena.targeted.fill_(1)
        self._slots._some_picked = True  # experts' layers too, which nobody loaded

    def cache(self, blocks: int) -> KVCache:
        return KVCache(self.shape, blocks, CPU)

    @torch.inference_mode()
    def by_modules(
        self, tokens: list[int], heads: list[int], step: AttentionStep, lora: LoraRows | None, head: LoraRows | None
    ) -> torch.Tensor:
        """What Decoder.forward gives, module by module."""
        self._slots.set_lora(lora, head)
        try:
            logits: torch.Tensor = self.model(
                input_ids=torch.tensor([tokens]),
                position_ids=step.position[None].long(),
                logits_to_keep=torch.tensor(heads),
                use_cache=False,
                loramux_step=step,
            ).logits[0]
        finally:
            self._slots.reset_lora()
        return logits

    def feed(
        self,
        forward: Forward,
        sequences: list[list[int]],
        adapters: Sequence[tuple[ScaledSlot, ...]] = (),
        chunk: int = 1000,
    ) -> list[torch.Tensor]:
        """Logits of all tokens of each sequence; a step takes `chunk` tokens of each. No `adapters`: of the base."""
        width = -(-max(map(len, sequences)) // BLOCK_SIZE)
        cache = self.cache(len(sequences) * width)
        tables = torch.arange(len(sequences) * width, dtype=torch.int32).view(-1, width).flip(0).contiguous()
        found: list[list[torch.Tensor]] = [[] for _ in sequences]
        for first in range(0, max(map(len, sequences)), chunk):
            parts = {index: one[first : first + chunk] for index, one in enumerate(sequences) if len(one) > first}
            rows = [(index, first + offset) for index, part in parts.items() for offset in range(len(part))]
            starts = np.cumsum([0, *map(len, parts.values())])[:-1].tolist()
            step = AttentionStep(
                cache=cache,
                attend=self.kernels.attend,
                tables=tables,
                sequence=torch.tensor([index for index, _ in rows], dtype=torch.int32),
                position=torch.tensor([position for _, position in rows], dtype=torch.int32),
                runs=tuple((index, row, len(parts[index]), first) for index, row in zip(parts, starts, strict=True)),
            )
            lora = LoraRows.build([(adapters[index] if adapters else (), len(part)) for index, part in parts.items()])
            tokens = [token for part in parts.values() for token in part]
            logits = forward(tokens, list(range(len(rows))), step, lora, lora)
            for index, part in zip(parts, logits.split([len(part) for part in parts.values()]), strict=True):
                found[index].append(part.clone())
        return [torch.cat(parts) for parts in found]


@contextmanager
def changed(structure: Any, name: str, value: Any) -> Iterator[None]:
    """A field of a description, for a while."""
    before = getattr(structure, name)
    setattr(structure, name, value)
    try:
        yield
    finally:
        setattr(structure, name, before)
