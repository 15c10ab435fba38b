"""LoRA weights from a PEFT directory, in the form the device stacks take: bf16, B transposed, scale folded in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from loramux_adapters.artifact.config import AdapterConfig, scale_of
from loramux_adapters.artifact.format import WEIGHTS_FILE, Pair, pair_up, read_config, read_header
from loramux_adapters.artifact.safetensors_header import open_regular
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.memory import mapping


class PlacedPair(NamedTuple):
    """Where a module's numbers lie among a file's bytes: A [rank, inputs] and B [outputs, rank], each of its dtype."""

    a_offset: int
    a_dtype: str
    b_offset: int
    b_dtype: str
    rank: int
    inputs: int
    outputs: int


# (to [numbers] bf16, content [bytes] uint8, pairs, scales) -> which pairs are finite. Writes the pairs one behind the
# other: A, then (B * scale)^T [rank, outputs]; products with the scale in fp32, rounded once, as `fold` does.
ConvertPairs = Callable[[torch.Tensor, npt.NDArray[np.uint8], Sequence[PlacedPair], Sequence[float]], list[bool]]


def load_host_adapter(directory: Path, version: str, convert: ConvertPairs | None = None) -> HostAdapter:
    """Read a PEFT directory into host memory; raises `AdapterRejected` if it is not one that can be read.

    The files are checked against themselves, not against a base: that is `verify`, at upload. `convert` as in
    `served_modules`.
    """
    config = read_config(directory)
    layout = pair_up(read_header(directory / WEIGHTS_FILE))
    if layout.reasons:
        raise AdapterRejected(layout.reasons)
    modules, _ = served_modules(directory, config, layout.pairs, convert)
    nbytes = sum(a.nbytes + bt.nbytes for a, bt in modules.values())
    rank = max((pair.rank for pair in layout.pairs.values()), default=0)
    return HostAdapter(version=version, rank=rank, nbytes=nbytes, modules=modules)


Modules = dict[str, tuple[torch.Tensor, torch.Tensor]]


def served_modules(
    directory: Path, config: AdapterConfig, pairs: Mapping[str, Pair], convert: ConvertPairs | None = None
) -> tuple[Modules, list[str]]:
    """What is computed with, by module path, and the modules of which some number is not finite.

    A [r, in] and Bt [r, out] in bf16, all in one block of memory, so that an eviction leaves no holes behind.
    `convert`: a kernel for it; without one tensors do it, module by module, with the same bits.
    Raises `AdapterRejected` if the file cannot be read.
    """
    values = sum(pair.rank * (pair.a.shape[1] + pair.b.shape[0]) for pair in pairs.values())
    block = mapping(values * torch.bfloat16.itemsize).view(torch.bfloat16)
    modules: Modules = {}
    free = 0
    for module, pair in pairs.items():
        rank, inputs, outputs = pair.rank, pair.a.shape[1], pair.b.shape[0]
        a = block.as_strided((rank, inputs), (inputs, 1), free)
        modules[module] = a, block.as_strided((rank, outputs), (outputs, 1), free + rank * inputs)
        free += rank * (inputs + outputs)
    if convert is None:
        return modules, _fill_by_tensors(modules, directory, config, pairs)
    return modules, _fill_at_once(convert, block, directory, config, pairs)


def _fill_by_tensors(modules: Modules, directory: Path, config: AdapterConfig, pairs: Mapping[str, Pair]) -> list[str]:
    """The slow reference, and the path without a kernel."""
    for module, a, bt in read_modules(directory, config, pairs):
        modules[module][0].copy_(a)
        modules[module][1].copy_(bt)
    return [module for module, parts in modules.items() if not all(part.isfinite().all() for part in parts)]


def _fill_at_once(
    convert: ConvertPairs, block: torch.Tensor, directory: Path, config: AdapterConfig, pairs: Mapping[str, Pair]
) -> list[str]:
    """The same in one call of a kernel."""
    placed = [
        PlacedPair(p.a.offset, p.a.dtype, p.b.offset, p.b.dtype, p.rank, p.a.shape[1], p.b.shape[0])
        for p in pairs.values()
    ]
    scales = [scale_of(config, module, pair.rank) for module, pair in pairs.items()]
    content = _content(directory, max((s.offset + s.nbytes for p in pairs.values() for s in (p.a, p.b)), default=0))
    finite = convert(block, content, placed, scales)
    return [module for module, good in zip(pairs, finite, strict=True) if not good]


def _content(directory: Path, nbytes: int) -> npt.NDArray[np.uint8]:
    """The first `nbytes` of the weights, copied: reading mapped memory of a file that is cut short ends the process."""
    content = np.empty(nbytes, dtype=np.uint8)
    with open_regular(directory / WEIGHTS_FILE) as file:
        if file.readinto(content.data) != nbytes:
            raise AdapterRejected([f"{WEIGHTS_FILE} ended while it was read"])
    return content


def read_modules(
    directory: Path, config: AdapterConfig, pairs: Mapping[str, Pair]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (module path, A [r, in] bf16, Bt [r, out] bf16) one by one, so that one module is in memory at a time."""
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt", device="cpu") as file:
            for module, pair in pairs.items():
                a, b = file.get_tensor(pair.a_name), file.get_tensor(pair.b_name)
                yield module, *fold(a, b, scale_of(config, module, pair.rank))
    except (SafetensorError, OSError) as error:
        raise AdapterRejected([f"{WEIGHTS_FILE} cannot be read"]) from error


def read_tensor(directory: Path, name: str) -> torch.Tensor:
    """One tensor as it stands in the file."""
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise AdapterRejected([f"{WEIGHTS_FILE} cannot be read"]) from error


def fold(a: torch.Tensor, b: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of any float dtype -> (A, (B * scale)^T [r, out]), bf16 and contiguous.

    The product with the scale is taken in fp32 and rounded once. Both are copies: what was read is mapped memory of the
    file, which would be read from disk when the device asks for it.
    """
    bt = (b.float() * scale).t().to(torch.bfloat16, memory_format=torch.contiguous_format)
    return a.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format), bt
