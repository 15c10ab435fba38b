"""What a tensor's name says: which module of the base it belongs to, and as what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

from loramux_adapters.artifact.reading.strict_json import quoted
from loramux_adapters.errors import AdapterRejected

Kind: TypeAlias = Literal[
    "A",
    "B",
    "magnitude",
    "lora_bias",
    "scale",
    "embedding_A",
    "embedding_B",
    "tokens",
    "base",
]

DEFAULT = "default"  # what peft calls an adapter that nobody named
_HALVES: Mapping[str, Kind] = {"lora_A": "A", "lora_B": "B"}
OUTPUT_SCALE = "loramux_output_scale"  # what an (IA)3 adapter is converted to
# Of the vocabulary: LoRA on an embedding, [rank, tokens] and [hidden, rank]; rows that replace some of a weight.
_OF_TOKENS: Mapping[str, Kind] = {
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "trainable_tokens_delta": "tokens",
}
# One number for each output of a module.
_VECTORS: Mapping[str, Kind] = {"lora_magnitude_vector": "magnitude", OUTPUT_SCALE: "scale"}
_PEFT_PREFIX = ["base_model", "model"]
# What torch's own wrappers around a module add to the names below it.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_NOT_SERVED = {
    ".base_layer.lora_": "of an adapter inside another one: merge the inner one into the base it was trained on",
}
# What ends the names that other tools give -> whose they are, and what to do.
_OTHER_TOOLS = {
    (".lora_a", ".lora_b"): "as mlx-lm does, and the config is not mlx-lm's: send the adapter_config.json beside it",
    (".lora_a.weight", ".lora_b.weight"): "as torchtune does: have it save the adapter in PEFT's format",
    (".lora_A", ".lora_B"): "as LitGPT or loralib do: convert it to PEFT's format",
    (".lora_down.weight", ".lora_up.weight", ".lora.down.weight", ".lora.up.weight", ".alpha"): (
        "as Kohya's scripts and diffusers do, mostly for image models: a language model's is brought into PEFT's form "
        "by `loramux adapters convert`"
    ),
    (".linear_in.weight", ".linear_out.weight"): "as NeMo and Megatron do: export it to PEFT's format",
    (".lora_a_scales", ".lora_b_scales"): "as mlx-lm does for a quantized adapter: send the one it was made from",
}


class TensorRole(NamedTuple):
    """What a tensor is.

    Attributes:
        path: of the module in the base; for "base", of the base's parameter of which the tensor may be a copy.
        kind: which half of a module's pair it is, one of the vectors beside it, something of the vocabulary, or "base":
            no LoRA weight, but a module's own, perhaps a trained one (modules_to_save).
        adapter: the adapter's own name that stands in the tensor's, `DEFAULT` where none does; "" for "base".
    """

    path: str
    kind: Kind
    adapter: str = ""


def role_of(tensor_name: str) -> TensorRole:
    """Raises `AdapterRejected` for a kind of weight that is not served."""
    parts = [part for part in tensor_name.split(".") if part not in _WRAPPERS]
    while parts[:2] == _PEFT_PREFIX or parts[:1] == ["module"]:  # twice, where a tool wrapped a wrapped model
        del parts[: 2 if parts[:2] == _PEFT_PREFIX else 1]
    name = ".".join(parts)
    for mark, what in _NOT_SERVED.items():
        if mark in name:
            raise AdapterRejected([f"tensor {quoted(tensor_name)} is {what}, which is not served"])
    if (at := next((at for at, part in enumerate(parts) if part in _OF_TOKENS), None)) is not None:
        adapter = ".".join(part for part in parts[at + 1 :] if part != "weight") or DEFAULT
        return TensorRole(
            ".".join(part for part in parts[:at] if part != "token_adapter"), _OF_TOKENS[parts[at]], adapter
        )
    if "modules_to_save" in parts:  # older releases of peft left it in
        at = parts.index("modules_to_save")
        return TensorRole(".".join([*parts[:at], parts[-1]]), "base")
    if (at := next((at for at, part in enumerate(parts) if part in _VECTORS), None)) is not None:
        rest = parts[at + 1 : -1] if parts[-1] == "weight" else parts[at + 1 :]
        if len(rest) <= 1:
            return TensorRole(".".join(parts[:at]), _VECTORS[parts[at]], rest[0] if rest else DEFAULT)
    for at, adapter in ((-3, parts[-2] if len(parts) > 1 else ""), (-2, DEFAULT)):
        if len(parts) > -at and parts[at] in _HALVES:
            if parts[-1] == "weight":
                return TensorRole(".".join(parts[:at]), _HALVES[parts[at]], adapter)
            if parts[-1] == "bias" and parts[at] == "lora_B":
                return TensorRole(".".join(parts[:at]), "lora_bias", adapter)
    return TensorRole(name.replace(".base_layer.", ".").replace(".token_adapter.", "."), "base")


def other_tool(tensor_name: str) -> str | None:
    """How the tool that is known to name tensors so does it, and what helps; None for any other name."""
    return next((what for ends, what in _OTHER_TOOLS.items() if tensor_name.endswith(ends)), None)
