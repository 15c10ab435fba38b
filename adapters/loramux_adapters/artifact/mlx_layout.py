"""An adapter as mlx-lm writes it -> the PEFT directory that computes the same.

mlx-lm's adapter_config.json holds the settings of its training run, of which few matter here, and adapters.safetensors
holds, for each linear layer, `<path>.lora_a` [in, r] and `<path>.lora_b` [r, out], whose product counts `scale` times,
and for DoRA a magnitude `<path>.m` [out]. PEFT has both matrices transposed, and divides its alpha by r.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from loramux_adapters.artifact.config import (
    BASE_ID_KEY,
    CONFIG_FILE,
    CONVERTED_KEY,
    MAX_ALPHA,
    MAX_CONFIG_BYTES,
    MAX_RANK,
)
from loramux_adapters.artifact.coverage import in_words
from loramux_adapters.artifact.format import MLX_WEIGHTS_FILE, WEIGHTS_FILE
from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.artifact.reading.strict_json import StrictJSONError, is_int, is_number, parse_object, quoted
from loramux_adapters.artifact.safetensors_header import ITEM_BYTES, LENGTH_BYTES, TensorSpec, read_header
from loramux_adapters.errors import AdapterRejected

_HALVES = {".lora_a": "lora_A", ".lora_b": "lora_B"}
_MAGNITUDE = ".m"
_PIECE_BYTES = 32 * 2**20
_MAX_TENSOR_BYTES = 512 * 2**20  # far more than any layer's: a larger one would be read many times
_MAX_DIGITS = 6  # of a layer's number
_PART = ".converting"  # no file of an upload has this name


def convert_mlx(directory: Path) -> None:
    """Rewrite the files of an mlx-lm adapter in place, as PEFT's; any other adapter stays as it is.

    The new config says what it was converted from. Reads and writes the weights one tensor at a time. To be called for
    a directory of our own, with regular files alone. Raises `AdapterRejected`, OSError.
    """
    settings = _settings(directory)
    if settings is None:
        return
    kind = settings.get("fine_tune_type") or ("dora" if settings.get("use_dora") else "lora")
    if kind not in ("lora", "dora"):
        what = quoted(str(kind), 24)
        raise AdapterRejected([f"fine_tune_type of mlx-lm is {what}: only its LoRA and DoRA are served"])
    rank, scale = _rank_and_scale(settings)
    source = directory / MLX_WEIGHTS_FILE
    if not source.exists():
        source = directory / WEIGHTS_FILE
    tensors = read_header(source)
    modules = _modules(tensors, kind)
    layers = _layers(modules, settings)
    alpha = _alpha(scale, rank)
    where = f", weights in {in_words(layers)}" if layers else ""
    layout = "mlx-lm's DoRA" if kind == "dora" else "mlx-lm's layout"
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "use_dora": kind == "dora",
        "target_modules": sorted({_name_in_layer(module) for module in modules}),
        "layers_to_transform": sorted(layers) or None,
        "base_model_name_or_path": settings.get("model") if isinstance(settings.get("model"), str) else None,
        BASE_ID_KEY: settings.get(BASE_ID_KEY),
        CONVERTED_KEY: f"{layout}: rank {rank}, scale {scale:g} as alpha {alpha:g}{where}",
    }
    _write_transposed(source, tensors, directory / _PART)
    os.replace(directory / _PART, directory / WEIGHTS_FILE)
    (directory / MLX_WEIGHTS_FILE).unlink(missing_ok=True)
    (directory / CONFIG_FILE).unlink()
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2))


def _settings(directory: Path) -> dict[str, Any] | None:
    """What mlx-lm's config says; None for any other config, which is somebody else's to judge."""
    path = directory / CONFIG_FILE
    if not path.is_symlink() and not path.exists():
        return None
    with open_regular(path) as file:
        try:
            fields = parse_object(file.read(MAX_CONFIG_BYTES + 1), limit=MAX_CONFIG_BYTES)
        except StrictJSONError:
            return None
    is_mlx = fields.get("peft_type") is None and ("lora_parameters" in fields or "fine_tune_type" in fields)
    return fields if is_mlx else None


def _rank_and_scale(settings: Mapping[str, Any]) -> tuple[int, float]:
    """Raises `AdapterRejected`."""
    parameters = settings.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise AdapterRejected(["lora_parameters of mlx-lm's config is missing"])
    rank, scale, alpha = parameters.get("rank", 0), parameters.get("scale", 0), parameters.get("alpha", None)
    reasons = []
    if not is_int(rank) or not 1 <= rank <= MAX_RANK:
        reasons.append(f"rank in lora_parameters is not an integer from 1 to {MAX_RANK}")
    if not is_number(scale) or not 0 < scale <= MAX_ALPHA:
        reasons.append(f"scale in lora_parameters is not a number above 0 and up to {MAX_ALPHA:.0f}")
    if reasons:
        raise AdapterRejected(reasons)
    # Old releases, which say lora_layers, multiplied by scale * alpha / rank, and the last of them by scale alone. From
    # 0.19 on they say num_layers and multiply by scale alone, also where there is an alpha.
    if alpha is not None and alpha != rank and "num_layers" not in settings:
        raise AdapterRejected(
            [
                f"lora_parameters has scale {scale!r} and alpha {quoted(str(alpha), 24)}, and old releases of mlx-lm "
                "differ in what that means: remove alpha if the factor is scale; if it is scale * alpha / rank, set "
                "scale to that first"
            ]
        )
    return rank, float(scale)


def _alpha(scale: float, rank: int) -> float:
    """What divided by `rank` is `scale` again, to the last bit if any number is."""
    alpha = scale * rank
    near = (alpha, math.nextafter(alpha, 0), math.nextafter(alpha, MAX_ALPHA * MAX_RANK))
    return next((value for value in near if value / rank == scale), alpha)


def _modules(tensors: Mapping[str, TensorSpec], kind: str) -> set[str]:
    """Raises `AdapterRejected` for a tensor that mlx-lm's adapters of this kind do not have."""
    reasons = []
    modules = set()
    for name, spec in tensors.items():
        module, half = _split(name)
        if half is None:
            module = name.removesuffix(_MAGNITUDE)
            if not name.endswith(_MAGNITUDE):
                reasons.append(f"tensor {quoted(name)} is no LoRA weight of mlx-lm, which is not served")
            elif kind != "dora" or len(spec.shape) != 1:
                reasons.append(f"tensor {quoted(name)} is a DoRA magnitude, which does not fit fine_tune_type {kind}")
        elif len(spec.shape) != 2:
            reasons.append(f"tensor {quoted(name)} is of {len(spec.shape)} dimensions: LoRA of experts is not served")
        elif spec.nbytes > _MAX_TENSOR_BYTES:
            reasons.append(f"tensor {quoted(name)} has more than {_MAX_TENSOR_BYTES} bytes")
        modules.add(module)
    if reasons:
        raise AdapterRejected(reasons)
    return modules


def _split(name: str) -> tuple[str, str | None]:
    for end, half in _HALVES.items():
        if name.endswith(end):
            return name.removesuffix(end), half
    return name, None


def _layers(modules: set[str], settings: Mapping[str, Any]) -> set[int]:
    """The layers that have weights. mlx-lm adapts the last `num_layers`, and leaves unused what else a file holds.

    Raises `AdapterRejected` if the file holds more, or modules that are not among the keys.
    """
    layers = {layer for module in modules if (layer := _layer_of(module)) is not None}
    count = settings.get("num_layers", settings.get("lora_layers"))
    if is_int(count) and count > 0 and layers and max(layers) - min(layers) >= count:
        raise AdapterRejected(
            [f"mlx-lm's config says {count} layers, the last ones, and there are weights in {in_words(layers)}"]
        )
    keys = settings["lora_parameters"].get("keys")
    if isinstance(keys, list):
        known = {key for key in keys if isinstance(key, str)}
        strange = next((module for module in sorted(modules) if not {module, _name_in_layer(module)} & known), None)
        if strange is not None:
            raise AdapterRejected([f"module {quoted(strange)} has weights and is none of the keys of lora_parameters"])
    return layers


def _layer_of(module: str) -> int | None:
    return next((int(part) for part in module.split(".") if _is_layer(part)), None)


def _name_in_layer(module: str) -> str:
    """The rest of the path after the layer's number; the whole path where there is none."""
    parts = module.split(".")
    at = next((at for at, part in enumerate(parts) if _is_layer(part)), -1)
    return ".".join(parts[at + 1 :])


def _is_layer(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) <= _MAX_DIGITS


def _write_transposed(source: Path, tensors: Mapping[str, TensorSpec], target: Path) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, spec in tensors.items():
        module, half = _split(name)
        end = "lora_magnitude_vector" if half is None else f"{half}.weight"
        header[f"base_model.model.{module.removesuffix(_MAGNITUDE) if half is None else module}.{end}"] = {
            "dtype": spec.dtype,
            "shape": [*spec.shape[::-1]],
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with open_regular(source) as file, target.open("xb") as out:
        out.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for spec in tensors.values():
            for piece in _transposed(file, spec if len(spec.shape) == 2 else replace(spec, shape=(1, *spec.shape))):
                out.write(piece)


def _transposed(file: BinaryIO, spec: TensorSpec) -> Iterator[bytes]:
    """A matrix's numbers column by column, some columns at a time: nobody has compared its size with a base's yet."""
    import numpy as np  # who only reads PEFT's own layout is spared it

    if not spec.nbytes:
        return
    (rows, columns), dtype = spec.shape, np.dtype(f"u{ITEM_BYTES[spec.dtype]}")
    wide = max(1, _PIECE_BYTES // max(1, rows * dtype.itemsize))
    tall = max(1, _PIECE_BYTES // max(1, columns * dtype.itemsize))
    for left in range(0, columns, wide):
        piece = np.empty((min(wide, columns - left), rows), dtype)
        file.seek(spec.offset)
        for top in range(0, rows, tall):
            count = min(tall, rows - top)
            data = file.read(count * columns * dtype.itemsize)
            if len(data) < count * columns * dtype.itemsize:
                raise AdapterRejected(["the weights ended while they were read"])
            piece[:, top : top + count] = np.frombuffer(data, dtype).reshape(count, columns)[:, left : left + wide].T
        yield piece.tobytes()
