"""LoRA matrices by module -> the two files of a PEFT directory. Knows no other tool's names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.artifact.config import CONFIG_FILE, CONVERTED_KEY, MAX_ALPHA, MAX_NAMES, MAX_RANK
from loramux_adapters.artifact.format import WEIGHTS_FILE
from loramux_adapters.artifact.reading.strict_json import quoted
from loramux_adapters.artifact.safetensors_header import ITEM_BYTES, LENGTH_BYTES
from loramux_adapters.errors import AdapterRejected

_MAX_DIGITS = 6  # of a layer's number


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that is not read yet.

    Attributes:
        dtype: one of `ITEM_BYTES`, of the bytes that `read` gives.
        shape: [rows, columns].
        read: its numbers, row by row; raises `AdapterRejected`, OSError.
    """

    dtype: str
    shape: tuple[int, int]
    read: Callable[[], bytes]

    @property
    def nbytes(self) -> int:
        return ITEM_BYTES[self.dtype] * self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One linear layer's delta: `alpha` / rank times B [out, rank] times A [rank, in]."""

    a: Matrix
    b: Matrix
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def write_peft(pairs: Mapping[str, LoraPair], target: Path, *, origin: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors into `target`, one matrix in memory at a time.

    `pairs`: module path in the base -> its pair. `origin`: what it was, in words, which the version's notes will say.
    Raises `AdapterRejected` with every reason if they are no adapter, OSError.
    """
    reasons = [why for module, pair in pairs.items() if (why := _reason(module, pair)) is not None]
    if not pairs:
        reasons.append("it holds no LoRA weights")
    if reasons:
        raise AdapterRejected(reasons)
    config = _config(pairs) | {CONVERTED_KEY: origin}
    tensors = {
        f"base_model.model.{module}.{half}.weight": matrix
        for module, pair in sorted(pairs.items())
        for half, matrix in (("lora_A", pair.a), ("lora_B", pair.b))
    }
    with (target / WEIGHTS_FILE).open("xb") as file:
        file.write(_header(tensors))
        for name, matrix in tensors.items():
            data = matrix.read()
            if len(data) != matrix.nbytes:
                raise AdapterRejected([f"the weights ended while {quoted(name)} was read"])
            file.write(data)
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _reason(module: str, pair: LoraPair) -> str | None:
    if 0 in pair.a.shape + pair.b.shape:
        return f"module {quoted(module)} has an empty matrix"
    if pair.b.shape[1] != pair.rank:
        return f"module {quoted(module)} has halves of ranks {pair.rank} and {pair.b.shape[1]}"
    if pair.rank > MAX_RANK:
        return f"module {quoted(module)} has rank {pair.rank}, more than {MAX_RANK}"
    if not 0 < pair.alpha <= MAX_ALPHA:
        return f"module {quoted(module)} has alpha {pair.alpha:g}, which is not above 0 and up to {MAX_ALPHA:g}"
    return None


def _config(pairs: Mapping[str, LoraPair]) -> dict[str, object]:
    rank = Counter(pair.rank for pair in pairs.values()).most_common(1)[0][0]
    alpha = Counter(pair.alpha for pair in pairs.values()).most_common(1)[0][0]
    names, layers = _targets(sorted(pairs))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: pair.rank for module, pair in sorted(pairs.items()) if pair.rank != rank},
        "alpha_pattern": {module: pair.alpha for module, pair in sorted(pairs.items()) if pair.alpha != alpha},
        "target_modules": names,
        "layers_to_transform": layers,
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": None,
    }


def _targets(modules: Sequence[str]) -> tuple[list[str], list[int] | None]:
    """Names in a layer and the layers, where every layer has the same ones; else whole paths.

    Raises `AdapterRejected` for more than a config may name.
    """
    split = [_split(module) for module in modules]
    by_layer: dict[int, set[str]] = {}
    for layer, name in split:
        if layer is not None:
            by_layer.setdefault(layer, set()).add(name)
    names = {name for _, name in split}
    is_even = len(by_layer) > 0 and all(layer is not None for layer, _ in split)
    if is_even and all(own == names for own in by_layer.values()):
        return sorted(names), sorted(by_layer)
    if len(modules) > MAX_NAMES:
        raise AdapterRejected([f"it adapts {len(modules)} modules, in no order; a config names at most {MAX_NAMES}"])
    return [*modules], None


def _split(module: str) -> tuple[int | None, str]:
    """The layer's number, and the path behind it; None and the whole path where there is none."""
    parts = module.split(".")
    for at, part in enumerate(parts):
        if part.isascii() and part.isdigit() and len(part) <= _MAX_DIGITS:
            return int(part), ".".join(parts[at + 1 :])
    return None, module


def _header(tensors: Mapping[str, Matrix]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, matrix in tensors.items():
        end = position + matrix.nbytes
        header[name] = {"dtype": matrix.dtype, "shape": [*matrix.shape], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
