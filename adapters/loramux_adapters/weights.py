"""LoRA weights from a PEFT directory, in the form the device stacks take: bf16, B transposed, scale folded in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loramux_adapters.config_format import AdapterConfig, scale_of
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.format import WEIGHTS_FILE, Pair, pair_up, read_config, read_header
from loramux_adapters.host_cache import HostAdapter
from loramux_adapters.memory import mapping


def load_host_adapter(directory: Path, version: str) -> HostAdapter:
    """Read a PEFT directory into host memory; raises `AdapterRejected` if it is not one that can be read.

    The files are checked against themselves, not against a base: that is `verify`, at upload.
    """
    config = read_config(directory)
    layout = pair_up(read_header(directory / WEIGHTS_FILE))
    if layout.reasons:
        raise AdapterRejected(layout.reasons)
    values = sum(pair.rank * (pair.a.shape[1] + pair.b.shape[0]) for pair in layout.pairs.values())
    nbytes = values * torch.bfloat16.itemsize
    free = mapping(nbytes).view(torch.bfloat16)  # one block, so that an eviction leaves no holes behind
    modules = {}
    for module, a, b, scale in _read_pairs(directory, config, layout.pairs):
        held_a, held_bt, free = torch.split(free, [a.numel(), b.numel(), free.numel() - a.numel() - b.numel()])
        bt = _scaled(b, scale)
        modules[module] = (held_a.view_as(a).copy_(a), held_bt.view_as(bt).copy_(bt))
    rank = max((pair.rank for pair in layout.pairs.values()), default=0)
    return HostAdapter(version=version, rank=rank, nbytes=nbytes, modules=modules)


def read_modules(
    directory: Path, config: AdapterConfig, pairs: Mapping[str, Pair]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (module path, A [r, in] bf16, Bt [r, out] bf16) one by one, so that one module is in memory at a time."""
    for module, a, b, scale in _read_pairs(directory, config, pairs):
        yield module, *fold(a, b, scale)


def _read_pairs(
    directory: Path, config: AdapterConfig, pairs: Mapping[str, Pair]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]:
    """(module path, A, B, scale) as they stand in the file, in memory that is the file's."""
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt", device="cpu") as file:
            for module, pair in pairs.items():
                a, b = file.get_tensor(pair.a_name), file.get_tensor(pair.b_name)
                yield module, a, b, scale_of(config, module, pair.rank)
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
    bt = _scaled(b, scale).to(torch.bfloat16, memory_format=torch.contiguous_format)
    return a.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format), bt


def _scaled(b: torch.Tensor, scale: float) -> torch.Tensor:
    """(B * scale)^T [r, out] in fp32."""
    return (b.float() * scale).t()
