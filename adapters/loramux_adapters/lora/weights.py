"""LoRA weights from a PEFT directory, in the form the device stacks take: bf16, B transposed, scale folded in."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from loramux_adapters.artifact.config import AdapterConfig, scale_of
from loramux_adapters.artifact.format import (
    WEIGHTS_FILE,
    Pair,
    VectorKind,
    Vectors,
    VersionDigest,
    Vocabulary,
    in_order,
    pair_up,
    read_chat_template,
    read_config,
    read_header,
    read_vector,
    without_saved,
)
from loramux_adapters.artifact.generation_defaults import (
    NOTHING_SAID,
    GenerationDefaults,
    read_generation_defaults,
)
from loramux_adapters.artifact.own_tokens import OwnTokens, read_own_tokens
from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.errors import AdapterRejected, VectorsNotServed
from loramux_adapters.lora.affine import BaseWeights, affine_of, magnitude_scale
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.token_reading import read_tokens
from loramux_adapters.lora.token_rows import SIDES, Side
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


def load_host_adapter(
    directory: Path,
    convert: ConvertPairs | None = None,
    weights: BaseWeights | None = None,
    *,
    saved: bool = True,
) -> HostAdapter:
    """Read a PEFT directory into host memory; raises `AdapterRejected` if it is not one that can be read.

    The files are checked against themselves, not against a base: that is `verify`, at upload. `convert` and `weights`
    as in `read_adapter`. `saved`: with the modules that were saved whole, which did not always count.
    """
    config = read_config(directory) if saved else without_saved(read_config(directory))
    layout = pair_up(read_header(directory / WEIGHTS_FILE))
    if layout.reasons:
        raise AdapterRejected(layout.reasons)
    adapter, _ = read_adapter(
        directory,
        config,
        layout.pairs,
        convert,
        vectors=layout.vectors(config),
        weights=weights,
        vocabulary=layout.vocabulary(config),
        chat_template=read_chat_template(directory),
        own_tokens=read_own_tokens(directory),
        generation=read_generation_defaults(directory),
    )
    return adapter


def read_adapter(
    directory: Path,
    config: AdapterConfig,
    pairs: Mapping[str, Pair],
    convert: ConvertPairs | None = None,
    *,
    vectors: Vectors = MappingProxyType({}),
    weights: BaseWeights | None = None,
    vocabulary: Vocabulary = MappingProxyType({}),
    chat_template: str | None = None,
    own_tokens: OwnTokens | None = None,
    generation: GenerationDefaults = NOTHING_SAID,
) -> tuple[HostAdapter, Sequence[str]]:
    """What is computed with, and the modules of which some number is not finite.

    The weights are read once, a piece of the file at a time, which is digested and converted. So beside the adapter
    itself this takes the memory of `_PIECE_BYTES`, or of the largest pair if that is more.
    All modules lie in one block of memory, so that an eviction leaves no holes behind.
    `convert`: a kernel for it; None does it by tensors, with the same bits. `vectors`: what modules have beside their
    pairs. `weights`: of the base, which these need. `vocabulary`: of the file, which needs them too.
    `chat_template`, `own_tokens`, `generation`: of its own.
    Raises `AdapterRejected` if the file cannot be read, `VectorsNotServed` if there are vectors and no room for them.
    """
    if vectors and (weights is None or not weights.vectors):
        raise VectorsNotServed
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
    base_tokens = None if weights is None else weights.tokens
    with open_regular(directory / WEIGHTS_FILE) as file:
        beside = _Beside(file.fileno(), vectors, weights)
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
            for place, scale in zip(piece, scales, strict=True):
                if place.module in vectors:
                    b = _numbers(content, place.b, place.pair.b.dtype, place.pair.b.shape)
                    beside.fold(place.module, *modules[place.module], b, scale)
        beside.finish(digest)
        tokens = read_tokens(file.fileno(), vocabulary, config, base_tokens, _sides(vocabulary, weights), digest)
    digest.generation_defaults(generation)
    digest.own_tokens(own_tokens)
    digest.chat_template(chat_template)
    adapter = HostAdapter(
        version=digest.hexdigest(),
        rank=max((pair.rank for pair in pairs.values()), default=1 if vectors or vocabulary else 0),
        nbytes=block.nbytes
        + sum(part.nbytes for part in beside.affine.values())
        + (0 if tokens.rows is None else tokens.rows.nbytes),
        modules={module: modules[module] for module in pairs},
        affine=beside.affine,
        tokens=tokens.rows,
    )
    finite_beside = {module: module not in beside.not_finite for module in vectors}
    whole = is_finite | {module: found and is_finite.get(module, True) for module, found in finite_beside.items()}
    return adapter, [*(module for module, found in whole.items() if not found), *sorted(tokens.not_finite)]


def _sides(vocabulary: Vocabulary, weights: BaseWeights | None) -> dict[str, Side]:
    """Which modules of a file are embedding and output head of the base."""
    if weights is None or weights.tokens is None:
        return {}
    tokens = weights.tokens
    return {
        module: side for module in vocabulary for side in SIDES if tokens.path_of(module) == tokens.paths.get(side, "")
    }


class _Beside:
    """What the modules of a file have beside their pairs, read and put together one after the other.

    Attributes:
        affine: by module, where it is not zero.
        not_finite: modules that have a number that is not finite.
    """

    def __init__(self, file: int, vectors: Vectors, weights: BaseWeights | None) -> None:
        self._vectors = vectors
        self._weights = weights
        self._data = {(module, kind): read_vector(file, vector.spec) for module, kind, vector in in_order(vectors)}
        self._done: set[str] = set()
        self.affine: dict[str, torch.Tensor] = {}
        self.not_finite: set[str] = set()

    def fold(self, module: str, a: torch.Tensor, bt: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        """A module that has a pair: `a` and `bt`, which DoRA changes, as they are served; `b` and its scale as read."""
        assert self._weights is not None
        vectors, s = self._numbers_of(module), None
        if (magnitude := vectors.get("magnitude")) is not None:
            scaled = (b.float() * scale).t()
            s = magnitude_scale(self._weights, module, magnitude, a.float(), scaled.contiguous())
            bt.copy_(scaled * s)
        self._keep(module, affine_of(vectors, self._weights.bias(module), scale=scale, s=s), bt)

    def finish(self, digest: VersionDigest) -> None:
        """The modules without a pair, which may be some that are no linear layer; and the digest of all."""
        for module in sorted(self._vectors.keys() - self._done):
            assert self._weights is not None
            if module in self._weights:
                own = self._weights.bias(module)
                self._keep(module, affine_of(self._numbers_of(module), own, scale=0.0, s=None))
        for module, kind, vector in in_order(self._vectors):
            digest.vector(module, kind, vector.spec, self._data[module, kind])

    def _keep(self, module: str, affine: torch.Tensor | None, *others: torch.Tensor) -> None:
        self._done.add(module)
        if affine is not None:
            self.affine[module] = affine
        if not all(bool(part.isfinite().all()) for part in (*others, *(() if affine is None else (affine,)))):
            self.not_finite.add(module)

    def _numbers_of(self, module: str) -> dict[VectorKind, torch.Tensor]:
        return {
            kind: _numbers(np.frombuffer(self._data[module, kind], np.uint8), 0, vector.spec.dtype, (-1,)).float()
            for kind, vector in self._vectors[module].items()
        }


def _numbers(content: npt.NDArray[np.uint8], at: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A copy of numbers that lie among some bytes; a shape of (-1,): all that follow."""
    end = len(content) if shape == (-1,) else at + _DTYPES[dtype].itemsize * math.prod(shape)
    return torch.from_numpy(content[at:end].copy()).view(_DTYPES[dtype]).view(shape)


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
