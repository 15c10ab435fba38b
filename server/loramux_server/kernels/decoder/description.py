"""How the compiled step (csrc/exact/decoder.h) sees a model: one description of what a decoder may have.

It is read off the modules: their names say what they are for, and what the compiled forwards were given
(compiled_ops.py) says what they compute. transformers gives the same name to different places in two cases, and a few
factors are attributes: the tables below name them. Whatever has no place here raises NotOfThisShape.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loramux_adapters.lora.lora_linear import LoRALinear
from loramux_server.kernels.attention.kv_cache import KVShape
from loramux_server.kernels.attention.paged_attention import AttentionParams
from loramux_server.kernels.compiled.abi import ExactLayer, ExactLinear, ExactModel, ExactNorm, LoraArena
from loramux_server.kernels.compiled.adapter_kernels import arena_of
from loramux_server.kernels.layers.nf4_linear import NF4Linear, why_no_kernel
from loramux_server.kernels.layers.packed_embedding import PackedEmbedding
from loramux_server.kernels.layers.packed_head import PackedHead
from loramux_server.kernels.layers.rotary import Angles, tables_of

_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp"}  # and norms:
# a layer's norms by name -> their places in ExactLayer
_NORMS: tuple[dict[str, str], ...] = (
    {"input_layernorm": "before_attention", "post_attention_layernorm": "before_mlp"},
    {
        "input_layernorm": "before_attention",
        "post_attention_layernorm": "after_attention",
        "pre_feedforward_layernorm": "before_mlp",
        "post_feedforward_layernorm": "after_mlp",
    },
    {"post_attention_layernorm": "after_attention", "post_feedforward_layernorm": "after_mlp"},
)
# names of projections -> their places; a fused one lies in the first of its parts
_ATTENTION: tuple[dict[str, str], ...] = (
    {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"},
    {"qkv_proj": "q", "o_proj": "o"},
)
_MLP: tuple[dict[str, str], ...] = (
    {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    {"gate_up_proj": "gate", "down_proj": "down"},
)
_QK_NORMS: tuple[dict[str, str], ...] = ({}, {"q_norm": "q_norm", "k_norm": "k_norm"})
_ACTIVATIONS = {"act_fn", "activation_fn"}  # part of what an MLP's forward computes
_LARGEST_HEAD = 512  # write_cache of csrc/exact/attention.h

# (whose attribute, its name) -> the factor in ExactModel; 1 or none where it is not there
_FACTORS = (
    ("body", "embedding_multiplier", "embedding_factor"),
    ("layer", "residual_multiplier", "residual_factor"),
    ("config", "logits_scaling", "logit_divisor"),
    ("config", "final_logit_softcapping", "logit_softcap"),
)


class NotOfThisShape(Exception):
    """The model has something that the compiled step does not compute; the text says what."""


@dataclass
class Description:
    """A model as the compiled step reads it, where its weights lie; they must outlive it.

    Attributes:
        angles: the tables that layers name by number.
        vocabulary, padded: numbers of a row of logits that count, and that there are.
    """

    model: ExactModel
    layers: ctypes.Array[ExactLayer]
    angles: list[Angles]
    vocabulary: int
    padded: int
    keep: list[torch.Tensor] = field(default_factory=list)


def describe(model: Any, cache: KVShape, asked: list[AttentionParams]) -> Description:
    """`asked`: what each layer asks of its attention.

    Raises:
        NotOfThisShape: the model cannot be run this way.
    """
    return _Reader(model, cache, asked).description()


class _Reader:
    def __init__(self, model: Any, cache: KVShape, asked: list[AttentionParams]) -> None:
        body = getattr(model, getattr(model, "base_model_prefix", ""), None)
        self.head = model.get_output_embeddings()
        if body is None or {id(child) for child in model.children()} != {id(body), id(self.head)}:
            raise NotOfThisShape("it is not made of a body and an output head")
        self.body: Any = body
        self.config = body.config
        self.cache, self.asked = cache, asked
        self.keep: list[torch.Tensor] = []
        self.angles: list[Angles] = []
        self.numbers: dict[str | None, int] = {}  # of tables, by kind of layer

    def description(self) -> Description:
        body, dim = self.body, self.cache.head_dim
        _only(body, "the body", _BODY)
        if not self.cache.whole_numbers or dim % 16 or dim > _LARGEST_HEAD:
            raise NotOfThisShape(f"heads of {dim} numbers do not fit the cache of whole numbers")
        for layer_type, table in (tables_of(body.rotary_emb) or {}).items():
            self.numbers[layer_type] = len(self.angles)
            self.angles.append(table)
        pairs = {table.pairs for table in self.angles}
        if len(pairs) != 1 or 2 * max(pairs) > dim:
            raise NotOfThisShape(f"the rotation of its positions is another one ({_kind(body.rotary_emb)})")
        if len(self.asked) != len(body.layers):
            raise NotOfThisShape(f"it has {len(body.layers)} layers and {len(self.asked)} attentions")
        head = _base(self.head)
        if not isinstance(head, PackedHead):
            raise NotOfThisShape(f"its head ({_kind(head)}) has no compiled kernel")
        self.hidden = head.in_features
        layers = (ExactLayer * len(body.layers))(*map(self.layer, range(len(body.layers))))
        model = ExactModel(
            layers=ctypes.addressof(layers),
            embedding=self.embedding(head),
            head=self.place(head.weight),
            head_scales=self.place(head.scales),
            head_arena=_arena(self.head),
            norm=self.norm(body.norm, "the last norm", self.hidden),
            num_layers=len(layers),
            hidden=self.hidden,
            heads=layers[0].o.inputs // dim,
            kv_heads=self.cache.kv_heads,
            head_dim=dim,
            rotary_pairs=max(pairs),
            vocabulary=head.out_features,
            padded_vocabulary=head.padded,
            **self.factors(),
        )
        return Description(model, layers, self.angles, head.out_features, head.padded, self.keep)

    def factors(self) -> dict[str, float]:
        found = {name: 0.0 if name == "logit_softcap" else 1.0 for *_, name in _FACTORS}
        for owner, attribute, name in _FACTORS:
            owners = self.body.layers if owner == "layer" else [self.body if owner == "body" else self.config]
            values: set[Any] = {getattr(one, attribute, None) for one in owners} - {None}
            if len(values) > 1 or not all(isinstance(value, int | float) for value in values):
                raise NotOfThisShape(f"its {attribute} is not one number")
            found[name] = float(values.pop()) if values else found[name]
        found["embedding_factor"] *= float(self.body.embed_tokens.loramux_embedding.factor)
        return found

    def embedding(self, head: PackedHead) -> int | None:
        """None: it is read from the head."""
        embedding = self.body.embed_tokens
        if isinstance(embedding, PackedEmbedding) and embedding.weight is head.weight:
            return None
        weight = getattr(embedding, "weight", None)
        if getattr(embedding, "loramux_embedding", None) is None or not isinstance(weight, torch.Tensor):
            raise NotOfThisShape(f"its embedding ({_kind(embedding)}) has no compiled forward")
        if weight.dtype != torch.bfloat16 or weight.dim() != 2 or weight.shape[1] != self.hidden:
            raise NotOfThisShape(f"its embedding is {tuple(weight.shape)} of {weight.dtype}")
        if weight.shape[0] < head.out_features:
            raise NotOfThisShape(f"its embedding has {weight.shape[0]} rows for {head.out_features} tokens")
        return self.place(weight)

    def layer(self, index: int) -> ExactLayer:
        layer, asked, dim = self.body.layers[index], self.asked[index], self.cache.head_dim
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if attention is None or mlp is None:
            raise NotOfThisShape(f"layer {index} has {sorted(_parts(layer))} for its parts")
        norms = _choice(layer, f"layer {index}", _NORMS, _LAYER)
        projections = _choice(attention, f"the attention of layer {index}", _ATTENTION, {"q_norm", "k_norm"})
        head_norms = _choice(attention, f"the attention of layer {index}", _QK_NORMS, set(projections))
        gated = _choice(mlp, f"the MLP of layer {index}", _MLP, _ACTIVATIONS)
        found = ExactLayer(scaling=asked.scaling, softcap=asked.softcap, window=asked.window)
        for owner, names in ((attention, projections), (mlp, gated)):
            for name, place in names.items():
                setattr(found, place, self.linear(getattr(owner, name), f"{name} of layer {index}"))
        for name, place in norms.items():
            setattr(found, place, self.norm(getattr(layer, name), f"{name} of layer {index}", self.hidden))
        self.check_sizes(index, found)
        heads = {"q_norm": found.o.inputs, "k_norm": self.cache.kv_heads * dim}
        if head_norms:
            found.whole_norms = _width(attention.q_norm) != dim
        for name, place in head_norms.items():
            width = heads[name] if found.whole_norms else dim
            setattr(found, place, self.norm(getattr(attention, name), f"{name} of layer {index}", width))
        kernel = getattr(mlp, "loramux_mlp", None)
        if kernel is None or kernel.fused != (not found.up.codes):
            raise NotOfThisShape(f"the MLP of layer {index} ({_kind(mlp)}) has no compiled forward")
        found.gelu = kernel.gelu
        found.rotary = self.table(index, attention)
        return found

    def check_sizes(self, index: int, layer: ExactLayer) -> None:
        """The step trusts them: it would read beyond a weight's end."""
        hidden, kv, q = self.hidden, self.cache.kv_heads * self.cache.head_dim, layer.o.inputs
        inner = layer.down.inputs
        expected = {
            "q": (hidden, q if layer.k.codes else q + 2 * kv),
            "k": (hidden, kv),
            "v": (hidden, kv),
            "o": (_base(self.body.layers[0].self_attn.o_proj).in_features, hidden),
            "gate": (hidden, inner if layer.up.codes else 2 * inner),
            "up": (hidden, inner),
            "down": (inner, hidden),
        }
        for name, size in expected.items():
            linear = getattr(layer, name)
            if linear.codes and (linear.inputs, linear.outputs) != size:
                raise NotOfThisShape(
                    f"{name} of layer {index} takes {linear.inputs} numbers to {linear.outputs}, "
                    f"and not {size[0]} to {size[1]}"
                )
        if q % kv:
            raise NotOfThisShape(f"layer {index} has {q} numbers of queries for {kv} of keys")

    def table(self, index: int, attention: Any) -> int:
        """The table of angles of a layer; -1 where it does not rotate."""
        if not getattr(attention, "use_rope", True):
            return -1
        kind = None if None in self.numbers else self.config.layer_types[index]
        if kind not in self.numbers:
            raise NotOfThisShape(f"there are no angles for layer {index} ({kind})")
        return self.numbers[kind]

    def linear(self, module: nn.Module, name: str) -> ExactLinear:
        linear = _base(module)
        if not isinstance(linear, NF4Linear):
            sizes = isinstance(linear, nn.Linear) and why_no_kernel(linear)
            raise NotOfThisShape(f"{name} ({_kind(linear)}) has no compiled kernel{f': {sizes}' if sizes else ''}")
        bias = None if linear.bias is None else self.place(linear.bias)
        places = (self.place(linear.weight), self.place(linear.scales), bias)
        return ExactLinear(*places, _arena(module), linear.in_features, linear.out_features)

    def norm(self, module: Any, name: str, width: int) -> ExactNorm:
        kernel = getattr(module, "loramux_norm", None)
        if kernel is None:
            raise NotOfThisShape(f"{name} ({_kind(module)}) has no compiled forward")
        if kernel.weight.numel() != width:
            raise NotOfThisShape(f"{name} is of {kernel.weight.numel()} numbers, and not of {width}")
        return ExactNorm(self.place(kernel.weight), kernel.eps)

    def place(self, tensor: torch.Tensor) -> int:
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise NotOfThisShape("a weight does not lie dense in memory")
        self.keep.append(tensor)
        return tensor.data_ptr()


def _parts(module: nn.Module) -> set[str]:
    """What of a module counts: dropout does nothing here."""
    modules = {name for name, part in module._modules.items() if not isinstance(part, nn.Dropout)}
    return modules | {name for name, weight in module._parameters.items() if weight is not None}


def _only(module: nn.Module, what: str, names: set[str]) -> None:
    if (found := _parts(module)) != names:
        raise NotOfThisShape(f"{what} has {', '.join(sorted(found ^ names))} more or less than the compiled step knows")


def _choice(module: nn.Module, what: str, choices: tuple[dict[str, str], ...], others: set[str]) -> dict[str, str]:
    """The one of `choices` whose names are all that the module has besides `others`."""
    names = _parts(module) - others
    for choice in choices:
        if names == choice.keys():
            return choice
    raise NotOfThisShape(f"{what} is made of {', '.join(sorted(names))}")


def _width(norm: Any) -> int:
    kernel = getattr(norm, "loramux_norm", None)
    return 0 if kernel is None else int(kernel.weight.numel())


def _base(module: nn.Module) -> Any:
    """The base's own layer, whether or not there is room for adapters beside it."""
    return module.base_layer if isinstance(module, LoRALinear) else module


def _arena(module: nn.Module) -> LoraArena:
    return arena_of(module.arena) if isinstance(module, LoRALinear) else LoraArena()


def _kind(module: object) -> str:
    return type(module).__name__
