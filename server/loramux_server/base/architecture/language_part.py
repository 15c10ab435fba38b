"""The language part of a checkpoint that also takes images or sound: an ordinary causal language model.

The other parts are neither built nor read. Its layers have the names that they have in a checkpoint without images
("model.layers.0.self_attn.q_proj"); what checkpoints and adapters call them instead, depending on the version of
transformers that wrote them, is mapped here.

Qwen's vision models number positions by time, height and width (M-RoPE); of a text all three are the token's place, so
their language parts are those of Qwen2 and Qwen3.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loramux_server.errors import BaseModelError

# model_type of what takes images too -> where transformers has its language part ("model.language_model" there
# stands for "model" in an ordinary language model). What is not named here may do more with a text than its language
# part does: it is refused.
_LANGUAGE_PARTS = {
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3", "mistral3", "llava", "llava_next", "internvl"),
        "model.language_model",
    ),
    **dict.fromkeys(("idefics3", "smolvlm"), "model.text_model"),
    "llama4": "language_model.model",
}
# what wrote them before, and writes Llama 4 now: the language part is a whole model with a head
_BEFORE = {"model.language_model": "language_model", "model.text_model": "", "language_model.model": "language_model"}
# model_type of a language part that transformers has no causal language model for -> the one that it is
_SAME_AS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
# what a language part does always and the one that it is only where its config says so
_ALWAYS: dict[str, dict[str, Any]] = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}
# those that may have experts' weights as [inputs, outputs], which transformers' readers of the one that it is don't
_TURNED = {"qwen3_vl_moe"}
_M_ROPE = {"mrope_section", "mrope_interleaved"}  # how positions of images are dealt out to frequencies
_ORDINARY, _HEAD = "model", "lm_head"
# first parts of module paths of what is left out, below "model" or without it
_OTHER_PARTS = frozenset(
    {"visual", "vision_tower", "vision_model", "multi_modal_projector", "connector", "image_newline", "audio_tower"}
)


@dataclass(frozen=True, slots=True)
class LanguagePart:
    """Names of the language part of a checkpoint.

    Attributes:
        config: transformers' own, of the causal language model that it is.
        place: where transformers has it now ("model.language_model").
        before: where it was as a model with a head ("language_model"); "" if never.
        converted_as: model_type by whose rules transformers turns what the checkpoint holds; "": by its own. Where
            there is one, experts' weights may be [outputs, inputs] or [inputs, outputs], as their shape says.
    """

    config: Any
    place: str
    before: str
    converted_as: str = ""

    def names(self, name: str) -> Iterator[str]:
        """What a checkpoint may call a parameter of the model, as it is written now first."""
        inside = name.removeprefix(f"{_ORDINARY}.")
        if inside != name:
            yield f"{self.place}.{inside}"
        if self.before:
            yield f"{self.before}.{name}"
        yield name

    def module_of(self, path: str) -> str | None:
        """The module of the model that an adapter calls `path`; None where that is of a part which is left out."""
        if path.startswith(f"{self.place}."):
            return _ORDINARY + path[len(self.place) :]
        if self.before and path.startswith((f"{self.before}.{_ORDINARY}.", f"{self.before}.{_HEAD}")):
            return path[len(self.before) + 1 :]
        inside = path.removeprefix(f"{_ORDINARY}.")
        return None if inside.partition(".")[0] in _OTHER_PARTS else path

    def key_mapping(self) -> dict[str, str]:
        """Patterns of names in a checkpoint -> of the model, as transformers' from_pretrained takes them."""
        found = {rf"^{re.escape(self.place)}\.": f"{_ORDINARY}."}
        if self.before:
            found[rf"^{re.escape(self.before)}\.({_ORDINARY}\.|{_HEAD})"] = r"\1"
        return found


def takes_more_than_text(config: Any) -> bool:
    """Of a config, transformers' own or whatever has the attributes that a config.json has."""
    return any(getattr(config, name, None) is not None for name in ("vision_config", "audio_config"))


def has_language_part(config: Any) -> bool:
    """Whether it is known that the language part alone does what the whole does with a text."""
    return getattr(config, "model_type", None) in _LANGUAGE_PARTS


def language_part_of(config: Any) -> LanguagePart | None:
    """Of transformers' own config; None where it takes text alone. Raises BaseModelError: its text_config is none."""
    from transformers import AutoConfig

    if not has_language_part(config):
        return None
    place = _LANGUAGE_PARTS[config.model_type]
    text = copy.deepcopy(config.get_text_config())
    if (same := _SAME_AS.get(text.model_type)) is not None:
        values = {key: value for key, value in text.to_dict().items() if key != "model_type"}
        values |= _ALWAYS.get(text.model_type, {})
        values["rope_parameters"] = _ordinary_rope(values.get("rope_parameters"))
        try:
            text = AutoConfig.for_model(same, **values)
        except (TypeError, ValueError) as error:
            raise BaseModelError(f"the base's text_config is none of {same}: {error}") from error
    text.tie_word_embeddings = bool(config.tie_word_embeddings)
    return LanguagePart(text, place, _BEFORE[place], config.model_type if config.model_type in _TURNED else "")


def _ordinary_rope(parameters: Any) -> Any:
    if not isinstance(parameters, dict):
        return parameters
    found = {key: value for key, value in parameters.items() if key not in _M_ROPE}
    for key in ("rope_type", "type"):
        if found.get(key) == "mrope":
            found[key] = "default"
    return found
