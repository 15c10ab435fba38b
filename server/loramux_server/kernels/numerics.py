"""The numerics id: whoever has the same one computes the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import Device
from loramux_server.kernels.attention.kv_cache import KVCache, KVShape
from loramux_server.kernels.attention.paged_attention import AttentionStep, use_our_attention
from loramux_server.kernels.choice import Kernels
from loramux_server.kernels.decoder.whole_step import WholeStep
from loramux_server.kernels.layers.nf4_linear import NF4Linear, four_bit_layers
from loramux_server.kernels.layers.operations import compiled_ops
from loramux_server.kernels.layers.packed_head import PackedHead
from loramux_server.kernels.layers.rotary import turns_neighbours

_LIBRARIES = ("torch", "bitsandbytes", "transformers")
_KERNELS = 4  # goes up whenever one of our own kernels gives other bits than before
_CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")  # what PyTorch's kernels choose their path by
_ACCUMULATE = 3  # place of this argument of index_put
# operations whose floats are the same on every processor: they move numbers, or round each once as IEEE 754 says
_EXACT = frozenset(
    "_to_copy alias as_strided cat clone copy detach embedding expand gather index index_select lift_fresh narrow "
    "permute repeat reshape select slice split split_with_sizes squeeze stack t transpose unbind unsafe_split "
    "_unsafe_view unsqueeze view chunk constant_pad_nd contiguous empty empty_like empty_strided full full_like "
    "new_empty new_zeros ones ones_like scalar_tensor zero zeros zeros_like fill masked_fill where to abs add "
    "clamp clamp_max clamp_min div maximum minimum mul neg relu sub index_put sort view_as_complex view_as_real".split()
)


def products_of(model: nn.Module, device: Device) -> str:
    """How the linear layers of a base are computed."""
    if not device.is_host:
        found = Counter(kind for module in model.modules() if (kind := getattr(module, "products", "")))
        found.update(["NF4 bitsandbytes CUDA"] * len(four_bit_layers(model)))
        return ", ".join(sorted(found)) or "16 bit"
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    layers += [layer for _, layer in four_bit_layers(model)]
    names = Counter("NF4 native" if isinstance(layer, NF4Linear) else "NF4 dequantize" for layer in layers)
    if len(names) > 1:
        return ", ".join(f"{name} ({count} layers)" for name, count in sorted(names.items()))
    products = next(iter(names), "16 bit in fp32")
    packed = any(isinstance(module, PackedHead) for module in model.modules())
    return f"{products}, head native" if packed else products


def kernel_paths(model: nn.Module, device: Device) -> str:
    """How the layers of this model are computed on this machine, for the start-up report and the numerics id."""
    return f"{products_of(model, device)}; compiled {compiled_ops(model)}"


def numerics_id(model: nn.Module, device: Device, kernels: Kernels, step: WholeStep | None) -> str:
    """What decides the bits of a reply besides base and adapter: versions, kernel paths, and the kind of device.

    Compiled kernels give the same bits on every processor, so a processor is named only where PyTorch or bitsandbytes
    computes.

    Args:
        model: the base, as it was laid out for these kernels. No adapters are set.
        step: what runs it whole, where all is ours but for what it says; None: its modules are tried here.
    """
    versions = " ".join([*(f"{name} {metadata.version(name)}" for name in _LIBRARIES), f"kernels {_KERNELS}"])
    if not device.is_host:
        kind = device.name
    elif kernels.lora == kernels.attention == "native" and (step is not None or not library_operations(model)):
        kind = "any cpu"
    else:
        found = torch.cpu.get_capabilities()
        kind = "cpu " + "+".join([str(found.get("architecture", "")), *(f for f in _CPU_FEATURES if found.get(f))])
    paths = f"{kernel_paths(model, device)}; attention {kernels.attention}; LoRA {kernels.lora}"
    if step is not None and not device.is_host:  # there it has other bits than the modules
        paths = f"{products_of(model, device)}; whole step in Triton {metadata.version('triton')}"
        if step.replaced:  # other cards of this name may do without: another driver, another compiler
            paths += f", but {', '.join(step.replaced)} by PyTorch"
    if turns_neighbours(model):  # such bases had other bits when kernels 4 began, and wrong ones
        paths += "; neighbours turned"
    return f"{versions}; {paths}; {kind}"


@torch.no_grad()
def library_operations(model: Any) -> list[str]:
    """Operations of libraries in a forward of the modules on the CPU, whose last bits may differ with the processor.

    They are seen in a forward of two tokens, whatever code asks for them: "addmm", "native_layer_norm", "tanh". What
    our kernels compute is no operation of PyTorch's.
    """
    two = torch.zeros(2, dtype=torch.int32)
    step = AttentionStep(KVCache(KVShape(0, 1, 2), 0, CpuDevice()), _nothing, two[None], two, two, ((0, 0, 2, 0),))
    use_our_attention(model)
    with _Watch() as watch:
        model(
            input_ids=two[None].long(),
            position_ids=torch.arange(2)[None],
            logits_to_keep=torch.tensor([0, 1]),
            use_cache=False,
            loramux_step=step,
        )
    return sorted(watch.seen - _EXACT)


def _nothing(q: torch.Tensor, *others: object) -> torch.Tensor:
    return torch.zeros_like(q)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that give floats.

    Attributes:
        seen: their names; a sum with a factor, which may be rounded once or twice, is "add with a factor".
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        if any(isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in tree_leaves(result)):
            name = func.overloadpacket.__name__.removesuffix("_")
            if name == "index_put" and (given.get("accumulate") or len(args) > _ACCUMULATE and args[_ACCUMULATE]):
                name = "index_put that adds"
            self.seen.add(name if given.get("alpha", 1) == 1 else f"{name} with a factor")
        return result
