"""The base as compiled CPU kernels read it: packed once, then one file that later starts read into one mapping.

It holds every number that a start needs: codes, scales and biases of NF4 layers, the output head's whole numbers, which
a tied embedding is read from, and what stays as it is (other embeddings, norms, buffers). The same checkpoint gives the
same bytes on every processor. With it the 16-bit weights are not read again, and nothing is quantized.

The file is read, not mapped: a mapped file lies in small pages, and a step of one row waits for memory. Its parts are
read and digested side by side.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from loramux_adapters.lora.lora_linear import output_head
from loramux_adapters.memory import mapping
from loramux_server.base.cache_directory import partial_directory
from loramux_server.base.nf4_quantizer import quantize_into
from loramux_server.base.source import Report
from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.layers.nf4_linear import NF4Linear, codes_shape, scales_shape, shape_fits
from loramux_server.kernels.layers.packed_embedding import PackedEmbedding, factor_of, put, tied_embedding
from loramux_server.kernels.layers.packed_head import PackedHead, head_fits, head_shapes

FORM = 3  # goes up whenever the same checkpoint would give other bytes
_MAGIC = b"loramux packed base\n"
_LENGTH = struct.Struct("<Q")  # of the header, between its digest and itself
_ALIGNED = 64  # bytes, each tensor in the mapping
_PART = 1 << 22  # bytes that have a digest of their own
_TOLD_SECONDS = 5.0  # between two lines on how far quantizing is
_LARGEST_HEADER = 1 << 26
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
        *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
    )
}


class Unusable(Exception):
    """A file is not what was packed; the text says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in the mapping."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class PackedTensors:
    """Every tensor of a packed base, in one mapping.

    Attributes:
        memory: [bytes] uint8.
        places: names as in the model's state, sorted by what lies first.
    """

    memory: torch.Tensor
    places: Mapping[str, Place]

    @classmethod
    def reserved(cls, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> PackedTensors:
        places, size = {}, 0
        for name, (dtype, shape) in shapes.items():
            places[name] = Place(dtype, shape, size)
            size += -(-places[name].nbytes // _ALIGNED) * _ALIGNED
        return cls(mapping(size, huge_pages=True), places)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> torch.Tensor:
        place = self.places[name]
        return self.memory[place.offset : place.offset + place.nbytes].view(place.dtype).view(place.shape)


def packable(skeleton: nn.Module) -> bool:
    """Whether the compiled kernels take every layer of this model, which is on the meta device."""
    head = output_head(skeleton)[1]
    linears = [module for module in skeleton.modules() if isinstance(module, nn.Linear) and module is not head]
    loose = any(isinstance(each, torch.Tensor) for module in skeleton.modules() for each in vars(module).values())
    return bool(linears) and all(shape_fits(each) for each in linears) and not loose


def packed_once(
    cache_dir: Path,
    base_id: str,
    skeleton: nn.Module,
    compiled: Compiled,
    report: Report,
    *,
    load: Callable[[], nn.Module],
) -> nn.Module:
    """The skeleton with layers and weights: from the cache if they are there and right, else packed and kept there.

    Args:
        skeleton: the model on the meta device; it is `packable`.
        load: reads the 16-bit model.
    """
    library = metadata.version("transformers")  # names of layers and numbers in buffers are its
    file = cache_dir / "packed" / f"{base_id[:16]}-form-{FORM}-transformers-{library}"
    if file.is_file():
        report(f"reading the base as it was packed before ({file.stat().st_size / 2**20:,.0f} MiB)")
        try:
            return assembled(skeleton, read(file, base_id), compiled)
        except (Unusable, OSError) as error:
            report(f"what was kept in {file} cannot be used ({error}): it is packed again")
            with contextlib.suppress(OSError):  # of a cache that can only be read
                file.unlink()
    report("loading and quantizing the base to NF4")
    tensors = packed(load(), compiled, report)
    report(f"keeping it for the next start ({len(tensors.memory) / 2**20:,.0f} MiB)")
    try:
        _keep(file, base_id, tensors)
    except Exception as error:  # the server runs without it
        report(f"the packed base could not be kept for the next start: {error}")
    return assembled(skeleton, tensors, compiled)


@torch.no_grad()
def packed(model: nn.Module, compiled: Compiled, report: Report) -> PackedTensors:
    """The tensors of a 16-bit model on the CPU as the kernels read them; the model stays as it is."""
    head_path, head = output_head(model)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    linears.pop(head_path, None)
    weights = {id(layer.weight) for layer in linears.values()}
    tied = tied_embedding(model)
    if head_fits(head) and (tied is None or factor_of(tied) is not None):
        weights.add(id(head.weight))
    kept = {name: each for name, each in _tensors_of(model) if id(each) not in weights}
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for path, layer in linears.items():
        shapes[f"{path}.weight"] = torch.uint8, codes_shape(layer)
        shapes[f"{path}.scales"] = torch.float32, scales_shape(layer)
    if head_fits(head):
        numbers, scales = head_shapes(head)
        shapes |= {f"{head_path}.numbers": (torch.uint8, numbers), f"{head_path}.scales": (torch.float32, scales)}
    tensors = PackedTensors.reserved(shapes | {name: (each.dtype, tuple(each.shape)) for name, each in kept.items()})
    told = time.monotonic()
    for done, (path, layer) in enumerate(linears.items()):
        if time.monotonic() - told > _TOLD_SECONDS:
            report(f"quantized {done} of {len(linears)} layers so far")
            told = time.monotonic()
        weight = layer.weight.detach().to(torch.bfloat16)
        quantize_into(tensors[f"{path}.weight"], tensors[f"{path}.scales"], weight, compiled)
    if head_fits(head):
        PackedHead.fill(tensors[f"{head_path}.numbers"], tensors[f"{head_path}.scales"], head.weight, compiled)
    for name, each in kept.items():
        tensors[name].copy_(each)
    return tensors


def assembled(skeleton: nn.Module, tensors: PackedTensors, compiled: Compiled) -> nn.Module:
    """The skeleton, changed in place: its layers are the compiled kernels' own, and its weights these tensors.

    Raises:
        Unusable: these are not the tensors of this model, which stays as it was.
    """
    first = {id(each): name for name, each in skeleton.named_parameters()}  # tied ones under the first of their names
    parameters: dict[str, nn.Parameter] = {}
    used: set[str] = set()

    def take(name: str) -> torch.Tensor:
        if name not in tensors:
            raise Unusable(f"it holds no {name}")
        used.add(name)
        return tensors[name]

    def parameter(name: str, held: nn.Parameter) -> nn.Parameter:
        """What the config ties is two where the checkpoint holds both and they differ, as transformers has it."""
        if name not in tensors:
            name = first[id(held)]
        if name not in parameters:
            parameters[name] = nn.Parameter(take(name), requires_grad=False)
        return parameters[name]

    head_path, head = output_head(skeleton)
    tied = tied_embedding(skeleton)
    reads_head = tied is not None and f"{head_path}.numbers" in tensors and first[id(tied.weight)] not in tensors
    replaced: list[tuple[str, nn.Module]] = []
    filled: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for path, module in skeleton.named_modules():
        under = f"{path}." if path else ""
        if isinstance(module, nn.Linear) and (module is not head or f"{head_path}.numbers" in tensors):
            scales = take(f"{under}scales")
            if module is head:
                replaced.append((path, PackedHead(take(f"{under}numbers"), scales, module.out_features, compiled)))
            else:
                bias = None if module.bias is None else parameter(f"{under}bias", module.bias).data
                replaced.append((path, NF4Linear(take(f"{under}weight"), scales, bias, compiled)))
            continue
        for name, held in module._parameters.items():
            if held is not None and not (reads_head and module is tied):
                filled.append((module._parameters, name, parameter(f"{under}{name}", held)))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                filled.append((module._buffers, name, take(f"{under}{name}")))
    if unused := sorted(tensors.places.keys() - used):
        raise Unusable(f"it holds {unused[0]}, which this model does not have")
    for holder, name, tensor in filled:  # not before all is known to be there
        holder[name] = tensor
    for path, layer in replaced:
        skeleton.set_submodule(path, layer)
        if path == head_path and reads_head and tied is not None and isinstance(layer, PackedHead):
            put(skeleton, tied, PackedEmbedding(layer, float(getattr(tied, "embed_scale", 1.0))))
    return skeleton.eval()


def write(file: BinaryIO, base_id: str, tensors: PackedTensors) -> None:
    """Digests of the parts, then the parts."""
    parts: list[Any] = [tensors.memory[start : start + _PART].numpy() for start in range(0, len(tensors.memory), _PART)]
    with _workers() as pool:
        digests = list(pool.map(lambda part: hashlib.sha256(part).hexdigest(), parts))
    described = {name: [str(each.dtype), each.shape, each.offset] for name, each in tensors.places.items()}
    header = {"form": FORM, "base_id": base_id, "size": len(tensors.memory), "tensors": described, "parts": digests}
    text = json.dumps(header, separators=(",", ":")).encode()
    file.write(_MAGIC + hashlib.sha256(text).digest() + _LENGTH.pack(len(text)) + text)
    for part in parts:
        file.write(part)


def read(path: Path, base_id: str) -> PackedTensors:
    """What `write` wrote, every part of it checked.

    Raises:
        Unusable: it is not whole, not unchanged, or of another base.
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        header, begin = _header(file, base_id)
        places = {
            name: Place(_DTYPES[dtype], tuple(shape), offset)
            for name, (dtype, shape, offset) in header["tensors"].items()
        }
        size, digests = int(header["size"]), header["parts"]
        if os.fstat(file.fileno()).st_size != begin + size:
            raise Unusable("it is cut short, or longer than it was")
        memory = mapping(size, huge_pages=True)
        bytes_of: Any = memory.numpy()

        def part(index: int) -> bool:
            held = bytes_of[index * _PART : (index + 1) * _PART]
            read = os.preadv(file.fileno(), [held], begin + index * _PART)
            return read == len(held) and hashlib.sha256(held).hexdigest() == digests[index]

        with _workers() as pool:
            right = list(pool.map(part, range(-(-size // _PART))))
    if not all(right):
        raise Unusable("its bytes are not those that were packed")
    return PackedTensors(memory, places)


def _header(file: BinaryIO, base_id: str) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    begin = len(_MAGIC) + hashlib.sha256().digest_size + _LENGTH.size
    start = file.read(begin)
    if len(start) < begin or not start.startswith(_MAGIC):
        raise Unusable("it does not begin as a packed base does")
    digest = start[len(_MAGIC) : -_LENGTH.size]
    (length,) = _LENGTH.unpack(start[-_LENGTH.size :])
    text = file.read(length) if length <= _LARGEST_HEADER else b""
    if hashlib.sha256(text).digest() != digest:
        raise Unusable("its header is not the one that was written")
    header: dict[str, Any] = json.loads(text)
    if header["form"] != FORM or header["base_id"] != base_id:
        raise Unusable("it is of another base")
    return header, begin + length


def _keep(file: Path, base_id: str, tensors: PackedTensors) -> None:
    """Writes it, and removes what other versions left of the same base."""
    with partial_directory(file) as partial:
        whole = partial / "base"
        with whole.open("wb") as opened:
            write(opened, base_id, tensors)
        for other in file.parent.glob(f"{base_id[:16]}-*"):
            other.unlink()
        whole.rename(file)


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, tied ones once, and buffers, also those that are in no checkpoint."""
    yield from model.named_parameters()
    yield from model.named_buffers(remove_duplicate=False)


_workers = partial(ThreadPoolExecutor, max_workers=min(16, os.cpu_count() or 1), thread_name_prefix="packed")
