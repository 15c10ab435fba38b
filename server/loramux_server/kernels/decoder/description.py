"""What a decoder is: one description of it, which the whole steps of every device are made from.

It is read off the modules: their names say what they are for, and what they were recognized as (layers/operations.py)
says what they compute. transformers gives the same name to different places in two cases, and a few factors are
attributes: the tables below name them. Whatever has no place here raises NotOfThisShape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loramux_adapters.lora.lora_linear import LoRALinear
from loramux_adapters.lora.ops import Arena
from loramux_server.kernels.attention.kv_cache import KVShape
from loramux_server.kernels.attention.paged_attention import AttentionParams
from loramux_server.kernels.layers.experts import PROJECTIONS, ExpertForm, Experts
from loramux_server.kernels.layers.packed_head import PackedHead
from loramux_server.kernels.layers.recognition import RMSNorm
from loramux_server.kernels.layers.rotary import Angles, tables_of
from loramux_server.kernels.layers.routing import Router

_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp"}  # and norms:
# a layer's norms by name -> their places in Layer
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
# names of who chooses experts
_MIXTURE: tuple[dict[str, str], ...] = (
    {"gate": "router", "experts": "experts"},
    {"router": "router", "experts": "experts"},
)
_QK_NORMS: tuple[dict[str, str], ...] = ({}, {"q_norm": "q_norm", "k_norm": "k_norm"})
_HEAD_NORMS = {"q_norm", "k_norm"}
_ACTIVATIONS = {"act_fn", "activation_fn"}  # part of what an MLP's forward computes

_CLIPPING = {"olmoe"}  # whose code does what a config's `clip_qkv` says; others keep it there and do nothing

# (whose attribute, its name) -> the factor in Description; 1 or none where it is not there
_FACTORS = (
    ("body", "embedding_multiplier", "embedding_factor"),
    ("layer", "residual_multiplier", "residual_factor"),
    ("config", "logits_scaling", "logit_divisor"),
    ("config", "final_logit_softcapping", "logit_softcap"),
)


class NotOfThisShape(Exception):
    """The model has something that a whole step does not compute; the text says what."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of the base.

    Attributes:
        layer: it, of a kind that the step takes.
        arena: the adapters' memory beside it; None where adapters cannot target it.
    """

    layer: Any
    arena: Arena | None

    @property
    def inputs(self) -> int:
        return int(self.layer.in_features)

    @property
    def outputs(self) -> int:
        return int(self.layer.out_features)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts in the place of a gated MLP, of which each row goes through a few.

    Attributes:
        form: of them.
        layers: gate, up and down of each, one expert behind the other.
        router, scores, bias: who chooses; its weight, and [experts] fp32 or None.
    """

    form: ExpertForm
    layers: list[Linear]
    router: Router
    scores: PackedHead
    bias: torch.Tensor | None


@dataclass
class Layer:
    """One layer: what is None or zero is not there.

        n = before_attention(x)
        x += residual * after_attention(o(attend(turn(q_norm(q(n))), turn(k_norm(k(n))), v(n))))
        m = before_mlp(x)
        x += residual * after_mlp(down(activation(gate(m)) * up(m)))

    Attributes:
        k, v: None: q gives all three, one behind the other.
        up: None: gate gives both, one behind the other.
        whole_norms: q_norm and k_norm are of all heads together, not of each.
        rotary: which table of angles; -1: none.
        gelu: the activation is GELU by tanh, else SiLU.
        mixture: in the place of gate, up, down and activation.
        clip: queries, keys and values are cut off at it, before they turn.
    """

    asked: AttentionParams
    before_attention: RMSNorm | None = None
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None
    after_attention: RMSNorm | None = None
    before_mlp: RMSNorm | None = None
    after_mlp: RMSNorm | None = None
    q: Linear | None = None
    k: Linear | None = None
    v: Linear | None = None
    o: Linear | None = None
    gate: Linear | None = None
    up: Linear | None = None
    down: Linear | None = None
    whole_norms: bool = False
    rotary: int = -1
    gelu: bool = False
    mixture: Mixture | None = None
    clip: float = 0.0

    def linear(self, name: str) -> Linear:
        """One that every layer has, or every layer without a mixture."""
        found: Linear | None = getattr(self, name)
        assert found is not None
        return found


@dataclass(frozen=True, slots=True)
class Kinds:
    """What the whole step of a device takes; each says why one does not fit, or gives "".

    Attributes:
        linear: a layer of the base.
        head: the output head.
        cache: of keys and values.
        embedding: what the weight of one is kept in, where it is not read from the head.
        mixtures: it takes layers with experts, and what attention of such bases has: sinks, and a clip.
    """

    linear: Callable[[nn.Module], str]
    head: Callable[[nn.Module], str]
    cache: Callable[[KVShape], str]
    embedding: torch.dtype = torch.bfloat16
    mixtures: bool = False


@dataclass
class Description:
    """A model as a whole step computes it. Its tensors are the model's own.

    Attributes:
        embedding: [at least vocabulary, hidden]; None: rows of the head.
        head: the output head, of `vocabulary` outputs.
        angles: the tables that layers name by number, all of `pairs` pairs.
        logit_softcap: 0: none.
    """

    layers: list[Layer]
    embedding: torch.Tensor | None
    head: Linear
    norm: RMSNorm
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    angles: list[Angles]
    embedding_factor: float = 1.0
    residual_factor: float = 1.0
    logit_divisor: float = 1.0
    logit_softcap: float = 0.0

    @property
    def pairs(self) -> int:
        return self.angles[0].pairs

    @property
    def vocabulary(self) -> int:
        return self.head.outputs


def describe(model: Any, cache: KVShape, asked: list[AttentionParams], kinds: Kinds) -> Description:
    """`asked`: what each layer asks of its attention.

    Raises:
        NotOfThisShape: the model cannot be run this way.
    """
    return _Reader(model, cache, asked, kinds).description()


class _Reader:
    def __init__(self, model: Any, cache: KVShape, asked: list[AttentionParams], kinds: Kinds) -> None:
        body = getattr(model, getattr(model, "base_model_prefix", ""), None)
        self.head = model.get_output_embeddings()
        if body is None or {id(child) for child in model.children()} != {id(body), id(self.head)}:
            raise NotOfThisShape("it is not made of a body and an output head")
        self.body: Any = body
        self.config = body.config
        self.cache, self.asked, self.kinds = cache, asked, kinds
        self.angles: list[Angles] = []
        self.numbers: dict[str | None, int] = {}  # of tables, by kind of layer

    def description(self) -> Description:
        body, dim = self.body, self.cache.head_dim
        _only(body, "the body", _BODY)
        if reason := self.kinds.cache(self.cache):
            raise NotOfThisShape(reason)
        for layer_type, table in (tables_of(body.rotary_emb) or {}).items():
            self.numbers[layer_type] = len(self.angles)
            self.angles.append(table)
        pairs = {table.pairs for table in self.angles}
        if len(pairs) != 1 or 2 * max(pairs) > dim:
            raise NotOfThisShape(f"the rotation of its positions is another one ({_kind(body.rotary_emb)})")
        if len(self.asked) != len(body.layers):
            raise NotOfThisShape(f"it has {len(body.layers)} layers and {len(self.asked)} attentions")
        head = _base(self.head)
        if reason := self.kinds.head(head):
            raise NotOfThisShape(f"its head ({_kind(head)}) {reason}")
        self.hidden = head.in_features
        layers = list(map(self.layer, range(len(body.layers))))
        return Description(
            layers=layers,
            embedding=self.embedding(head),
            head=Linear(head, _arena(self.head)),
            norm=self.norm(body.norm, "the last norm", self.hidden),
            hidden=self.hidden,
            heads=layers[0].linear("o").inputs // dim,
            kv_heads=self.cache.kv_heads,
            head_dim=dim,
            angles=self.angles,
            **self.factors(),
        )

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

    def embedding(self, head: Any) -> torch.Tensor | None:
        embedding = self.body.embed_tokens
        weight = getattr(embedding, "weight", None)
        if getattr(embedding, "loramux_embedding", None) is None or not isinstance(weight, torch.Tensor):
            raise NotOfThisShape(f"its embedding ({_kind(embedding)}) has no compiled forward")
        if embedding.num_embeddings < head.out_features:
            raise NotOfThisShape(f"its embedding has {embedding.num_embeddings} rows for {head.out_features} tokens")
        if not weight.is_floating_point() and weight is head.weight:
            return None
        if weight.dtype != self.kinds.embedding or weight.dim() != 2 or weight.shape[1] != self.hidden:
            raise NotOfThisShape(f"its embedding is {tuple(weight.shape)} of {weight.dtype}")
        return weight

    def layer(self, index: int) -> Layer:
        layer, asked, dim = self.body.layers[index], self.asked[index], self.cache.head_dim
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if attention is None or mlp is None:
            raise NotOfThisShape(f"layer {index} has {sorted(_parts(layer))} for its parts")
        norms = _choice(layer, f"layer {index}", _NORMS, _LAYER)
        if asked.chunk:
            raise NotOfThisShape(f"layer {index} sees chunks of a text")
        others = _HEAD_NORMS | ({"sinks"} if self.sinks(attention, asked) else set())
        projections = _choice(attention, f"the attention of layer {index}", _ATTENTION, others)
        head_norms = _choice(
            attention, f"the attention of layer {index}", _QK_NORMS, {*projections, *others} - _HEAD_NORMS
        )
        found = Layer(asked, clip=self.clip())
        for name, place in projections.items():
            setattr(found, place, self.linear(getattr(attention, name), f"{name} of layer {index}"))
        for name, place in norms.items():
            setattr(found, place, self.norm(getattr(layer, name), f"{name} of layer {index}", self.hidden))
        if isinstance(getattr(mlp, "experts", None), Experts):
            found.mixture = self.mixture(index, mlp)
        else:
            self.mlp(index, mlp, found)
        self.check_sizes(index, found)
        heads = {"q_norm": found.linear("o").inputs, "k_norm": self.cache.kv_heads * dim}
        if head_norms:
            found.whole_norms = _width(attention.q_norm) != dim
        for name, place in head_norms.items():
            width = heads[name] if found.whole_norms else dim
            setattr(found, place, self.norm(getattr(attention, name), f"{name} of layer {index}", width))
        found.rotary = self.table(index, attention)
        return found

    def mlp(self, index: int, mlp: Any, found: Layer) -> None:
        for name, place in _choice(mlp, f"the MLP of layer {index}", _MLP, _ACTIVATIONS).items():
            setattr(found, place, self.linear(getattr(mlp, name), f"{name} of layer {index}"))
        kernel = getattr(mlp, "loramux_mlp", None)
        if kernel is None or kernel.fused != (found.up is None):
            raise NotOfThisShape(f"the MLP of layer {index} ({_kind(mlp)}) has no compiled forward")
        found.gelu = kernel.gelu

    def mixture(self, index: int, block: Any) -> Mixture:
        """Of a block that is a router and experts, and nothing else."""
        if not self.kinds.mixtures:
            raise NotOfThisShape(f"layer {index} is a mixture of experts, which has no whole step here")
        (chooser,) = _choice(block, f"the mixture of layer {index}", _MIXTURE, set()).keys() - {"experts"}
        experts, module = block.experts, getattr(block, chooser)
        router, scores = getattr(module, "loramux_router", None), getattr(module, "loramux_scores", None)
        form, bias = experts.form, module._parameters.get("bias")
        if router is None or router != Router(router.chosen, router.normalized):
            raise NotOfThisShape(f"the router of layer {index} ({_kind(module)}) chooses in a way of its own")
        if not isinstance(scores, PackedHead) or (scores.in_features, scores.out_features) != (self.hidden, form.count):
            raise NotOfThisShape(f"the router of layer {index} ({_kind(module)}) has no compiled kernel")
        if bias is not None and (bias.dtype != torch.float32 or bias.shape != (form.count,)):
            raise NotOfThisShape(f"the router of layer {index} has a bias of {bias.dtype} {tuple(bias.shape)}")
        layers = []
        for number, expert in enumerate(experts):
            for name in PROJECTIONS:
                layers.append(self.linear(getattr(expert, name), f"{name} of expert {number} of layer {index}"))
        return Mixture(form, layers, router, scores, bias)

    def sinks(self, attention: Any, asked: AttentionParams) -> bool:
        """Whether a layer's attention has sinks, which must be those that it asks for."""
        if asked.sinks is None:
            return False
        if asked.sinks is not attention._parameters.get("sinks") or not self.kinds.mixtures:
            raise NotOfThisShape("its attention has sinks, which have no whole step here")
        return True

    def clip(self) -> float:
        """What queries, keys and values are cut off at: random tokens do not reach it, so a trial would not see it."""
        clip = getattr(self.config, "clip_qkv", None)
        if clip is not None and (not self.kinds.mixtures or self.config.model_type not in _CLIPPING):
            raise NotOfThisShape("its queries, keys and values may be cut off, which has no whole step here")
        return float(clip or 0.0)

    def check_sizes(self, index: int, layer: Layer) -> None:
        """The step trusts them: it would read beyond a weight's end."""
        hidden, kv, q = self.hidden, self.cache.kv_heads * self.cache.head_dim, layer.linear("o").inputs
        inner = layer.down.inputs if layer.down else 0
        expected = {
            "q": (hidden, q if layer.k else q + 2 * kv),
            "k": (hidden, kv),
            "v": (hidden, kv),
            "o": (_base(self.body.layers[0].self_attn.o_proj).in_features, hidden),
            "gate": (hidden, inner if layer.up else 2 * inner),
            "up": (hidden, inner),
            "down": (inner, hidden),
        }
        found: list[tuple[str, Linear | None, tuple[int, int]]] = [
            (name, getattr(layer, name), size) for name, size in expected.items()
        ]
        if layer.mixture is not None:
            sizes = [(hidden, layer.mixture.form.inner)] * 2 + [(layer.mixture.form.inner, hidden)]
            found += [
                (f"{PROJECTIONS[number % 3]} of expert {number // 3}", linear, sizes[number % 3])
                for number, linear in enumerate(layer.mixture.layers)
            ]
        for name, linear, size in found:
            if linear is not None and (linear.inputs, linear.outputs) != size:
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

    def linear(self, module: nn.Module, name: str) -> Linear:
        layer = _base(module)
        if reason := self.kinds.linear(layer):
            raise NotOfThisShape(f"{name} ({_kind(layer)}) {reason}")
        return Linear(layer, _arena(module))

    def norm(self, module: Any, name: str, width: int) -> RMSNorm:
        kernel: RMSNorm | None = getattr(module, "loramux_norm", None)
        if kernel is None:
            raise NotOfThisShape(f"{name} ({_kind(module)}) has no compiled forward")
        if kernel.weight.numel() != width:
            raise NotOfThisShape(f"{name} is of {kernel.weight.numel()} numbers, and not of {width}")
        return kernel


def _parts(module: nn.Module) -> set[str]:
    """What of a module counts: dropout does nothing here."""
    modules = {name for name, part in module._modules.items() if not isinstance(part, nn.Dropout)}
    return modules | {name for name, weight in module._parameters.items() if weight is not None}


def _only(module: nn.Module, what: str, names: set[str]) -> None:
    if (found := _parts(module)) != names:
        raise NotOfThisShape(f"{what} has {', '.join(sorted(found ^ names))} more or less than a whole step knows")


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


def _arena(module: nn.Module) -> Arena | None:
    return module.arena if isinstance(module, LoRALinear) else None


def _kind(module: object) -> str:
    return type(module).__name__
