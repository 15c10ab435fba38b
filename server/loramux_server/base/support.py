"""Which bases can be served correctly, and the reason for each that cannot: refused at start, never served wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Position encodings whose cos and sin of a short row change when a long row shares the forward.
_ROPE_UNSUPPORTED = {"longrope", "su", "dynamic"}
_LAYERS_SUPPORTED = {"full_attention", "sliding_attention"}


def unsupported_config(config: Any) -> list[str]:
    """Reasons, readable from the config alone, why this model cannot be served; empty if there are none.

    Args:
        config: transformers' own, or whatever has the attributes that a config.json has.
    """
    reasons: list[str] = []
    get: Any = lambda name: getattr(config, name, None)  # noqa: E731
    if reason := _why_not_quantized_so(get("quantization_config")):
        reasons.append(reason)
    if get("is_encoder_decoder"):
        reasons.append("it is an encoder-decoder model")
    if get("vision_config") is not None or get("audio_config") is not None:
        reasons.append("it takes images or sound; only text models are served")
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if get(name):
            reasons.append(f"it is a mixture of experts ({name})")
    if get("kv_lora_rank"):
        reasons.append("it uses multi-head latent attention (kv_lora_rank)")
    if get("alibi") or get("position_embedding_type") == "alibi" or get("model_type") in {"bloom", "mpt"}:
        reasons.append("it uses ALiBi position biases")
    for kind in _rope_types(get("rope_parameters") or get("rope_scaling")):
        if kind in _ROPE_UNSUPPORTED:
            reasons.append(f"its position encoding is of type {kind}, which depends on the longest row of a batch")
    odd = sorted(set(get("layer_types") or []) - _LAYERS_SUPPORTED)
    if odd:
        reasons.append(f"it has layers of type {', '.join(odd)}")
    return reasons


def is_quantized(config: Any) -> bool:
    """Whether the checkpoint of a config that is supported was quantized before, by bitsandbytes to NF4."""
    return bool(getattr(config, "quantization_config", None))


def _why_not_quantized_so(given: Any) -> str:
    """Why a checkpoint that was quantized before cannot be served; "" where it can, or was not."""
    if not given:
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


def unsupported_modules(model: nn.Module) -> list[str]:
    """Reasons that show only in the built model."""
    from transformers.pytorch_utils import Conv1D

    reasons: list[str] = []
    modules = dict(model.named_modules())
    if any(isinstance(module, Conv1D) for module in modules.values()):
        reasons.append("its projections are Conv1D layers (as in GPT-2), not nn.Linear")
    if any(hasattr(module, "sinks") for module in modules.values()):
        reasons.append("its attention has sinks")
    if any(path.rpartition(".")[2] in {"experts", "router"} for path in modules):
        reasons.append("it is a mixture of experts")
    return reasons
