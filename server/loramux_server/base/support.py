"""Which bases can be served correctly, and the reason for each that cannot: refused at start, never served wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from loramux_server.base.architecture.language_part import has_language_part, takes_more_than_text
from loramux_server.base.architecture.published_form import is_mxfp4
from loramux_server.errors import BaseModelError

if TYPE_CHECKING:
    from torch import nn

# Position encodings that have other angles in long texts: known where all layers have the same.
_ROPE_BY_LENGTH = {"longrope", "su"}
_RECURRENT = {"rwkv", "xlstm"}  # those whose config names no kinds of layers
# Mixtures of experts whose routers and experts are known here.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_SUPPORTED = {
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoeshared",
    "llama4_text",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_vl_moe_text",
    "solar_open",
}
CHUNKED = "chunked_attention"  # a kind of layer, as configs name it
_LAYERS_SUPPORTED = {"full_attention", "sliding_attention", CHUNKED}
# Latent attention that transformers brings into the form of ordinary keys and values, of all tokens before one.
_LATENT_SUPPORTED = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"}


def unsupported_config(config: Any) -> list[str]:
    """Reasons, readable from the config alone, why this model cannot be served; empty if there are none.

    Args:
        config: transformers' own, or whatever has the attributes that a config.json has.
    """
    reasons: list[str] = []
    if reason := _why_not_quantized_so(getattr(config, "quantization_config", None)):
        reasons.append(reason)
    if takes_more_than_text(config):
        if not has_language_part(config):
            kind = getattr(config, "model_type", "unknown")
            reasons.append(
                f"it takes images or sound, and of a {kind} the language part alone is not served; "
                "name a checkpoint of the language model"
            )
        text = getattr(config, "text_config", None)  # None: all lies in one, as transformers 4 wrote Qwen2-VL's
        config = SimpleNamespace(**text) if isinstance(text, dict) else text or config
    get: Any = lambda name: getattr(config, name, None)  # noqa: E731
    if get("is_encoder_decoder"):
        reasons.append("it is an encoder-decoder model")
    experts = [name for name in _EXPERT_COUNTS if get(name)]
    if experts and get("model_type") not in _EXPERTS_SUPPORTED:
        known = ", ".join(sorted(_EXPERTS_SUPPORTED))
        reasons.append(f"it is a mixture of experts ({experts[0]}) of another kind than those that are served: {known}")
    if get("kv_lora_rank") and get("model_type") not in _LATENT_SUPPORTED:
        known = ", ".join(sorted(_LATENT_SUPPORTED))
        reasons.append(
            f"it uses multi-head latent attention (kv_lora_rank) of another kind than those that are served: {known}"
        )
    if get("alibi") or get("position_embedding_type") == "alibi" or get("model_type") in {"bloom", "mpt"}:
        reasons.append("it uses ALiBi position biases")
    if get("model_type") in _RECURRENT:
        reasons.append("it keeps a state of its own for each sequence in place of keys and values")
    rope = get("rope_parameters") or get("rope_scaling")
    for kind in _ROPE_BY_LENGTH & _rope_types(rope) - _rope_types(_without_parts(rope)):
        reasons.append(f"some of its layers have the position encoding {kind} and others do not")
    odd = sorted(set(get("layer_types") or []) - _LAYERS_SUPPORTED)
    if odd:
        reasons.append(
            f"it has layers of type {', '.join(odd)}, and only such are served whose attention sees all tokens before "
            f"it, or a window or a chunk of them ({', '.join(sorted(_LAYERS_SUPPORTED))})"
        )
    return reasons


def trained_context(config: Any) -> int:
    """Most tokens of a text that an adapter can be trained on, of transformers' own config; 0: it names none.

    Rows of a training step share their angles, so none may be as long as to need others than the rest.
    """
    text = config.get_text_config()
    context = int(getattr(text, "max_position_embeddings", 0) or 0)
    rope = getattr(text, "rope_parameters", None) or {}
    if not _ROPE_BY_LENGTH & _rope_types(rope):
        return context
    return min(context, int(rope.get("original_max_position_embeddings") or context))


def refuse_to_train(name: str, config: Any) -> None:
    """Raises BaseModelError: the base of this name and config, transformers' own, has attention or experts that a
    training step does not compute."""
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        what = "multi-head latent attention"
    elif CHUNKED in (getattr(text, "layer_types", None) or []):
        what = "attention over chunks of a text"
    elif any(getattr(text, count, None) for count in _EXPERT_COUNTS):
        raise BaseModelError(
            f"base {name} is a mixture of experts: adapters for it are served, and not trained here; train with peft, "
            "on its attention or its experts' layers one by one, and push the adapter"
        )
    else:
        return
    raise BaseModelError(
        f"base {name} has {what}: adapters for it are served, and not trained here; train with peft, and push the "
        "adapter"
    )


def is_quantized(config: Any) -> bool:
    """Whether the checkpoint of a config that is supported was quantized before, by bitsandbytes to NF4."""
    given = getattr(config, "quantization_config", None)
    return bool(given) and not is_mxfp4(given)


def _why_not_quantized_so(given: Any) -> str:
    """Why a checkpoint that was quantized before cannot be served; "" where it can, or was not."""
    if not given:
        return ""
    if is_mxfp4(given):  # read as the numbers that they are
        return ""
    its: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
    method = its.get("quant_method") or ("bitsandbytes" if its.get("load_in_4bit") or its.get("load_in_8bit") else None)
    todo = "give the 16-bit checkpoint, or one that bitsandbytes quantized to NF4"
    if method != "bitsandbytes":
        return f"it is quantized already ({method or 'unknown method'}); {todo}"
    if its.get("load_in_8bit") or its.get("_load_in_8bit"):
        return f"it is quantized already, by bitsandbytes to 8 bits (load_in_8bit); {todo}"
    kind = its.get("bnb_4bit_quant_type", "fp4")
    return "" if kind == "nf4" else f"it is quantized already, by bitsandbytes to {kind}; {todo}"


def _rope_types(parameters: Any) -> set[str]:
    """Every RoPE type named in a config, also where each kind of layer has its own."""
    if not isinstance(parameters, dict):
        return set()
    found = {str(parameters[key]) for key in ("rope_type", "type") if key in parameters}
    for value in parameters.values():
        found |= _rope_types(value)
    return found


def _without_parts(parameters: Any) -> Any:
    """Of a config's RoPE parameters, what stands for all layers."""
    return {key: value for key, value in parameters.items() if not isinstance(value, dict)} if parameters else None


def unsupported_modules(model: nn.Module) -> list[str]:
    """Reasons that show only in the built model."""
    from transformers.pytorch_utils import Conv1D

    reasons: list[str] = []
    modules = dict(model.named_modules())
    if any(isinstance(module, Conv1D) for module in modules.values()):
        reasons.append("its projections are Conv1D layers (as in GPT-2), not nn.Linear")
    return reasons
