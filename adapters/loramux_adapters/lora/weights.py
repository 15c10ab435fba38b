"""LoRA weights from a PEFT directory, in the form the device stacks take: bf16, B transposed, scale folded in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from loramux_adapters.artifact.config import AdapterConfig, scale_of
from loramux_adapters.artifact.format import (
    WEIGHTS_FILE,
    Pair,
    VersionDigest,
    pair_up,
    read_chat_template,
    read_config,
    read_header,
)
from loramux_adapters.artifact.own_files import open_regular
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.memory import mapping

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE_BYTES = 4 * 2**20


Modules = dict[str, tuple[torch.Tensor, torch.Tensor]]


class PlacedPair(NamedTuple):
    """Where a module's numbers lie among some bytes: A [rank, inputs] and B [outputs, rank], each of its dtype."""

    a_offset: int
    a_dtype: str
    b_offset: int
    b_dtype: str
    rank: int
    inputs: int
    outputs: int


# (to [numbers] bf16, content [bytes] uint8, pairs, scales) -> which pairs are finite. Writes the pairs one behind the
# other, each as `fold` gives it.
ConvertPairs = Callable[[torch.Tensor, npt.NDArray[np.uint8], Sequence[PlacedPair], Sequence[float]], list[bool]]


def load_host_adapter(directory: Path, convert: ConvertPairs | None = None) -> HostAdapter:
    """Read a PEFT directory into host memory; raises `AdapterRejected` if it is not one that can be read.

    The files are checked against themselves, not against a base: that is `verify`, at upload. `convert` as in
    `read_adapter`.
    """
    config = read_config(directory)
    layout = pair_up(read_header(directory / WEIGHTS_FILE))
    if layout.reasons:
        raise AdapterRejected(layout.reasons)
    adapter, _ = read_adapter(directory, config, layout.pairs, convert, chat_template=read_chat_template(directory))
    return adapter


def read_adapter(
    directory: Path,
    config: AdapterConfig,
    pairs: Mapping[str, Pair],
    convert: ConvertPairs | None = None,
    *,
    chat_template: str | None = None,
) -> tuple[HostAdapter, Sequence[str]]:
    """What is computed with, and the modules of which some number is not finite.

    The weights are read once, a piece of the file at a time, which is digested and converted. So beside the adapter
    itself this takes the memory of `_PIECE_BYTES`, or of the largest pair if that is more.
    All modules lie in one block of memory, so that an eviction leaves no holes behind.
    `convert`: a kernel for it; None does it by tensors, with the same bits. `chat_template`: of its own.
    Raises `AdapterRejected` if the file cannot be read.
    """
    values = sum(pair.rank * (pair.a.shape[1] + pair.b.shape[0]) for pair in pairs.values())
    block = mapping(values * torch.bfloat16.itemsize).view(torch.bfloat16)
    pieces = list(_pieces(sorted(pairs.items())))  # in the order that the digest takes
    content = np.empty(max((piece[-1].end for piece in pieces), default=0), dtype=np.uint8)
    if convert is None or any("F64" in (pair.a.dtype, pair.b.dtype) for pair in pairs.values()):
        convert = convert_by_tensors  # hardly anyone writes F64: no kernel reads it
    digest = VersionDigest()
    modules: Modules = {}
    is_finite: dict[str, bool] = {}
    free = 0
    with open_regular(directory / WEIGHTS_FILE) as file:
        for piece in pieces:
            start = free
            scales = [scale_of(config, place.module, place.pair.rank) for place in piece]
            for place, scale in zip(piece, scales, strict=True):
                pair = place.pair
                rank, inputs, outputs = pair.rank, pair.a.shape[1], pair.b.shape[0]
                a = block.as_strided((rank, inputs), (inputs, 1), free)
                bt = block.as_strided((rank, outputs), (outputs, 1), free + rank * inputs)
                modules[place.module] = a, bt
                free += rank * (inputs + outputs)
                digest.begin(place.module, pair, scale)
                for spec, at in ((pair.a, place.a), (pair.b, place.b)):
                    part = content.data[at : at + spec.nbytes]
                    _read_exactly(file.fileno(), part, spec.offset)
                    digest.update(part)
            finite = convert(block[start:free], content, [place.placed for place in piece], scales)
            is_finite.update(zip((place.module for place in piece), finite, strict=True))
    digest.chat_template(chat_template)
    adapter = HostAdapter(
        version=digest.hexdigest(),
        rank=max((pair.rank for pair in pairs.values()), default=0),
        nbytes=block.nbytes,
        modules={module: modules[module] for module in pairs},
    )
    return adapter, [module for module in pairs if not is_finite[module]]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the bytes of a pair lie in the memory of a piece: A from `a` on, B from `b` on, up to `end`."""

    module: str
    pair: Pair
    a: int
    b: int
    end: int

    @property
    def placed(self) -> PlacedPair:
        a, b = self.pair.a, self.pair.b
        return PlacedPair(self.a, a.dtype, self.b, b.dtype, self.pair.rank, a.shape[1], b.shape[0])


def _pieces(pairs: Iterable[tuple[str, Pair]]) -> Iterator[list[_Place]]:
    """The pairs, in this order, as many at a time as `_PIECE_BYTES` hold, and at least one."""
    piece: list[_Place] = []
    end = 0
    for module, pair in pairs:
        if piece and end + pair.a.nbytes + pair.b.nbytes > _PIECE_BYTES:
            yield piece
            piece, end = [], 0
        b = _aligned(end + pair.a.nbytes)
        piece.append(_Place(module, pair, end, b, b + pair.b.nbytes))
        end = _aligned(piece[-1].end)
    if piece:
        yield piece


def _aligned(position: int) -> int:
    """To the size of every dtype there is."""
    return -(-position // 8) * 8


def _read_exactly(file: int, part: memoryview, offset: int) -> None:
    """Read, and not mapped: reading mapped memory of a file that is cut short ends the process."""
    done = 0
    while done < len(part):
        count = os.preadv(file, [part[done:]], offset + done)
        if not count:
            raise AdapterRejected([f"{WEIGHTS_FILE} ended while it was read"])
        done += count


def convert_by_tensors(
    to: torch.Tensor, content: npt.NDArray[np.uint8], pairs: Sequence[PlacedPair], scales: Sequence[float]
) -> list[bool]:
    """The slow reference, and the path without a kernel."""
    finite, free = [], 0
    for pair, scale in zip(pairs, scales, strict=True):
        a, b = (
            torch.from_numpy(content[at : at + _DTYPES[dtype].itemsize * pair.rank * size]).view(_DTYPES[dtype])
            for at, dtype, size in (
                (pair.a_offset, pair.a_dtype, pair.inputs),
                (pair.b_offset, pair.b_dtype, pair.outputs),
            )
        )
        parts = fold(a.view(pair.rank, pair.inputs), b.view(pair.outputs, pair.rank), scale)
        for part in parts:
            to[free : free + part.numel()] = part.flatten()
            free += part.numel()
        finite.append(all(bool(part.isfinite().all()) for part in parts))
    return finite


def read_tensor(directory: Path, name: str) -> torch.Tensor:
    """One tensor as it stands in the file."""
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise AdapterRejected([f"{WEIGHTS_FILE} cannot be read"]) from error


def fold(a: torch.Tensor, b: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of any float dtype -> (A, (B * scale)^T [r, out]) in bf16.

    The product with the scale is taken in fp32 and rounded once.
    """
    return a.to(torch.bfloat16), (b.float() * scale).t().to(torch.bfloat16)
