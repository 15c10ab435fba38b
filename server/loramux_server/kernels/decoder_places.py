"""How the compiled step (csrc/decoder.cpp) sees a model: pointers to its weights, put together once."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from loramux_adapters.lora.lora_linear import LoRALinear
from loramux_server.kernels.attention import AttentionParams
from loramux_server.kernels.compiled_ops import kernel_of
from loramux_server.kernels.nf4_linear import NF4Linear

POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_QK_NORMS = {"q_norm", "k_norm"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class LinearPlaces(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("codes", "scales", "levels", "bias", "arena")),
        *((name, _SIZE) for name in ("inputs", "outputs")),
    ]


class NormPlaces(ctypes.Structure):
    _fields_ = [("weight", POINTER), ("eps", _NUMBER)]


class LayerPlaces(ctypes.Structure):
    _fields_ = [
        *((name, NormPlaces) for name in ("before_attention", "q_norm", "k_norm", "before_mlp")),
        *((name, LinearPlaces) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _NUMBER) for name in ("scaling", "softcap")),
        ("window", _SIZE),
    ]


class ModelPlaces(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("layers", "embedding", "head", "head_arena", "add_lora", "lora_spans")),
        ("norm", NormPlaces),
        *((name, _SIZE) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "vocabulary")),
        ("lora_portable", _SIZE),
    ]


class StepPlaces(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("tokens", "position", "sequence", "tables", "sampled", "cos", "sin")),
        *((name, POINTER) for name in ("k_cache", "v_cache", "lora", "head_lora", "scratch", "logits")),
        *((name, _SIZE) for name in ("rows", "samples", "table_width", "threads")),
    ]


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


def layer_of(layer: Any, params: AttentionParams) -> LayerPlaces:
    if _names(layer) != _LAYER or _names(layer.self_attn) - _QK_NORMS != _ATTENTION or _names(layer.mlp) != _MLP:
        raise NotOfThisShape("a layer has other parts than Llama's")
    if kernel_of(layer.mlp) != "MLP":
        raise NotOfThisShape("an MLP has no compiled kernel")
    attention, mlp = layer.self_attn, layer.mlp
    return LayerPlaces(
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


def _linear_of(module: nn.Module) -> LinearPlaces:
    linear = base_layer_of(module)
    if not isinstance(linear, NF4Linear):
        raise NotOfThisShape("a projection has no compiled kernel")
    codes, scales, levels = linear.places
    bias = None if linear.bias is None else dense(linear.bias)
    return LinearPlaces(codes, scales, levels, bias, arena_of(module), linear.in_features, linear.out_features)


def norm_of(module: Any) -> NormPlaces:
    if module is None:
        return NormPlaces(None, 0.0)
    if kernel_of(module) != "norm":
        raise NotOfThisShape("a norm has no compiled kernel")
    return NormPlaces(dense(module.weight), getattr(module, "variance_epsilon", getattr(module, "eps", None)))


def base_layer_of(module: nn.Module) -> Any:
    """The base's own layer, whether or not there is room for adapters beside it."""
    return module.base_layer if isinstance(module, LoRALinear) else module


def arena_of(module: nn.Module) -> int | None:
    return module.arena.native if isinstance(module, LoRALinear) else None


def dense(weight: torch.Tensor) -> int:
    if weight.dtype != torch.bfloat16 or not weight.is_contiguous() or weight.device.type != "cpu":
        raise NotOfThisShape("a weight is not dense bf16")
    return weight.data_ptr()


def _names(module: Any) -> set[str]:
    return set(module._modules)


def places_of(tensors: Iterable[torch.Tensor]) -> Any:
    places = [tensor.data_ptr() for tensor in tensors]
    return (POINTER * len(places))(*places)
