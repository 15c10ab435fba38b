"""A LoRA in GGUF, as llama.cpp's convert_lora_to_gguf writes it -> a PEFT directory.

Metadata: general.type `adapter`, adapter.type `lora`, adapter.lora.alpha, and general.architecture, which says how the
base names its tensors. For each linear layer there are `<tensor>.weight.lora_a` [rank, in] and `.lora_b` [out, rank];
what is added is alpha / rank times B A, or B A where alpha is 0.

llama.cpp keeps the rows of some architectures' query and key projections in another order: of each head those of the
first and the second half of its dimensions in turn. Bringing B's rows back takes the number of heads, which the file
does not hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramux_adapters.artifact.reading.strict_json import quoted
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.layouts.gguf_file import GGUFHeader, GGUFTensorSpec, read_gguf_header, read_rows
from loramux_adapters.layouts.peft_files import LoraPair, Matrix, write_peft

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PHI3 = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_PLAIN = _ATTENTION | _MLP
_PERMUTED = frozenset({"llama", "granite", "smollm3", "olmo", "arcee", "mistral3"})
_NAMES: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("llama", "granite", "olmo", "olmo2", "mistral3"), _PLAIN),
    **dict.fromkeys(("qwen2", "qwen3", "smollm3", "seed_oss"), _PLAIN),
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), _PLAIN),
    "arcee": _ATTENTION | {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
    "phi3": _PHI3,
}
_IN_LAYER = re.compile(r"blk\.([0-9]{1,6})\.([a-z_]+)")
_HEAD = "output"
_HALVES = {".weight.lora_a": "a", ".weight.lora_b": "b"}
_SHOWN = 5  # names in a message


@dataclass(frozen=True, slots=True)
class Heads:
    """Of a base's attention: how many heads queries have, and how many keys."""

    queries: int
    keys: int


def needs_heads(source: Path) -> bool:
    """Whether a base's number of heads is needed to convert this file. Raises `AdapterRejected`."""
    header = read_gguf_header(source)
    is_permuted = header.metadata.get("general.architecture") in _PERMUTED
    return is_permuted and any(".attn_q." in name or ".attn_k." in name for name in header.tensors)


def convert_gguf(source: Path, target: Path, heads: Heads | None = None) -> None:
    """Write the PEFT directory into `target`, which is ours; `heads` of the base, where `needs_heads`.

    Raises `AdapterRejected` with every reason, OSError.
    """
    header = read_gguf_header(source)
    architecture, alpha = _kind(header)
    halves, reasons = _halves(header, _NAMES[architecture])
    pairs: dict[str, LoraPair] = {}
    for module, found in halves.items():
        if found.keys() != {"a", "b"}:
            reasons.append(f"module {module} has no lora_{'ab'.replace(next(iter(found)), '')}")
            continue
        a, b = found["a"], found["b"]
        rows = _heads_of(module, heads) if architecture in _PERMUTED else None
        if rows is not None and b.shape[0] % (2 * rows):
            reasons.append(f"module {module} has {b.shape[0]} outputs, which are not {rows} heads: is --base another?")
            continue
        pairs[module] = LoraPair(_matrix(source, a), _matrix(source, b, rows), alpha or float(a.shape[0]))
    if reasons:
        more = [f"and {len(reasons) - _SHOWN} more"] if len(reasons) > _SHOWN else []
        raise AdapterRejected([*reasons[:_SHOWN], *more])
    write_peft(pairs, target, origin=f"llama.cpp's GGUF of a {architecture} model: alpha {alpha:g}")


def _kind(header: GGUFHeader) -> tuple[str, float]:
    """The base's architecture, and alpha. Raises `AdapterRejected`."""
    said = header.metadata
    if said.get("general.type") != "adapter" or said.get("adapter.type") != "lora":
        what = "a model" if "general.architecture" in said and "adapter.type" not in said else "something else"
        raise AdapterRejected(
            [f"the GGUF file is {what} and no LoRA: general.type is {quoted(str(said.get('general.type')), 24)}"]
        )
    architecture, alpha = said.get("general.architecture"), said.get("adapter.lora.alpha")
    if not isinstance(architecture, str) or architecture not in _NAMES:
        raise AdapterRejected(
            [
                f"the GGUF file is of the architecture {quoted(str(architecture), 40)}, whose names are not known "
                f"here; known are {', '.join(sorted(_NAMES))}: convert the adapter it was made from"
            ]
        )
    if not isinstance(alpha, float) or not 0 <= alpha:
        raise AdapterRejected(["adapter.lora.alpha of the GGUF file is not a number from 0 on"])
    return architecture, alpha


def _halves(header: GGUFHeader, names: Mapping[str, str]) -> tuple[dict[str, dict[str, GGUFTensorSpec]], list[str]]:
    """Module path -> its halves; and why there are others."""
    halves: dict[str, dict[str, GGUFTensorSpec]] = {}
    reasons: list[str] = []
    for name, spec in header.tensors.items():
        end = next((end for end in _HALVES if name.endswith(end)), None)
        module = None if end is None else _module(name.removesuffix(end), names)
        if end is None or module is None:
            what = "an embedding's, which is not converted" if name.startswith("token_embd") else "no linear layer's"
            reasons.append(f"tensor {quoted(name)} is {what}")
        elif len(spec.shape) != 2:
            reasons.append(f"tensor {quoted(name)} has {len(spec.shape)} dimensions: LoRA of experts is not converted")
        else:
            halves.setdefault(module, {})[_HALVES[end]] = spec
    return halves, reasons


def _module(tensor: str, names: Mapping[str, str]) -> str | None:
    if tensor == _HEAD:
        return "lm_head"
    found = _IN_LAYER.fullmatch(tensor)
    if found is None or found[2] not in names:
        return None
    return f"model.layers.{found[1]}.{names[found[2]]}"


def _heads_of(module: str, heads: Heads | None) -> int | None:
    """Into how many heads the rows of a projection are cut; None for one whose rows stay."""
    name = module.rpartition(".")[2]
    if name not in ("q_proj", "k_proj"):
        return None
    if heads is None:
        raise AdapterRejected(
            [
                "llama.cpp orders the rows of its query and key projections by head: name the base, whose config says "
                "how many there are"
            ]
        )
    return heads.queries if name == "q_proj" else heads.keys


def _matrix(source: Path, spec: GGUFTensorSpec, heads: int | None = None) -> Matrix:
    rows, columns = spec.shape
    dtype = "F32" if spec.kind == "Q8_0" else spec.kind
    return Matrix(dtype, (rows, columns), partial(_bytes, source, spec, heads))


def _bytes(source: Path, spec: GGUFTensorSpec, heads: int | None) -> bytes:
    numbers = read_rows(source, spec)
    return (numbers if heads is None else halves_apart(numbers, heads)).tobytes()


def halves_apart(rows: npt.NDArray[np.generic], heads: int) -> npt.NDArray[np.generic]:
    """Rows [heads * size, ...] that take turns between the halves of each head -> the first half, then the second."""
    size = rows.shape[0] // heads
    in_turn = rows.reshape(heads, size // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(in_turn.swapaxes(1, 2)).reshape(rows.shape)
