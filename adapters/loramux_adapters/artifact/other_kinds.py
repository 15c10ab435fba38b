"""Adapters of other kinds that peft makes -> the LoRA, or the output scales, that compute the same.

    AdaLoRA   (arXiv 2303.10512)  y += alpha / (r + 1e-5) * B diag(E) A x, of another rank in each module
    VeRA      (arXiv 2310.11454)  y += diag(b) B diag(d) A x, with one A and B for all modules, cut to a layer's size
    (IA)3     (arXiv 2205.05638)  y *= l; or x *= l in front of an MLP's last layer, which is done behind the one before

A is multiplied with what stands beside it in fp32, and both are rounded to bf16, which is what is served. Ranks are
filled up with zeros to the largest: a slot has one rank for all layers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from loramux_adapters.artifact.config import BASE_ID_KEY, CONFIG_FILE, CONVERTED_KEY, MAX_CONFIG_BYTES
from loramux_adapters.artifact.format import WEIGHTS_FILE
from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.artifact.reading.strict_json import StrictJSONError, is_empty, is_number, parse_object, quoted
from loramux_adapters.artifact.safetensors_header import LENGTH_BYTES, TensorSpec, read_header
from loramux_adapters.artifact.tensor_names import OUTPUT_SCALE
from loramux_adapters.errors import AdapterRejected

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[np.float32]

_PREFIX = "base_model.model."
_PART = ".converting-kind"  # no file of an upload has this name
_MAX_ALPHA = 1e6
_TINY = 1e-5  # that peft adds to AdaLoRA's rank

Linears: TypeAlias = Mapping[str, tuple[int, int]]  # module path -> (inputs, outputs)


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor to write: of bf16 if it is a matrix, else of fp32; `make` gives its numbers."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Array]


def convert_kind(directory: Path, linears: Linears, max_rank: int) -> None:
    """Rewrite the files of such an adapter in place, for a base with these layers; any other stays as it is.

    To be called for a directory of our own, with regular files alone. Reads one tensor at a time, and those that all
    modules share. Raises `AdapterRejected`, OSError.
    """
    fields = _fields(directory)
    kind = None if fields is None else fields.get("peft_type")
    if fields is None or not isinstance(kind, str) or kind not in _KINDS:
        return
    refused = [name for name in ("bias", "modules_to_save") if not _is_off(fields.get(name))]
    if refused:
        raise AdapterRejected([f"{name} of an adapter of kind {kind} is not served" for name in refused])
    path = directory / WEIGHTS_FILE
    weights = _Weights(path, read_header(path))
    made, rank = _KINDS[kind](weights, fields, linears)
    if rank > max_rank:
        raise AdapterRejected([f"the {kind} has rank {rank}, this server takes at most {max_rank}"])
    config = {
        "peft_type": "LORA",
        "task_type": fields.get("task_type"),
        "r": rank,
        "lora_alpha": rank,
        "base_model_name_or_path": fields.get("base_model_name_or_path"),
        BASE_ID_KEY: fields.get(BASE_ID_KEY),
        CONVERTED_KEY: f"{kind} of peft",
    }
    _write(directory / _PART, made)
    os.replace(directory / _PART, path)
    (directory / CONFIG_FILE).unlink()
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2))


def _fields(directory: Path) -> dict[str, Any] | None:
    path = directory / CONFIG_FILE
    if not path.exists() or not (directory / WEIGHTS_FILE).exists():
        return None
    with open_regular(path) as file:
        try:
            return parse_object(file.read(MAX_CONFIG_BYTES + 1), limit=MAX_CONFIG_BYTES)
        except StrictJSONError:
            return None  # the check says why


def _is_off(value: object) -> bool:
    return value == "none" or is_empty(value)


class _Weights:
    """The tensors of the file, without peft's prefix; read when they are asked for.

    Raises `AdapterRejected`: two of them are the same without it.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self._path = path
        self.specs: dict[str, TensorSpec] = {}
        for name, spec in specs.items():
            short = name.removeprefix(_PREFIX).removesuffix(".weight")
            if short in self.specs:
                raise AdapterRejected([f"tensor {quoted(short)} is there twice, under two names"])
            self.specs[short] = spec

    def of(self, *ends: str) -> dict[str, dict[str, TensorSpec]]:
        """Module path -> what of these it has. Raises `AdapterRejected`: there is something else, or not all."""
        found: dict[str, dict[str, TensorSpec]] = {}
        for name, spec in self.specs.items():
            module, _, end = name.rpartition(".")
            if end in ends and module:
                found.setdefault(module, {})[end] = spec
            elif not name.startswith("base_model.vera_"):
                raise AdapterRejected([f"tensor {quoted(name)} is none of {', '.join(ends)}"])
        for module, parts in found.items():
            if len(parts) < len(ends):
                raise AdapterRejected([f"module {quoted(module)} has no {min(set(ends) - parts.keys())}"])
        if not found:
            raise AdapterRejected([f"{WEIGHTS_FILE} holds no {' and '.join(ends)}"])
        return found

    def read(self, name: str) -> Array:
        """Its numbers in fp32."""
        import numpy as np  # who only reads LoRA is spared it

        spec = self.specs[name]
        with open_regular(self._path) as file:
            file.seek(spec.offset)
            data = file.read(spec.nbytes)
        if len(data) < spec.nbytes:
            raise AdapterRejected([f"{WEIGHTS_FILE} ended while it was read"])
        if spec.dtype == "BF16":
            numbers = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            numbers = np.frombuffer(data, {"F64": np.float64, "F32": np.float32, "F16": np.float16}[spec.dtype])
        return numbers.astype(np.float32).reshape(spec.shape)


def _adalora(weights: _Weights, fields: Mapping[str, Any], linears: Linears) -> tuple[list[_Made], int]:
    modules = weights.of("lora_A", "lora_B", "lora_E")
    alpha: Any = fields.get("lora_alpha")
    if not is_number(alpha) or not -_MAX_ALPHA <= alpha <= _MAX_ALPHA:
        raise AdapterRejected(["lora_alpha is not a number"])
    ranks = {}
    for module, parts in modules.items():
        inputs, outputs = _sizes(module, linears)
        ranks[module] = rank = parts["lora_A"].shape[0] if parts["lora_A"].shape else 0
        wanted = {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "lora_E": (rank, 1)}
        _demand(module, {end: parts[end].shape for end in wanted}, wanted)
    most = max(ranks.values())
    if most == 0:
        raise AdapterRejected(["no module has a rank left: the adapter changes nothing"])

    def a(module: str) -> Array:
        rank = ranks[module]
        scale = (alpha if alpha > 0 else rank) / (rank + _TINY)
        product = weights.read(f"{module}.lora_A") * weights.read(f"{module}.lora_E")
        return _filled(product * _fp32(scale), most, 0)

    def b(module: str) -> Array:
        return _filled(weights.read(f"{module}.lora_B"), most, 1)

    return _pairs([module for module in modules if ranks[module]], linears, most, a, b), most


def _vera(weights: _Weights, fields: Mapping[str, Any], linears: Linears) -> tuple[list[_Made], int]:
    names = ("base_model.vera_A", "base_model.vera_B")
    if not all(name in weights.specs for name in names):
        raise AdapterRejected(
            [
                "VeRA's A and B, which all modules share, are not in the file: save the adapter with "
                "save_projection=True, or have peft convert it (peft.tuners.lora.conversion.save_as_lora)"
            ]
        )
    modules = weights.of("vera_lambda_b", "vera_lambda_d")
    shared = [weights.specs[name].shape for name in names]
    if any(len(shape) != 2 for shape in shared) or shared[0][0] != shared[1][1] or shared[0][0] == 0:
        raise AdapterRejected(["VeRA's A and B are of different rank, or no matrices"])
    rank = shared[0][0]
    for module, parts in modules.items():
        inputs, outputs = _sizes(module, linears)
        wanted: dict[str, tuple[int, ...]] = {"vera_lambda_b": (outputs,), "vera_lambda_d": (rank,)}
        _demand(module, {end: parts[end].shape for end in wanted}, wanted)
        if inputs > shared[0][1] or outputs > shared[1][0]:
            raise AdapterRejected([f"VeRA's A and B are smaller than module {quoted(module)}"])
    held: dict[str, Array] = {}

    def projection(name: str) -> Array:
        if name not in held:
            held[name] = weights.read(name)
        return held[name]

    def a(module: str) -> Array:
        return weights.read(f"{module}.vera_lambda_d")[:, None] * projection(names[0])[:, : linears[module][0]]

    def b(module: str) -> Array:
        return weights.read(f"{module}.vera_lambda_b")[:, None] * projection(names[1])[: linears[module][1]]

    return _pairs(list(modules), linears, rank, a, b), rank


def _ia3(weights: _Weights, fields: Mapping[str, Any], linears: Linears) -> tuple[list[_Made], int]:
    import numpy as np

    scales: dict[str, list[tuple[str, int]]] = {}  # module -> tensors that its outputs are scaled by, the first of each
    for module, parts in weights.of("ia3_l").items():
        inputs, outputs = _sizes(module, linears)
        shape = parts["ia3_l"].shape
        if shape == (outputs, 1) and not _is_feedforward(module, fields):
            scales.setdefault(module, []).append((f"{module}.ia3_l", 0))
        elif shape == (1, inputs):
            before, first = _before(module, linears)
            scales.setdefault(before, []).append((f"{module}.ia3_l", first))
        else:
            raise AdapterRejected([f"module {quoted(module)} has an ia3_l of shape {[*shape]}"])

    def scale(module: str) -> Array:
        whole = np.ones(linears[module][1], dtype=np.float32)
        for name, first in scales[module]:
            part = weights.read(name).reshape(-1)
            whole[first : first + len(part)] *= part
        return whole

    return [
        _Made(f"{_PREFIX}{module}.{OUTPUT_SCALE}", (linears[module][1],), lambda module=module: scale(module))  # type: ignore[misc]
        for module in scales
    ], 1


def _is_feedforward(module: str, fields: Mapping[str, Any]) -> bool:
    """Where a layer has as many inputs as outputs 1, its tensor's shape does not say."""
    named = fields.get("feedforward_modules")
    names = named if isinstance(named, list) else []
    return any(isinstance(name, str) and (module == name or module.endswith(f".{name}")) for name in names)


def _before(module: str, linears: Linears) -> tuple[str, int]:
    """Which layer's outputs, from which on, are what this one is given times something. Of gated MLPs only."""
    mlp, _, name = module.rpartition(".")
    inputs = linears[module][0]
    if name == "down_proj":
        up, fused = f"{mlp}.up_proj", f"{mlp}.gate_up_proj"
        if linears.get(up, (0, 0))[1] == inputs:
            return up, 0
        if linears.get(fused, (0, 0))[1] == 2 * inputs:
            return fused, inputs
    raise AdapterRejected(
        [f"(IA)3 scales what module {quoted(module)} is given, which is served for the down_proj of a gated MLP alone"]
    )


_KINDS = {"ADALORA": _adalora, "VERA": _vera, "IA3": _ia3}


def _sizes(module: str, linears: Linears) -> tuple[int, int]:
    if module not in linears:
        raise AdapterRejected([f"module {quoted(module)} is no linear layer of the base"])
    return linears[module]


def _demand(module: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for end, shape in wanted.items():
        if found[end] != shape:
            raise AdapterRejected(
                [f"module {quoted(module)} has {end} of shape {[*found[end]]}, the base asks for {[*shape]}"]
            )


def _pairs(
    modules: list[str], linears: Linears, rank: int, a: Callable[[str], Array], b: Callable[[str], Array]
) -> list[_Made]:
    made = []
    for module in modules:
        inputs, outputs = linears[module]
        made.append(_Made(f"{_PREFIX}{module}.lora_A.weight", (rank, inputs), lambda module=module: a(module)))  # type: ignore[misc]
        made.append(_Made(f"{_PREFIX}{module}.lora_B.weight", (outputs, rank), lambda module=module: b(module)))  # type: ignore[misc]
    return made


def _filled(matrix: Array, rank: int, axis: int) -> Array:
    import numpy as np

    more = [(0, 0), (0, 0)]
    more[axis] = (0, rank - matrix.shape[axis])
    return np.pad(matrix, more)


def _fp32(value: float) -> np.float32:
    import numpy as np

    return np.float32(value)


def _write(target: Path, made: list[_Made]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for each in made:
        is_matrix = len(each.shape) == 2
        count = each.shape[0] * (each.shape[1] if is_matrix else 1) * (2 if is_matrix else 4)
        header[each.name] = {
            "dtype": "BF16" if is_matrix else "F32",
            "shape": [*each.shape],
            "data_offsets": [position, position + count],
        }
        position += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with target.open("xb") as out:
        out.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for data in _bytes(made):
            out.write(data)


def _bytes(made: list[_Made]) -> Iterator[bytes]:
    import numpy as np

    for each in made:
        numbers = each.make()
        assert numbers.shape == each.shape
        if len(each.shape) == 1:
            yield numbers.tobytes()
            continue
        bits = np.ascontiguousarray(numbers).view(np.uint32)
        rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16  # to even; a NaN stays one, for the check to find
        yield np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16).tobytes()
