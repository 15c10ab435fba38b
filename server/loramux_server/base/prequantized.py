"""NF4 weights that bitsandbytes quantized and transformers saved: what a checkpoint holds of them, checked.

Beside a weight `w` [out * in / 2, 1] uint8 lie `w.absmax`, `w.quant_map` [16] and `w.quant_state.bitsandbytes__nf4`,
the bytes of a JSON object (`quant_type`, `blocksize`, `shape`, `dtype`). With double quantization absmax is uint8, and
`w.nested_absmax` and `w.nested_quant_map` [256] lie there too, with `nested_blocksize` and `nested_offset` in the JSON:

    scale of block b = nested_quant_map[absmax[b]] * nested_absmax[b // nested_blocksize] + nested_offset

in fp32, which is what bitsandbytes multiplies NF4's levels with (bitsandbytes/functional.py, QuantState).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch

from loramux_adapters import nf4
from loramux_server.errors import BaseModelError
from loramux_server.kernels.layers.nf4_layout import Nf4Numbers

_STATE = "quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{_STATE}nf4", f"{_STATE}fp4")
_NEAR = 1e-5  # of two levels that are the same


class _Wrong(Exception):
    """The text says what of a weight is not as it must be."""


def is_quantized(name: str, there: Callable[[str], bool]) -> bool:
    """Whether a checkpoint that holds what `there` says holds this weight quantized by bitsandbytes."""
    return any(there(f"{name}.{part}") for part in PARTS)


def numbers_of(name: str, there: Callable[[str], bool], read: Callable[[str], torch.Tensor]) -> Nf4Numbers:
    """Codes and scales of a weight that `is_quantized`.

    Args:
        there, read: of the checkpoint's tensors, by their names in it.
    Raises:
        BaseModelError: a part is missing, or is not what the others say, or the weight is in no form that is served.
    """
    try:
        return _numbers(name, there, read)
    except _Wrong as error:
        raise BaseModelError(f"the base's weight {name} is quantized in a way that cannot be served: {error}") from None


def _numbers(name: str, there: Callable[[str], bool], read: Callable[[str], torch.Tensor]) -> Nf4Numbers:
    def part(what: str, dtype: torch.dtype) -> torch.Tensor:
        if not there(f"{name}.{what}"):
            raise _Wrong(f"{what} is missing beside it: the checkpoint is not complete")
        tensor = read(f"{name}.{what}")
        if tensor.dtype != dtype:
            raise _Wrong(f"{what} is {_kind(tensor.dtype)}, and not {_kind(dtype)}")
        return tensor.reshape(-1)

    if there(f"{name}.{_STATE}fp4"):
        raise _Wrong("it is fp4, and only nf4 is: quantize the 16-bit checkpoint with bnb_4bit_quant_type='nf4'")
    state = _state(part(f"{_STATE}nf4", torch.uint8))
    outputs, inputs = _shape(state)
    nested = there(f"{name}.nested_absmax")
    absmax = part("absmax", torch.uint8 if nested else torch.float32)
    blocks = outputs * inputs // nf4.BLOCK
    if absmax.numel() != blocks:
        raise _Wrong(f"it has {absmax.numel()} scales, and {outputs} x {inputs} numbers need {blocks}")
    levels = part("quant_map", torch.float32)
    if levels.shape != nf4.levels().shape or not torch.allclose(levels, nf4.levels(), rtol=0, atol=_NEAR):
        raise _Wrong("its levels (quant_map) are not those of NF4")
    scales = absmax
    if nested:
        table, top = part("nested_quant_map", torch.float32), part("nested_absmax", torch.float32)
        together, offset = _whole(state, "nested_blocksize"), state.get("nested_offset")
        if not isinstance(offset, (int, float)) or not math.isfinite(offset):
            raise _Wrong(f"nested_offset is {offset!r}, and not a number")
        if table.numel() != 256:
            raise _Wrong(f"nested_quant_map has {table.numel()} levels, and not 256")
        if top.numel() != -(-blocks // together):
            raise _Wrong(f"{blocks} scales in blocks of {together} have {top.numel()} scales of their own")
        scales = table[absmax.int()] * top.repeat_interleave(together)[:blocks] + torch.tensor(float(offset))
    if not bool(torch.isfinite(scales).all()):
        raise _Wrong("some of its scales are not finite")
    pairs = read(name).contiguous().view(torch.uint8)  # bitsandbytes can store the bytes as numbers of other types
    if pairs.numel() != outputs * inputs // 2:
        raise _Wrong(f"it has {pairs.numel()} bytes, and {outputs} x {inputs} codes take {outputs * inputs // 2}")
    return Nf4Numbers(pairs.view(outputs, inputs // 2), scales.view(outputs, inputs // nf4.BLOCK))


def _state(packed: torch.Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(packed.tolist()).decode())
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise _Wrong("its quant_state is no JSON object")
    if state.get("quant_type") != "nf4":
        raise _Wrong(f"its quant_state calls it {state.get('quant_type')!r}, and only 'nf4' is served")
    if (block := _whole(state, "blocksize")) != nf4.BLOCK:
        raise _Wrong(f"it is quantized in blocks of {block}, and only {nf4.BLOCK} are: quantize the 16-bit checkpoint")
    return state


def _shape(state: dict[str, Any]) -> tuple[int, int]:
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise _Wrong(f"its quant_state gives the shape {shape!r}, and not [outputs, inputs]")
    outputs, inputs = shape
    if inputs % nf4.BLOCK:
        raise _Wrong(f"it takes {inputs} numbers, and blocks of {nf4.BLOCK} would reach from one output into the next")
    return outputs, inputs


def _whole(state: dict[str, Any], name: str) -> int:
    value = state.get(name)
    if type(value) is not int or value < 1:
        raise _Wrong(f"its quant_state gives {name} as {value!r}")
    return value


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
