"""What an adapter needs to know of the base model it runs on, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from loramux_adapters.artifact.own_tokens import OwnTokens
    from loramux_adapters.lora.affine import BaseWeights
    from loramux_adapters.lora.weights import ConvertPairs


@dataclass(frozen=True, slots=True)
class AdapterText:
    """What an adapter brings for text; None: nothing but what the base has."""

    chat_template: str | None = None
    tokens: OwnTokens | None = None


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The base model as an adapter sees it.

    Attributes:
        base_id: sha256 over source weights, config, tokenizer and quantization recipe, hex.
        linears: module path in the base ("model.layers.0.self_attn.q_proj") -> (in_features, out_features).
        convert: the kernel that turns a file's numbers into served ones (lora/weights.py); None: tensors do.
        tensor_equals: (parameter name in the base, tensor) -> True only if the base holds exactly that tensor; used to
            accept, and then drop, copies of base weights that peft writes beside an adapter.
        weights: its layers as they are served, which some adapters change by more than A and B; None: not here.
        own_text: directory -> what the adapter in it brings for text: a chat template in place of the base's, tokens
            beside the base's; raises `AdapterRejected` for a tokenizer that is another one (chat/tokenizer_files.py).
        module_of: what an adapter calls a module -> its path here; None where it is of a part of the model that is not
            served (the vision tower of one that takes images). Its own paths stay as they are.
        token_bytes: that one adapter may take here for rows of its own in embedding and output head; None: no bound.
    """

    base_id: str
    linears: Mapping[str, tuple[int, int]]
    tensor_equals: Callable[[str, torch.Tensor], bool] = field(default=lambda name, tensor: False)
    convert: ConvertPairs | None = None
    own_text: Callable[[Path], AdapterText] = field(default=lambda directory: AdapterText())
    module_of: Callable[[str], str | None] = field(default=lambda path: path)
    weights: BaseWeights | None = None
    token_bytes: int | None = None
