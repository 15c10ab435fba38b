"""The one place that chooses among kernels: a set of them for each way of computing, one implementation an operation.

    native          CPU: compiled code (csrc/), on the fastest instruction set of this processor
    native-<set>    CPU: the same code, and the same bits, on a slower one: native-portable, native-avx2, ...
    modules         CPU: as `native`, but never a whole step in one call: what the whole step is compared with
    modules-<set>   CPU: the same on a slower instruction set
    tensor          any device: PyTorch's and bitsandbytes' operations; what an installation without a compiler runs on
    reference       any device: the slow loops that the others are tested against
    triton          graphics processors: our own kernels in Triton (gpu/), a whole step launched by one program; for
                    bases that have none, under their products and their attention
    cuda            graphics processors without Triton: bitsandbytes' products, the library's grouped products and
                    attention where they agree with the tensor path

On the CPU everything between layers is fp32, whatever the set. On other devices it is bf16 (fp16 before Ampere), and in
a whole step on `triton` the residual stream is fp32.

A processor without AVX2 (or NEON) also runs `native`, on portable code. Beside `tensor`, SmolLM2-135M on one thread,
both held to SSE2 and without fma, it decodes 2.9 times as many tokens in a second of processor time with 1 row, 2.4
with 4 and 1.4 with 32; and only so are its replies those of every other processor.

Who adds a kernel for another device or instruction set adds it to a set here, or a set to `_sets` and its name to
set_names.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from loramux_adapters.device.device import Device
from loramux_adapters.lora.ops import AddLora, add_lora_loop, add_lora_segments
from loramux_adapters.lora.slot_copy import CopySlot, StagedCopySlot, copy_slot
from loramux_adapters.lora.weights import ConvertPairs, convert_by_tensors
from loramux_server.errors import ConfigError
from loramux_server.kernels.attention.kv_cache import KVCache, KVShape
from loramux_server.kernels.attention.paged_attention import Attend, NativeAttend, attend_reference
from loramux_server.kernels.attention.varlen_attention import varlen_attend
from loramux_server.kernels.compiled.abi import VectorIsa
from loramux_server.kernels.compiled.adapter_kernels import NativeAddLora, NativeConvertPairs, NativeCopySlot
from loramux_server.kernels.compiled.library import Compiled, native_library, why_unusable
from loramux_server.kernels.compiled.sampling import NativeSampling, Sampling, TensorSampling
from loramux_server.kernels.decoder.decoder import compile_decoder
from loramux_server.kernels.decoder.whole_step import StepLimits, WholeStep
from loramux_server.kernels.gpu.check.usable import why_no_triton
from loramux_server.kernels.grouped_lora import grouped_add_lora
from loramux_server.kernels.layers.fp32 import keep_unpacked, run_in_fp32
from loramux_server.kernels.layers.nf4_layout import CompiledLayout, Nf4Layout
from loramux_server.kernels.layers.nf4_linear import pack
from loramux_server.kernels.layers.operations import use_compiled_ops
from loramux_server.kernels.layers.packed_embedding import pack_head
from loramux_server.kernels.layers.recognition import recognize
from loramux_server.kernels.layers.rotary import use_angles
from loramux_server.kernels.set_names import check_name, set_names

_SLOWER = "4 to 15"  # the set `tensor`, with SmolLM2-135M on Zen 4: the check at start, and one client


def as_it_is(model: nn.Module) -> None:
    """Leaves a base on its own code."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """One way to compute each operation. The defaults are those of the set `tensor`.

    Attributes:
        name: of the set.
        isa: the instruction set of compiled code, as reports name it; "" where there is none.
        compiled: the code on that instruction set.
        layout: how a base for these kernels is laid out as it is loaded, and kept (base/packed.py); None: it lies on
            bitsandbytes' layers.
        lay_out: lays NF4 layers and head of a base out for their products, in place. Inference only.
        use_ops: gives a base that is laid out what it computes between them with, in place. Inference only.
        add_lora, lora: adds the deltas of a batch; its name in the start-up report and the numerics id.
        attend, attention: attention over the cache; its name.
        whole_numbers: `attend` reads a cache of whole numbers; chosen without a shape: it is to be asked for.
        sampling: from logits to tokens and log probabilities.
        copy_slot: an adapter from host memory to a slot.
        convert: an adapter's numbers, as they lie in a file, to those that are computed with.
        spare_block: the cache needs one (KVCache).
        compile_step: (model, cache, limits, progress) -> its whole step in one call, or why it runs module by module;
            None where there is no such kernel at all.
    """

    name: str
    isa: str = ""
    compiled: Compiled | None = None
    layout: Nf4Layout | None = None
    lay_out: Callable[[nn.Module], None] = as_it_is
    use_ops: Callable[[nn.Module], None] = as_it_is
    add_lora: AddLora = add_lora_segments
    lora: str = "tensor"
    attend: Attend = attend_reference
    attention: str = "tensor"
    whole_numbers: bool = False
    spare_block: bool = False
    sampling: Sampling = field(default_factory=TensorSampling)
    copy_slot: CopySlot = copy_slot
    convert: ConvertPairs = convert_by_tensors
    compile_step: Callable[[Any, KVCache, StepLimits, Callable[[str], None]], WholeStep | str] | None = None


class _Unavailable(Exception):
    """A set does not run here; the text says why."""


def choose_kernels(device: Device, request: str | None = None, shape: KVShape | None = None) -> Kernels:
    """The kernels for a base on this device.

    Args:
        request: a set by name; None takes the fastest that runs here.
        shape: what a token needs in the cache. It is known only when the base is loaded: chosen without it, the set
            lays a base out; chosen once more by its name and with it, the set also runs steps.
    Raises:
        ConfigError: there is no set of this name, or it does not run here.
    """
    if request is None:
        request = device.kernels
        if request == "native" and native_library() is None:
            request = "tensor"
        if request == "triton":
            try:
                return _triton(device, shape)
            except _Unavailable:  # `why_not_compiled` says why
                request = "cuda"
    check_name(request)
    try:
        return _sets()[request](device, shape)
    except _Unavailable as error:
        raise ConfigError(f"the kernels {request!r} cannot be used here: {error}") from error


def why_not_compiled(kernels: Kernels, device: Device) -> list[str]:
    """For people, in two lines: why none of our kernels run on this device, what that costs, and what to do.

    Empty where they do.
    """
    if kernels.isa or kernels.name == device.kernels:
        return []
    if device.kernels == "triton":
        why = _why_no_triton(device) or f"LORAMUX_KERNELS asks for {kernels.name!r}; unset it"
        return [
            f"NO kernels of our own: {why}",
            "so a step is thousands of operations of PyTorch's and bitsandbytes', one by one, and the last bits of a "
            "reply may differ with what else is in its batch",
        ]
    if not device.is_host:
        return []
    if why := why_unusable():
        todo = "install g++ and then loramux again" if "not built" in why else "install loramux again"
    else:
        why, todo = f"LORAMUX_KERNELS asks for {kernels.name!r}", "unset it"
    return [f"NO compiled kernels: {why}", f"so all takes {_SLOWER} times as long, the start too; {todo}"]


def available_kernels(device: Device) -> list[str]:
    """The names of all sets that run on this device."""
    found = []
    for name, make in _sets().items():
        try:
            make(device, None)
        except _Unavailable:
            continue
        found.append(name)
    return found


def _modules(isa: VectorIsa | None, name: str, device: Device, shape: KVShape | None) -> Kernels:
    return replace(_native(isa, name, device, shape), compile_step=None)


def _native(isa: VectorIsa | None, name: str, device: Device, shape: KVShape | None) -> Kernels:
    """On this instruction set; None: the fastest."""
    if device.kernels != "native":
        raise _Unavailable(
            f"they are for the CPU, and the device is {device}: give --device cpu, or unset LORAMUX_KERNELS and "
            "LORAMUX_ISA"
        )
    library = native_library()
    if library is None:
        raise _Unavailable(why_unusable())
    compiled = library.best if isa is None else Compiled(library, isa)
    whole_numbers = shape is None or shape.whole_numbers
    attend = NativeAttend(compiled) if whole_numbers else attend_reference
    return Kernels(
        name=name,
        isa=compiled.isa.label,
        compiled=compiled,
        layout=CompiledLayout(compiled),
        lay_out=partial(_pack, compiled=compiled),
        use_ops=partial(_use_ops, compiled=compiled),
        add_lora=NativeAddLora(compiled),
        lora="native",
        attend=attend,
        attention="native" if whole_numbers else "tensor",
        whole_numbers=whole_numbers,
        sampling=NativeSampling(compiled),
        copy_slot=NativeCopySlot(library),
        convert=NativeConvertPairs(library),
        compile_step=partial(compile_decoder, compiled, attend) if whole_numbers else _no_whole_step,
    )


def _no_whole_step(model: Any, cache: KVCache, limits: StepLimits, progress: Callable[[str], None]) -> str:
    return (
        f"its heads have {cache.shape.head_dim} numbers, and the cache of whole numbers takes multiples of 16 up to 512"
    )


def _use_ops(model: nn.Module, compiled: Compiled) -> None:
    use_compiled_ops(model, compiled)
    use_angles(model, compiled.library)


def _pack(model: nn.Module, compiled: Compiled) -> None:
    pack(model, compiled)
    pack_head(model, compiled)


def _tensor(device: Device, shape: KVShape | None) -> Kernels:
    return Kernels(name="tensor", use_ops=_in_fp32_on(device))


def _reference(device: Device, shape: KVShape | None) -> Kernels:
    return Kernels(
        name="reference",
        lay_out=keep_unpacked,
        use_ops=_in_fp32_on(device),
        add_lora=add_lora_loop,
        lora="reference",
        attention="reference",
    )


def _in_fp32_on(device: Device) -> Callable[[nn.Module], None]:
    return run_in_fp32 if device.is_host else as_it_is


def _why_no_triton(device: Device, *, again: bool = False) -> str:
    """Empty where the kernels in Triton run; `again`: as `why_no_triton` has it."""
    if device.kernels != "triton":
        return f"they are for graphics processors, and the device is {device}"
    if native_library() is None:
        return f"they need the compiled library beside them, for angles: {why_unusable()}"
    return why_no_triton(device, again=again)


def _triton(device: Device, shape: KVShape | None) -> Kernels:
    if why := _why_no_triton(device, again=shape is not None):
        raise _Unavailable(why)
    from loramux_server.kernels.gpu.check.compile import compile_gpu_step
    from loramux_server.kernels.gpu.loading.nf4_layout import TritonLayout
    from loramux_server.kernels.gpu.step.module_attention import triton_attend
    from loramux_server.kernels.gpu.step.nf4_linear import pack as pack_for_triton

    plain = _cuda(device, shape)
    attend = None if shape is None else triton_attend(device, shape)
    return replace(
        plain,
        name="triton",
        attend=attend or plain.attend,
        attention=attend.name if attend else plain.attention,
        layout=TritonLayout(device),
        lay_out=partial(pack_for_triton, device=device),
        use_ops=partial(_recognized, device=device),
        compile_step=partial(compile_gpu_step, device, plain.attend),
        spare_block=device.captures,
    )


def _recognized(model: nn.Module, device: Device) -> None:
    library = native_library()
    assert library is not None
    recognize(model, device)
    use_angles(model, library)


def _cuda(device: Device, shape: KVShape | None) -> Kernels:
    if device.kernels not in ("triton", "cuda"):
        raise _Unavailable(f"they are for graphics processors, and the device is {device}")
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
        copy_slot=StagedCopySlot(device),
        convert=_convert(),
    )


def _convert() -> ConvertPairs:
    """An adapter is read into host memory, whatever the device: by compiled code where there is some."""
    library = native_library()
    return convert_by_tensors if library is None else NativeConvertPairs(library)


def _sets() -> dict[str, Callable[[Device, KVShape | None], Kernels]]:
    """All that have a name on this machine."""
    library = native_library()
    isas = {isa.label: isa for isa in library.isas} if library else {}
    compiled, others = (
        {"native": _native, "modules": _modules},
        {"tensor": _tensor, "reference": _reference, "triton": _triton, "cuda": _cuda},
    )
    sets: dict[str, Callable[[Device, KVShape | None], Kernels]] = {}
    for name in set_names():
        kind, _, label = name.partition("-")
        sets[name] = partial(compiled[kind], isas.get(label), name) if kind in compiled else others[name]
    return sets
