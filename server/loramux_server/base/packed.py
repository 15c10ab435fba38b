"""The base as its kernels read it: packed once, layer by layer, then one file that later starts read.

It holds every number that a start needs: codes, scales and biases of NF4 layers, what stays as it is (embeddings,
norms, buffers, layers that a checkpoint quantized before left in 16 bits), and for compiled kernels the output head's
whole numbers, which a tied embedding is read from. The same checkpoint gives the same bytes on every processor. With
it the checkpoint is not read again, and nothing is quantized.

No more than one layer is held in 16 bits at a time, in host memory or on the device: weights lie in mapped files until
they are laid out (kernels/layers/nf4_layout.py).
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loramux_adapters.device.device import Device
from loramux_adapters.lora.lora_linear import output_head
from loramux_server.base.cache_directory import partial_directory
from loramux_server.base.checkpoint import Weights
from loramux_server.base.packed_file import (
    DeviceTensors,
    HostTensors,
    Places,
    Tensors,
    Unusable,
    places_of,
    read,
    size_of,
    write,
)
from loramux_server.base.source import Report
from loramux_server.errors import BaseModelError
from loramux_server.kernels.layers.mixture import SharedGate
from loramux_server.kernels.layers.nf4_layout import SCALES, WEIGHT, Nf4Layout, Nf4Numbers, Shapes
from loramux_server.kernels.layers.packed_embedding import PackedEmbedding, factor_of, put, tied_embedding
from loramux_server.kernels.layers.packed_head import PackedHead, head_fits, head_shapes

QUANTIZING = "loading and quantizing the base to NF4"
_TOLD_SECONDS = 5.0  # between two lines on how far quantizing is


@dataclass(frozen=True, slots=True)
class Packing:
    """How the NF4 layers of a base are laid out, and on which device."""

    layout: Nf4Layout
    device: Device

    def reserve(self, places: Places) -> Tensors:
        """Memory for tensors at these places. Raises DeviceFull."""
        return HostTensors(places) if self.layout.compiled is not None else DeviceTensors(places, self.device)


class _Group:
    """Layers that lie in the same tensors, under the name of the first."""

    def __init__(self, paths: tuple[str, ...], linears: Mapping[str, nn.Linear]) -> None:
        self.layers = {path: linears[path] for path in paths}
        self.names = {each: f"{paths[0]}.{each}" for each in (WEIGHT, SCALES)}

    def first(self, path: str) -> int:
        """The column of a layer's first output."""
        column = 0
        for each, layer in self.layers.items():
            if each == path:
                break
            column += layer.out_features
        return column

    def held(self, take: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        return {each: take(name) for each, name in self.names.items()}


def packable(skeleton: nn.Module, layout: Nf4Layout) -> bool:
    """Whether every layer of this model, which is on the meta device, can be kept in this layout."""
    linears = _linears(skeleton)
    loose = any(isinstance(each, torch.Tensor) for module in skeleton.modules() for each in vars(module).values())
    return bool(linears) and all(layout.fits(each) for each in linears.values()) and not loose


def packed_once(
    cache_dir: Path,
    base_id: str,
    skeleton: nn.Module,
    packing: Packing,
    report: Report,
    *,
    load: Callable[[], contextlib.AbstractContextManager[Weights]],
) -> nn.Module:
    """The skeleton with layers and weights: from the cache if they are there and right, else packed and kept there.

    Args:
        skeleton: the model on the meta device; it is `packable`.
        load: opens the checkpoint.
    Raises:
        BaseModelError: the checkpoint is not what this model is made of.
        DeviceFull: there is no room for it.
    """
    layout = packing.layout
    library = metadata.version("transformers")  # names of layers and numbers in buffers are its
    file = cache_dir / layout.folder / f"{base_id[:16]}-form-{layout.form}-transformers-{library}"
    if file.is_file():
        report(f"reading the base as it was packed before ({file.stat().st_size / 2**20:,.0f} MiB)")
        try:
            return assembled(skeleton, read(file, layout.form, base_id, packing.reserve), layout)
        except (Unusable, OSError) as error:
            report(f"what was kept in {file} cannot be used ({error}): it is packed again")
            with contextlib.suppress(OSError):  # of a cache that can only be read
                file.unlink()
    with load() as weights:
        report("loading the base, which was quantized before" if weights.quantized else QUANTIZING)
        tensors = packed(skeleton, weights, packing, report)
    report(f"keeping it for the next start ({size_of(tensors.places) / 2**20:,.0f} MiB)")
    try:
        _keep(file, layout.form, base_id, tensors)
    except Exception as error:  # the server runs without it
        report(f"the packed base could not be kept for the next start: {error}")
    return assembled(skeleton, tensors, layout)


@torch.no_grad()
def packed(skeleton: nn.Module, weights: Weights, packing: Packing, report: Report) -> Tensors:
    """The tensors of a model as its kernels read them.

    Args:
        skeleton: the model on the meta device. It is changed in place: its buffers have their numbers afterwards, and
            weights that its config ties are two where the checkpoint holds two that differ, as transformers has it.
    Raises:
        BaseModelError, DeviceFull.
    """
    layout = packing.layout
    _untie(skeleton, weights)
    _fill_buffers(skeleton, weights)
    names = _names(skeleton)
    head_path, head = output_head(skeleton)
    linears = {path: each for path, each in _linears(skeleton).items() if not _left_dense(path, names, weights)}
    if left := len(_linears(skeleton)) - len(linears):
        report(f"{left} of its layers were left in 16 bits, so steps run module by module and take longer")
    of_layers = {id(layer.weight) for layer in linears.values()}
    shapes: Shapes = {}
    groups = [_Group(paths, linears) for paths in layout.together(linears)]
    for group in groups:
        for part, shape in layout.shapes(list(group.layers.values())).items():
            shapes[group.names[part]] = shape
    whole_head = None
    if layout.compiled is not None and isinstance(head, nn.Linear):
        filled = _with_weight(head, _dense(names, weights, head.weight))
        whole_head = filled if head_fits(filled) else None
    if whole_head is not None:
        its = zip(("numbers", "scales"), (torch.uint8, torch.float32), head_shapes(whole_head), strict=True)
        shapes |= {f"{head_path}.{each}": (dtype, shape) for each, dtype, shape in its}
        if _only_head_reads(skeleton, whole_head):
            of_layers.add(id(head.weight) if head is not None else 0)
    parameters = {name: each for name, each in skeleton.named_parameters() if id(each) not in of_layers}
    buffers = dict(skeleton.named_buffers(remove_duplicate=False))
    kept: dict[str, torch.Tensor] = parameters | buffers
    tensors = packing.reserve(
        places_of(shapes | {name: (each.dtype, tuple(each.shape)) for name, each in kept.items()})
    )
    told, done = time.monotonic(), 0
    for group in groups:
        held = group.held(tensors.__getitem__)
        for path, layer in group.layers.items():
            if time.monotonic() - told > _TOLD_SECONDS:
                report(f"laid out {done} of {len(linears)} layers so far")
                told = time.monotonic()
            source: torch.Tensor | Nf4Numbers | None = weights.nf4(f"{path}.weight")
            if source is None:
                source = _dense(names, weights, layer.weight)
            _check_shape(f"{path}.weight", source, layer.weight)
            layout.fill(held, group.first(path), source, tensors.upload)
            done += 1
    if whole_head is not None and layout.compiled is not None:
        to = tensors[f"{head_path}.numbers"], tensors[f"{head_path}.scales"]
        PackedHead.fill(*to, whole_head.weight, layout.compiled)
    for name, parameter in parameters.items():
        tensors.put(name, _dense(names, weights, parameter))
    for name, buffer in buffers.items():
        tensors.put(name, buffer)
    return tensors


def assembled(skeleton: nn.Module, tensors: Tensors, layout: Nf4Layout) -> nn.Module:
    """The skeleton, changed in place: its layers are the kernels' own, and its weights these tensors.

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

    def kept_dense(path: str) -> bool:
        place = tensors.places.get(f"{path}.weight")
        return place is not None and place.dtype.is_floating_point

    head_path, head = output_head(skeleton)
    tied = tied_embedding(skeleton)
    reads_head = tied is not None and f"{head_path}.numbers" in tensors and first[id(tied.weight)] not in tensors
    linears = {path: each for path, each in _linears(skeleton).items() if not kept_dense(path)}
    groups = {path: group for paths in layout.together(linears) for group in [_Group(paths, linears)] for path in paths}
    replaced: list[tuple[str, nn.Module]] = []
    filled: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for path, module in skeleton.named_modules():
        under = f"{path}." if path else ""
        if path in groups:
            layer: Any = module
            bias = None if layer.bias is None else parameter(f"{under}bias", layer.bias).data
            replaced.append((path, layout.layer(groups[path].held(take), groups[path].first(path), layer, bias)))
            continue
        if module is head and f"{head_path}.numbers" in tensors and layout.compiled is not None:
            layer = module
            numbers, scales = take(f"{under}numbers"), take(f"{under}scales")
            replaced.append((path, PackedHead(numbers, scales, layer.out_features, layout.compiled)))
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
    for path, module in replaced:
        skeleton.set_submodule(path, module)
    new_head = skeleton.get_submodule(head_path) if head_path else None
    if reads_head and tied is not None and isinstance(new_head, PackedHead):
        put(skeleton, tied, PackedEmbedding(new_head, float(getattr(tied, "embed_scale", 1.0))))
    return skeleton.eval()


def missing_names(skeleton: nn.Module, weights: Weights) -> list[str]:
    """Parameters of a model that the checkpoint does not hold, under any of the names that are one weight, and buffers
    that transformers would write into one."""
    missing = [names[0] for names in _names(skeleton).values() if not any(weights.holds(name) for name in names)]
    for path, module in skeleton.named_modules():
        kept = [name for name, each in module._buffers.items() if each is not None]
        names = [f"{path}.{name}" if path else name for name in kept if name not in module._non_persistent_buffers_set]
        missing += [name for name in names if not weights.holds(name)]
    return sorted(missing)


def _linears(skeleton: nn.Module) -> dict[str, nn.Linear]:
    """Path -> layer of all but the output head, and what is kept in 16 bits."""
    head = output_head(skeleton)[1]
    return {
        path: module
        for path, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, SharedGate) and module is not head
    }


def _names(skeleton: nn.Module) -> dict[int, list[str]]:
    """Identity of a parameter -> all its names, the first one first."""
    names: dict[int, list[str]] = {}
    for name, each in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(each), []).append(name)
    return names


def _dense(names: Mapping[int, list[str]], weights: Weights, parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's numbers, as the checkpoint holds them, under any of its names."""
    its = names[id(parameter)]
    name = next((each for each in its if weights.holds(each)), None)
    if name is None:
        raise BaseModelError(f"the base's checkpoint holds no {' or '.join(its)}")
    found = weights.dense(name)
    if not found.is_floating_point():
        raise BaseModelError(f"the base's {name} is in {found.dtype}, and nothing beside it says how it was quantized")
    _check_shape(name, found, parameter)
    return found


def _check_shape(name: str, found: torch.Tensor | Nf4Numbers, asked: torch.Tensor) -> None:
    if tuple(found.shape) != tuple(asked.shape):
        its, wanted = (" x ".join(map(str, each.shape)) for each in (found, asked))
        raise BaseModelError(f"the base's {name} is {its} numbers, and its config asks for {wanted}")


def _left_dense(path: str, names: Mapping[int, list[str]], weights: Weights) -> bool:
    """Whether a checkpoint that was quantized before left this layer out."""
    return weights.quantized and not weights.quantizes(f"{path}.weight")


def _untie(skeleton: nn.Module, weights: Weights) -> None:
    for its in _names(skeleton).values():
        there = [name for name in its if weights.holds(name)]
        for name in there[1:]:
            if not torch.equal(weights.dense(there[0]), weights.dense(name)):
                path, _, attribute = name.rpartition(".")
                its_own = torch.empty_like(skeleton.get_parameter(name))
                skeleton.get_submodule(path).register_parameter(attribute, nn.Parameter(its_own, requires_grad=False))


def _fill_buffers(skeleton: Any, weights: Weights) -> None:
    """Gives buffers their numbers, in host memory: the checkpoint's, or those that transformers begins with."""
    for path, module in skeleton.named_modules():
        own = {name: each for name, each in module._buffers.items() if each is not None and each.is_meta}
        if not own:
            continue
        for name, each in own.items():
            module._buffers[name] = torch.full(each.shape, _unknown(each.dtype), dtype=each.dtype)
        skeleton._init_weights(module)
        for name in own:
            full = f"{path}.{name}" if path else name
            if weights.holds(full):
                module._buffers[name].copy_(weights.dense(full))
            elif _is_unknown(module._buffers[name]):
                raise BaseModelError(f"the base's checkpoint holds no {full}, and transformers does not make it")


def _unknown(dtype: torch.dtype) -> float:
    """What stands in a buffer that nobody gave numbers yet."""
    if dtype.is_floating_point:
        return torch.nan
    return 0 if dtype == torch.bool else torch.iinfo(dtype).min


def _is_unknown(buffer: torch.Tensor) -> bool:
    """Whether some of its numbers were given by nobody, or may have been."""
    if buffer.is_floating_point():
        return bool(buffer.isnan().any())
    return buffer.dtype == torch.bool or bool((buffer == torch.iinfo(buffer.dtype).min).any())


def _only_head_reads(skeleton: nn.Module, head: nn.Linear) -> bool:
    """Whether nothing else needs the weight of a head that is kept in whole numbers: an embedding reads these too."""
    tied = tied_embedding(skeleton)
    return tied is None or factor_of(_with_weight(tied, head.weight)) is not None


def _with_weight(module: nn.Module, weight: torch.Tensor) -> Any:
    copied = copy.copy(module)
    weight = weight.to(torch.bfloat16).contiguous()
    copied.__dict__["_parameters"] = module._parameters | {"weight": nn.Parameter(weight, requires_grad=False)}
    return copied


def _keep(file: Path, form: int, base_id: str, tensors: Tensors) -> None:
    """Writes it, and removes what other versions left of the same base."""
    with partial_directory(file) as partial:
        whole = partial / "base"
        with whole.open("wb") as opened:
            write(opened, form, base_id, tensors)
        for other in file.parent.glob(f"{base_id[:16]}-*"):
            other.unlink()
        whole.rename(file)
