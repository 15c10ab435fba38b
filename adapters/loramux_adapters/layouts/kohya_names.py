"""A safetensors file with Kohya's or diffusers' names -> a PEFT directory.

For each linear layer it holds `<module>.lora_down.weight` [rank, in], `<module>.lora_up.weight` [out, rank] and
perhaps `<module>.alpha`, one number; what is added is alpha / rank times up times down, and up times down where there
is no alpha. diffusers wrote `lora.down` and `lora.up`. Kohya's scripts and LyCORIS write a module's path with `_` in
place of each dot, behind a prefix: it is read where it is a path in a language model.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.artifact.reading.strict_json import quoted
from loramux_adapters.artifact.safetensors_header import TensorSpec, read_header
from loramux_adapters.artifact.tensor_names import other_tool
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.layouts.peft_files import LoraPair, Matrix, write_peft

_ENDS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}
_OTHER_MATHS = {  # what a name holds -> what the tensor is
    re.compile(r"\.dora_scale$"): "a DoRA magnitude",
    re.compile(r"\.lora_mid\.weight$"): "a decomposed convolution",
    re.compile(r"\.hada_[wt]"): "LoHa, a product of two LoRAs",
    re.compile(r"\.lokr_[wt]"): "LoKr, a Kronecker product",
    re.compile(r"\.oft_"): "OFT, a rotation",
    re.compile(r"\.diff(_b)?$"): "a whole difference",
}
_PEFT = re.compile(r"\.lora_[AB](\.|$)")
_PREFIXES = ("base_model.model.", "lycoris.")
_FLAT_PREFIX = re.compile(r"(?:lora|lycoris)_(?:(?:unet|te[0-9]?)_)?")
_IN_LAYER = "|".join(
    [
        "self_attn_(?:q|k|v|o|qkv)_proj",
        "mlp_(?:gate|up|down|gate_up)_proj",
    ]
)
_FLAT_PATH = re.compile(rf"((?:model_)?(?:language_model_)?(?:model_)?)layers_([0-9]{{1,6}})_({_IN_LAYER})")
_FLAT_HEAD = "lm_head"
_NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e"}
_SHOWN = 5  # names in a message


def has_kohya_names(tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a file with these tensors is one."""
    return any(_role(name)[1] in ("down", "up") for name in tensors)


def convert_kohya(source: Path, target: Path) -> None:
    """Write the PEFT directory into `target`, which is ours. Raises `AdapterRejected` with every reason, OSError."""
    tensors = read_header(source)
    halves, reasons = _halves(tensors)
    pairs: dict[str, LoraPair] = {}
    for module, found in halves.items():
        missing = [half for half in ("down", "up") if half not in found]
        if missing:
            reasons.append(f"module {quoted(module)} has no lora_{missing[0]}")
            continue
        down, up = tensors[found["down"]], tensors[found["up"]]
        if len(down.shape) != 2 or len(up.shape) != 2:
            reasons.append(f"module {quoted(module)} has weights that are not matrices: LoRA of a convolution")
            continue
        alpha = _alpha(source, tensors[found["alpha"]]) if "alpha" in found else float(down.shape[0])
        if alpha is None:
            reasons.append(f"module {quoted(module)} has an alpha that is not one finite number")
            continue
        pairs[module] = LoraPair(_matrix(source, down), _matrix(source, up), alpha)
    if reasons:
        more = [f"and {len(reasons) - _SHOWN} more"] if len(reasons) > _SHOWN else []
        raise AdapterRejected([*reasons[:_SHOWN], *more])
    write_peft(pairs, target, origin=f"lora_down and lora_up of {len(pairs)} modules")


def _halves(tensors: Mapping[str, TensorSpec]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module path -> down, up and alpha -> name of the tensor; and why there are others."""
    halves: dict[str, dict[str, str]] = {}
    reasons: list[str] = []
    for name in tensors:
        stem, kind = _role(name)
        maths = next((what for mark, what in _OTHER_MATHS.items() if mark.search(name)), None)
        if maths is not None:
            reasons.append(f"tensor {quoted(name)} is {maths}, which is not LoRA")
        elif kind is None:
            reasons.append(f"tensor {quoted(name)} is no lora_down, lora_up or alpha{_whose(name)}")
        elif (module := _path(stem)) is None:
            reasons.append(f"{quoted(stem)} is no linear layer of a language model: is it an image model's LoRA?")
        elif kind in halves.setdefault(module, {}):
            reasons.append(f"tensors {quoted(halves[module][kind])} and {quoted(name)} are the same weight")
        else:
            halves[module][kind] = name
    return halves, reasons


def _whose(name: str) -> str:
    if _PEFT.search(name):
        return ": it has PEFT's name, and its adapter_config.json belongs beside it; push that directory"
    tool = other_tool(name)
    return f": it is named {tool}" if tool is not None else ""


def _role(name: str) -> tuple[str, str | None]:
    """What stands before the end of a tensor's name, and what the end says it is."""
    for end, kind in _ENDS.items():
        if name.endswith(end):
            return name.removesuffix(end), kind
    return name, None


def _path(stem: str) -> str | None:
    """The module's path in the base; None if it is none of a language model's."""
    for prefix in _PREFIXES:
        stem = stem.removeprefix(prefix)
    if "." in stem or stem == _FLAT_HEAD:
        return stem
    flat = _FLAT_PREFIX.sub("", stem, count=1)
    if flat == _FLAT_HEAD:
        return flat
    found = _FLAT_PATH.fullmatch(flat)
    if found is None:
        return None
    above = found[1].replace("language_model_", "language_model.").replace("model_", "model.")
    room, _, layer = found[3].replace("self_attn_", "self_attn.", 1).replace("mlp_", "mlp.", 1).partition(".")
    return f"{above or 'model.'}layers.{found[2]}.{room}.{layer}"


def _alpha(source: Path, spec: TensorSpec) -> float | None:
    if math.prod(spec.shape) != 1:
        return None
    data = _read(source, spec)
    if spec.dtype == "BF16":
        data, form = b"\0\0" + data, "<f"
    else:
        form = _NUMBERS[spec.dtype]
    value: float = struct.unpack(form, data)[0]
    return value if math.isfinite(value) else None


def _matrix(source: Path, spec: TensorSpec) -> Matrix:
    rows, columns = spec.shape
    return Matrix(spec.dtype, (rows, columns), lambda: _read(source, spec))


def _read(source: Path, spec: TensorSpec) -> bytes:
    with open_regular(source) as file:
        file.seek(spec.offset)
        data = file.read(spec.nbytes)
    if len(data) != spec.nbytes:
        raise AdapterRejected([f"{source.name} ended while it was read"])
    return data
