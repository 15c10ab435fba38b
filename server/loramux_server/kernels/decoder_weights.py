"""How the compiled step (csrc/decoder.cpp) sees a model: pointers to its weights, put together once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from loramux_adapters.lora.lora_linear import LoRALinear
from loramux_server.kernels.abi import POINTER, DecoderLayer, DecoderLinear, DecoderNorm, LoraArena
from loramux_server.kernels.adapter_kernels import arena_of
from loramux_server.kernels.attention import AttentionParams
from loramux_server.kernels.compiled_ops import kernel_of
from loramux_server.kernels.nf4_linear import NF4Linear

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_QK_NORMS = {"q_norm", "k_norm"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class NotOfThisShape(Exception):
    """The model has a part that the compiled step does not compute; the text says which."""


def parts_of(model: Any) -> tuple[Any, nn.Module]:
    """(what holds the layers, output head); everything in it has a place in the compiled step."""
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    head = model.get_output_embeddings()
    if body is None or _names(body) != _BODY or {id(child) for child in model.children()} != {id(body), id(head)}:
        raise NotOfThisShape("it has other parts than embedding, layers, norm and head")
    if kernel_of(base_layer_of(head)) != "head":
        raise NotOfThisShape("its head has no compiled kernel")
    return body, head


def layer_of(layer: Any, params: AttentionParams) -> DecoderLayer:
    if _names(layer) != _LAYER or _names(layer.self_attn) - _QK_NORMS != _ATTENTION or _names(layer.mlp) != _MLP:
        raise NotOfThisShape("a layer has other parts than Llama's")
    if kernel_of(layer.mlp) != "MLP":
        raise NotOfThisShape("an MLP has no compiled kernel")
    attention, mlp = layer.self_attn, layer.mlp
    return DecoderLayer(
        before_attention=norm_of(layer.input_layernorm),
        q_norm=norm_of(getattr(attention, "q_norm", None)),
        k_norm=norm_of(getattr(attention, "k_norm", None)),
        before_mlp=norm_of(layer.post_attention_layernorm),
        q=_linear_of(attention.q_proj),
        k=_linear_of(attention.k_proj),
        v=_linear_of(attention.v_proj),
        o=_linear_of(attention.o_proj),
        gate=_linear_of(mlp.gate_proj),
        up=_linear_of(mlp.up_proj),
        down=_linear_of(mlp.down_proj),
        scaling=params.scaling,
        softcap=params.softcap,
        window=params.window,
    )


def _linear_of(module: nn.Module) -> DecoderLinear:
    linear = base_layer_of(module)
    if not isinstance(linear, NF4Linear):
        raise NotOfThisShape("a projection has no compiled kernel")
    codes, scales, levels = linear.places
    bias = None if linear.bias is None else dense(linear.bias)
    return DecoderLinear(codes, scales, levels, bias, lora_arena_of(module), linear.in_features, linear.out_features)


def norm_of(module: Any) -> DecoderNorm:
    if module is None:
        return DecoderNorm(None, 0.0)
    if kernel_of(module) != "norm":
        raise NotOfThisShape("a norm has no compiled kernel")
    return DecoderNorm(dense(module.weight), getattr(module, "variance_epsilon", getattr(module, "eps", None)))


def base_layer_of(module: nn.Module) -> Any:
    """The base's own layer, whether or not there is room for adapters beside it."""
    return module.base_layer if isinstance(module, LoRALinear) else module


def lora_arena_of(module: nn.Module) -> LoraArena:
    return arena_of(module.arena) if isinstance(module, LoRALinear) else LoraArena()


def dense(weight: torch.Tensor) -> int:
    if weight.dtype != torch.bfloat16 or not weight.is_contiguous() or weight.device.type != "cpu":
        raise NotOfThisShape("a weight is not dense bf16")
    return weight.data_ptr()


def _names(module: Any) -> set[str]:
    return set(module._modules)


def pointers_to(tensors: Iterable[torch.Tensor]) -> Any:
    places = [tensor.data_ptr() for tensor in tensors]
    return (POINTER * len(places))(*places)
