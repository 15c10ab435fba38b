"""A description as the compiled step on the CPU reads it (csrc/exact/exact.h): structures that point at its tensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loramux_adapters.device.device import in_host_memory
from loramux_adapters.lora.ops import Arena
from loramux_server.kernels.attention.kv_cache import KVShape
from loramux_server.kernels.compiled.abi import (
    ExactExperts,
    ExactLayer,
    ExactLinear,
    ExactModel,
    ExactNorm,
    ExactRouter,
    LoraArena,
)
from loramux_server.kernels.compiled.adapter_kernels import arena_of
from loramux_server.kernels.decoder.description import Description, Kinds, Layer, Linear, Mixture, NotOfThisShape
from loramux_server.kernels.layers.experts import exact_experts
from loramux_server.kernels.layers.nf4_linear import NF4Linear, why_no_kernel
from loramux_server.kernels.layers.packed_head import PackedHead
from loramux_server.kernels.layers.recognition import RMSNorm

_LARGEST_HEAD = 512  # write_cache of csrc/exact/attention.h
_NORMS = ("before_attention", "q_norm", "k_norm", "after_attention", "before_mlp", "after_mlp")
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass
class ExactDescription:
    """What the compiled step is handed.

    Attributes:
        padded: numbers of a row of logits that there are.
        keep: the tensors that are pointed at; and lists of experts' layers.
    """

    model: ExactModel
    layers: ctypes.Array[ExactLayer]
    padded: int
    keep: list[torch.Tensor | ctypes.Array[ExactLinear]] = field(default_factory=list)


def _why_not_linear(layer: nn.Module) -> str:
    if isinstance(layer, NF4Linear):
        return ""
    sizes = isinstance(layer, nn.Linear) and why_no_kernel(layer)
    return f"has no compiled kernel{f': {sizes}' if sizes else ''}"


def _why_not_head(head: nn.Module) -> str:
    return "" if isinstance(head, PackedHead) else "has no compiled kernel"


def _why_not_cache(shape: KVShape) -> str:
    dim = shape.head_dim
    fits = shape.whole_numbers and dim % 16 == 0 and dim <= _LARGEST_HEAD
    return "" if fits else f"heads of {dim} numbers do not fit the cache of whole numbers"


KINDS = Kinds(_why_not_linear, _why_not_head, _why_not_cache, mixtures=True)


def exact_model(of: Description) -> ExactDescription:
    """Of a model described with KINDS, whose tensors must lie where they are from now on.

    Raises:
        NotOfThisShape: one of them does not lie dense in host memory.
    """
    keep: list[torch.Tensor | ctypes.Array[ExactLinear]] = []

    def place(tensor: torch.Tensor) -> int:
        if not tensor.is_contiguous() or not in_host_memory(tensor):
            raise NotOfThisShape("a weight does not lie dense in memory")
        keep.append(tensor)
        return tensor.data_ptr()

    def norm(its: RMSNorm | None) -> ExactNorm:
        return ExactNorm() if its is None else ExactNorm(place(its.weight), its.eps)

    def arena(its: Arena | None) -> LoraArena:
        return LoraArena() if its is None else arena_of(its)

    def linear(its: Linear | None) -> ExactLinear:
        if its is None:
            return ExactLinear()
        layer = its.layer
        bias = None if layer.bias is None else place(layer.bias)
        return ExactLinear(place(layer.weight), place(layer.scales), bias, arena(its.arena), its.inputs, its.outputs)

    def experts(its: Mixture) -> ExactExperts:
        layers = (ExactLinear * len(its.layers))(*map(linear, its.layers))
        keep.append(layers)
        return exact_experts(its.form, its.router.chosen, layers)

    def router(its: Mixture) -> ExactRouter:
        bias = None if its.bias is None else place(its.bias)
        scores = its.scores
        return ExactRouter(place(scores.weight), place(scores.scales), bias, scores.padded, its.router.normalized)

    def sinks(its: torch.Tensor | None) -> int | None:
        return None if its is None else place(its.detach().float().contiguous())

    def exact_layer(its: Layer) -> ExactLayer:
        parts: dict[str, Any] = {name: norm(getattr(its, name)) for name in _NORMS}
        parts |= {name: linear(getattr(its, name)) for name in _LINEARS}
        if its.mixture is not None:
            parts |= {"experts": experts(its.mixture), "router": router(its.mixture)}
        asked = its.asked
        return ExactLayer(
            **parts,
            sinks=sinks(asked.sinks),
            whole_norms=its.whole_norms,
            rotary=its.rotary,
            window=asked.window,
            gelu=its.gelu,
            scaling=asked.scaling,
            softcap=asked.softcap,
            clip=its.clip,
        )

    layers = (ExactLayer * len(of.layers))(*map(exact_layer, of.layers))
    head = of.head.layer
    model = ExactModel(
        layers=ctypes.addressof(layers),
        embedding=None if of.embedding is None else place(of.embedding),
        head=place(head.weight),
        head_scales=place(head.scales),
        head_arena=arena(of.head.arena),
        norm=norm(of.norm),
        num_layers=len(layers),
        hidden=of.hidden,
        heads=of.heads,
        kv_heads=of.kv_heads,
        head_dim=of.head_dim,
        rotary_pairs=of.pairs,
        vocabulary=of.vocabulary,
        padded_vocabulary=head.padded,
        embedding_factor=of.embedding_factor,
        residual_factor=of.residual_factor,
        logit_divisor=of.logit_divisor,
        logit_softcap=of.logit_softcap,
    )
    return ExactDescription(model, layers, head.padded, keep)
