"""The one place that chooses among kernels: a set of them for each way of computing, one implementation an operation.

    native      CPU: compiled code (csrc/), on the highest instruction set of this processor
    portable    CPU: the same code without an instruction set of its own
    tensor      any device: PyTorch's and bitsandbytes' operations; what an installation without a compiler runs on
    reference   any device: the slow loops that the others are tested against
    cuda        CUDA devices: the library's grouped products and attention, where they agree with the tensor path there

Who adds a kernel for another device or instruction set adds it to a set here, or a set to `_SETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from loramux_adapters.lora.ops import AddLora, add_lora_loop, add_lora_segments
from loramux_adapters.lora.slot_copy import CopySlot, copy_slot
from loramux_adapters.lora.weights import ConvertPairs, convert_by_tensors
from loramux_server.errors import ConfigError
from loramux_server.kernels.abi import Isa
from loramux_server.kernels.adapter_kernels import NativeAddLora, NativeConvertPairs, NativeCopySlot
from loramux_server.kernels.argmax import Argmax, NativeArgmax, argmax_by_tensors
from loramux_server.kernels.attention import Attend, NativeAttend, attend_reference
from loramux_server.kernels.compiled_ops import use_compiled_ops
from loramux_server.kernels.grouped_lora import GroupedAddLora, grouped_add_lora
from loramux_server.kernels.kv_cache import KVCache, KVShape
from loramux_server.kernels.native import NativeLibrary, native_library, why_unusable
from loramux_server.kernels.native_decoder import NativeDecoder, native_decoder
from loramux_server.kernels.nf4_linear import keep_unpacked, pack
from loramux_server.kernels.varlen_attention import VarlenAttend, varlen_attend


class GraphKernels(NamedTuple):
    """What a step must run on to be captured as a CUDA graph (engine/step_graphs.py)."""

    attend: VarlenAttend
    add_lora: GroupedAddLora


def as_it_is(model: nn.Module) -> None:
    """Leaves a base on its own code."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """One way to compute each operation. The defaults are those of the set `tensor`.

    Attributes:
        name: of the set.
        lay_out: lays the NF4 layers of a base out for their product, in place. Inference only.
        use_ops: gives norms, MLPs and output head of a base another forward, in place. Inference only.
        add_lora, lora: adds the deltas of a batch; its name in the start-up report and the numerics id.
        attend, attention: attention over the cache; its name.
        tiled: which layout of the cache `attend` reads.
        argmax: the greedy token of each row of logits.
        copy_slot: an adapter from host memory to a slot.
        convert: an adapter's numbers, as they lie in a file, to those that are computed with.
        compile_step: (model, cache) -> its whole step in one call; None where there is no such kernel at all.
        graphs: what steps are captured with; None where they are not.
    """

    name: str
    lay_out: Callable[[nn.Module], None] = as_it_is
    use_ops: Callable[[nn.Module], None] = as_it_is
    add_lora: AddLora = add_lora_segments
    lora: str = "tensor"
    attend: Attend = attend_reference
    attention: str = "tensor"
    tiled: bool = False
    argmax: Argmax = argmax_by_tensors
    copy_slot: CopySlot = copy_slot
    convert: ConvertPairs = convert_by_tensors
    compile_step: Callable[[Any, KVCache], NativeDecoder | None] | None = None
    graphs: GraphKernels | None = None


class _Unavailable(Exception):
    """A set does not run here; the text says why."""


def choose_kernels(device: torch.device, request: str | None = None, shape: KVShape | None = None) -> Kernels:
    """The kernels for a base on this device.

    Args:
        request: a set by name; None takes the fastest that runs here.
        shape: what a token needs in the cache. It is known only when the base is loaded: chosen without it, the set
            lays a base out; chosen once more by its name and with it, the set also runs steps.
    Raises:
        ConfigError: there is no set of this name, or it does not run here.
    """
    if request is None:
        request = "cuda" if device.type == "cuda" else "tensor"
        if device.type == "cpu" and native_library() is not None:
            request = "native"
    if request not in _SETS:
        raise ConfigError(f"there are no kernels named {request!r}; choose one of {', '.join(_SETS)}")
    try:
        return _SETS[request](device, shape)
    except _Unavailable as error:
        raise ConfigError(f"the kernels {request!r} cannot be used here: {error}") from error


def available_kernels(device: torch.device) -> list[str]:
    """The names of all sets that run on this device."""
    found = []
    for name, make in _SETS.items():
        try:
            make(device, None)
        except _Unavailable:
            continue
        found.append(name)
    return found


def _native(device: torch.device, shape: KVShape | None) -> Kernels:
    library = _library(device)
    return _compiled("native", library, library.best_isa, shape)


def _portable(device: torch.device, shape: KVShape | None) -> Kernels:
    return _compiled("portable", _library(device), Isa.PORTABLE, shape)


def _library(device: torch.device) -> NativeLibrary:
    if device.type != "cpu":
        raise _Unavailable(f"they are for the CPU, and the device is {device}")
    library = native_library()
    if library is None:
        raise _Unavailable(why_unusable())
    return library


def _compiled(name: str, library: NativeLibrary, isa: Isa, shape: KVShape | None) -> Kernels:
    has_vectors = isa is Isa.AVX512_BF16
    is_bf16 = shape is None or shape.dtype == torch.bfloat16
    add_lora: AddLora = NativeAddLora(library, isa) if is_bf16 else add_lora_segments
    attend: Attend = attend_reference
    compile_step = None
    fits = is_bf16 and shape is not None and shape.head_dim % 16 == 0
    if fits:
        attend = NativeAttend(library, isa)
        compile_step = partial(native_decoder, library, attend) if has_vectors else None
    lay_out: Callable[[nn.Module], None] = as_it_is  # bitsandbytes finds out what the processor has
    if has_vectors:
        lay_out = partial(pack, library=library)
    elif isa < library.best_isa:
        lay_out = partial(keep_unpacked, all_layers=True)
    return Kernels(
        name=name,
        lay_out=lay_out,
        use_ops=partial(use_compiled_ops, library=library, isa=isa),
        add_lora=add_lora,
        lora=f"native {isa.label}" if is_bf16 else "tensor",
        attend=attend,
        attention=f"native {isa.label}" if fits else "tensor",
        tiled=fits,
        argmax=NativeArgmax(library),
        copy_slot=NativeCopySlot(library),
        convert=NativeConvertPairs(library),
        compile_step=compile_step,
    )


def _tensor(device: torch.device, shape: KVShape | None) -> Kernels:
    return Kernels(name="tensor")


def _reference(device: torch.device, shape: KVShape | None) -> Kernels:
    return Kernels(
        name="reference",
        lay_out=partial(keep_unpacked, all_layers=True),
        add_lora=add_lora_loop,
        lora="reference",
        attention="reference",
    )


def _cuda(device: torch.device, shape: KVShape | None) -> Kernels:
    if device.type != "cuda":
        raise _Unavailable(f"they are for CUDA devices, and the device is {device}")
    is_bf16 = shape is not None and shape.dtype == torch.bfloat16
    grouped = grouped_add_lora(device) if is_bf16 else None
    varlen = None
    if is_bf16 and shape is not None and shape.head_dim % 16 == 0:
        from torch.nn.attention.varlen import varlen_attn

        varlen = varlen_attend(varlen_attn, device, shape)
    return Kernels(
        name="cuda",
        add_lora=grouped or add_lora_segments,
        lora=grouped.name if grouped else "tensor",
        attend=varlen or attend_reference,
        attention=varlen.name if varlen else "tensor",
        convert=_convert(),
        graphs=GraphKernels(varlen, grouped) if grouped and varlen and varlen.paged else None,
    )


def _convert() -> ConvertPairs:
    """An adapter is read into host memory, whatever the device: by compiled code where there is some."""
    library = native_library()
    return convert_by_tensors if library is None else NativeConvertPairs(library)


_SETS: dict[str, Callable[[torch.device, KVShape | None], Kernels]] = {
    "native": _native,
    "portable": _portable,
    "tensor": _tensor,
    "reference": _reference,
    "cuda": _cuda,
}
