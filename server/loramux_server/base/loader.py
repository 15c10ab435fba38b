"""Loads the base model: the one loader for serving, training and evaluation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from loramux_adapters.base_info import BaseInfo
from loramux_adapters.chat.encoder import TextEncoder
from loramux_adapters.chat.tokenizer_files import TokenizerFiles
from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import Device, in_host_memory
from loramux_adapters.errors import AdapterRejected, DeviceFull
from loramux_adapters.lora.affine import BaseWeights
from loramux_adapters.lora.lora_linear import output_head
from loramux_server.base.architecture.checkpoint_names import CheckpointNames
from loramux_server.base.architecture.experts import has_experts, put_expert, split_experts
from loramux_server.base.architecture.language_part import LanguagePart, language_part_of
from loramux_server.base.architecture.transformers_model import first_line, read_model
from loramux_server.base.checkpoint import CheckpointWeights, ModelWeights, Weights
from loramux_server.base.identity import cached_base_id
from loramux_server.base.originals import original_tensor
from loramux_server.base.packed import Packing, missing_names, packable, packed_once
from loramux_server.base.quantized import quantization_constants, quantized_once
from loramux_server.base.source import BaseSource, Report, resolve_base
from loramux_server.base.support import is_quantized, refuse_to_train, unsupported_config, unsupported_modules
from loramux_server.errors import BaseModelError
from loramux_server.kernels.choice import Kernels, choose_kernels, why_not_compiled
from loramux_server.kernels.compiled.library import native_library
from loramux_server.kernels.layers.fp32 import DequantizedNF4, dequantized, keep_unpacked
from loramux_server.kernels.layers.nf4_layout import CompiledLayout
from loramux_server.kernels.layers.nf4_linear import BLOCK, NF4Linear
from loramux_server.kernels.layers.packed_embedding import PackedEmbedding
from loramux_server.kernels.layers.packed_head import PackedHead
from loramux_server.kernels.layers.served_weights import ServedWeights


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The resident base.

    Attributes:
        model: transformers' causal language model, in eval mode.
        kernels: what it was laid out for; `choose_kernels` of their name and the cache's shape goes with them.
        linears: module path -> (in_features, out_features) of every linear layer, output head included.
        floats: name -> tensor of the weights that lie as they were loaded (norms, embeddings, a head in 16 bit).
        packed: name -> shape of the head's weight where it lies in whole numbers, and of an embedding that reads it.
        bytes_16bit: what all weights take in 16 bit.
        names: where the checkpoint has its parameters.
        weights: its linear layers as adapters that need them are given them; None: they are given none.
        stages: (what, seconds) of each part of loading.
    """

    model: nn.Module
    tokenizer: Any
    config: Any
    base_id: str
    name: str
    source: BaseSource
    device: Device
    kernels: Kernels
    linears: Mapping[str, tuple[int, int]]
    floats: Mapping[str, torch.Tensor]
    packed: Mapping[str, tuple[int, int]]
    bytes_16bit: int
    names: CheckpointNames
    weights: BaseWeights | None = None
    stages: list[tuple[str, float]] = field(default_factory=list)

    def info(self, encoder: TextEncoder | None = None) -> BaseInfo:
        """The base as the adapter package sees it. `encoder`: of its tokenizer, where there is one already."""

        def tensor_equals(theirs: str, tensor: torch.Tensor) -> bool:
            name = self.module_of(theirs) or theirs
            held = self._original(name, tensor.shape) if name in self.packed else self.floats.get(name)
            if held is None or held.shape != tensor.shape:
                return False
            return bool(torch.equal(held.float().cpu(), tensor.float()))

        files = TokenizerFiles(self.tokenizer, self.source.directory, encoder)
        return BaseInfo(
            base_id=self.base_id,
            linears=dict(self.linears),
            tensor_equals=tensor_equals,
            convert=self.kernels.convert,
            own_text=files.own_text,
            module_of=self.module_of,
            weights=self.weights,
        )

    def module_of(self, path: str) -> str | None:
        """The module of the model that an adapter calls `path`; None where that is of a part which is not loaded."""
        return self.names.module_of(path)

    def _original(self, name: str, shape: torch.Size) -> torch.Tensor | None:
        """A packed weight as the checkpoint holds it, in bf16; None if its shape cannot be this one.

        Raises:
            AdapterRejected: the checkpoint does not give it; this is about a copy of it in an adapter.
        """
        if tuple(shape) != self.packed[name]:
            return None
        tied = [name, *(other for other in self.packed if other != name)]  # one weight under two names
        names = [each for other in tied for each in self.names.whole_tensors(other)]
        body = f"{getattr(self.model, 'base_model_prefix', '')}."
        try:
            held = original_tensor(self.source.directory, [*names, *(each.removeprefix(body) for each in names)])
        except BaseModelError as error:
            raise AdapterRejected(
                [f"it brings a copy of the base's {name}, which cannot be compared: {error}; leave the copy out"]
            ) from error
        return held.to(torch.bfloat16)

    @property
    def context_length(self) -> int:
        """Most tokens that the model was built for."""
        return int(getattr(self.config, "max_position_embeddings", 0) or 1 << 20)

    @property
    def vocabulary(self) -> int:
        """As `vocabulary_of` has it."""
        return vocabulary_of(self.model)


def quantization_recipe(config: Any, quantize: str = "nf4") -> dict[str, Any]:
    """The recipe as it enters the base id."""
    if quantize == "none":
        return {"type": "none", "dtype": "bfloat16", "model_type": config.model_type}
    if is_quantized(config):  # the tensors of the checkpoint say all of how
        return {"type": "nf4", "block": BLOCK, "quantized": "before", "model_type": config.model_type}
    return {
        "type": "nf4",
        "block": BLOCK,
        "double_quantization": True,
        "kept": ["lm_head"],
        "dtype": "bfloat16",
        "model_type": config.model_type,
    }


def vocabulary_of(model: Any) -> int:
    """Token ids that have an embedding are below it. Raises BaseModelError if there are none."""
    size = int(model.get_input_embeddings().num_embeddings)
    if size < 1:
        raise BaseModelError("the base has no token embeddings")
    return size


def load_base_model(
    spec: str | BaseSource,
    *,
    device: Device,
    cache_dir: Path,
    report: Report,
    quantize: str = "nf4",
    training: bool = False,
    exact: bool = False,
    kernels: Kernels | None = None,
    vectors: bool = True,
) -> BaseModel:
    """The base in NF4 with double quantization, ready to run. Quantized once, then kept in the cache.

    For the compiled CPU kernels, and for those in Triton, it is kept as these read it (base/packed.py), to be served
    and to be trained alike; for other kernels as bitsandbytes quantizes it (base/quantized.py). A checkpoint that
    bitsandbytes quantized before keeps its numbers, whatever runs on them.

    Args:
        spec: embedded name, checkpoint directory, .gguf file or hub id; or what was found for one of them.
        report: receives one line for each slow stage.
        quantize: "nf4", or "none" for the 16-bit weights as they are, to compare with.
        training: give its modules no forward of the kernels between the layers, which have no backward.
        exact: as what serves it is compared with, on the CPU: every number of its weights as it is, computed with in
            fp32 by transformers' own code on the slow reference's kernels. The NF4 weights are those that are kept.
        kernels: what it is to run on; the device's own if None, and not asked for if `exact`.
        vectors: slots on a card are to have room for gain and shift, so that adapters may have some; a CPU's always do.
    Raises:
        BaseModelError: it cannot be found, read or served correctly.
    """
    transformers_logging.disable_progress_bar()  # `report` tells what is slow; bars would break its lines
    kernels = choose_kernels(device, "reference") if exact else kernels or choose_kernels(device)
    if not exact:
        for line in why_not_compiled(kernels, device):  # before what takes long because of it
            report(line)
    stages: list[tuple[str, float]] = []
    source = (
        spec
        if isinstance(spec, BaseSource)
        else _timed(stages, "find the base", lambda: resolve_base(spec, cache_dir, report))
    )
    config, skeleton = _timed(stages, "architecture", lambda: skeleton_of(source))
    recipe = quantization_recipe(config, quantize)
    base_id = _timed(stages, "base id", lambda: cached_base_id(source.directory, recipe, cache_dir, report))
    if quantize == "none" and is_quantized(config):
        raise BaseModelError(
            f"base {source.name} was quantized to NF4 before and has no 16-bit weights: name the checkpoint that it "
            "was made of"
        )
    library = native_library() if exact else None
    part = language_part_of(config)
    layout = CompiledLayout(library.best) if library else kernels.layout
    if quantize != "nf4" or layout is None or not packable(skeleton, layout):
        layout = None
    if training:
        refuse_to_train(source.name, config)
    if layout is None and quantize == "nf4" and has_experts(skeleton):
        raise BaseModelError(
            f"base {source.name} is a mixture of experts, and these need kernels of our own, and layers of a multiple "
            f"of 64 numbers to a multiple of 32: {'; '.join(why_not_compiled(kernels, device)) or kernels.name}"
        )
    if layout is not None:
        load: Any = _dense if exact else _packed
        packing = Packing(layout, device)
        model = _timed(stages, "weights", lambda: load(config, skeleton, source, base_id, packing, cache_dir, report))
    elif quantize == "none":
        report("loading the base in 16 bit")
        model = _timed(stages, "weights", lambda: _load(source.directory, device, part))
    elif is_quantized(config):
        report("loading the base, which was quantized before")
        model = _timed(stages, "weights", lambda: _load_quantized(config, skeleton, source, device))
    else:
        model = _timed(stages, "weights", lambda: _load_nf4(source.directory, device, part, base_id, cache_dir, report))
        _check_quantized(model, source.name)
    keep_unpacked(model)
    if not training:
        with device.used():
            if layout is None or layout.compiled is None:
                _timed(stages, "lay out for the kernels", lambda: kernels.lay_out(model))
            _timed(stages, "compiled operations", lambda: kernels.use_ops(model))
    tokenizer = _timed(stages, "tokenizer", lambda: load_tokenizer(source.directory))
    names = CheckpointNames.of(part, model)
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        config=model.config,
        base_id=base_id,
        name=source.name,
        source=source,
        device=device,
        kernels=kernels,
        linears={
            path: (module.in_features, module.out_features)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear)
        },
        floats=_kept_floats(model),
        packed=_packed_shapes(model),
        bytes_16bit=_bytes_16bit(model),
        names=names,
        weights=ServedWeights(
            model,
            module_of=names.module_of,
            device=device,
            vectors=device.is_host or vectors,
        ),
        stages=stages,
    )


def load_tokenizer(directory: Path) -> Any:
    """transformers' own. Raises BaseModelError: it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"the base's tokenizer cannot be read: {first_line(error)}") from error


def skeleton_of(source: BaseSource) -> tuple[Any, nn.Module]:
    """A base's config, and its model without weights, on the meta device: within a second, whatever its size.

    Of a checkpoint that takes more than text the model is its language part.

    Raises:
        BaseModelError: the config cannot be read, or the base not be served correctly.
    """
    try:
        config = AutoConfig.from_pretrained(source.directory, local_files_only=True, trust_remote_code=False)
    except StrictDataclassError as error:  # transformers' own rules for a config; the cause says which one
        raise BaseModelError(f"the base's config cannot be read: {first_line(error.__cause__ or error)}") from error
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise BaseModelError(f"the base's config cannot be read: {first_line(error)}") from error
    _refuse(source.name, unsupported_config(config))
    try:
        with torch.device("meta"):
            factory: Any = AutoModelForCausalLM
            part = language_part_of(config)
            own = config if part is None else part.config
            model: nn.Module = factory.from_config(own, dtype=torch.bfloat16, trust_remote_code=False)
        split_experts(model)
    except (ValueError, KeyError) as error:
        raise BaseModelError(f"the base is no causal language model that is known here: {first_line(error)}") from error
    _refuse(source.name, unsupported_modules(model))
    return config, model


def _packed(
    config: Any,
    skeleton: nn.Module,
    source: BaseSource,
    base_id: str,
    packing: Packing,
    cache_dir: Path,
    report: Report,
) -> nn.Module:
    try:
        model: Any = packed_once(
            cache_dir,
            base_id,
            skeleton,
            packing,
            report,
            load=lambda: _weights(config, skeleton, source),
        )
        packing.device.synchronize()  # copies to it are done when the base is handed on
    except DeviceFull as error:
        raise BaseModelError(f"the base does not fit into memory ({error}); use a smaller base") from error
    with contextlib.suppress(OSError):  # most checkpoints have none
        model.generation_config = GenerationConfig.from_pretrained(source.directory, local_files_only=True)
    return model  # type: ignore[no-any-return]


@contextlib.contextmanager
def _weights(config: Any, skeleton: Any, source: BaseSource) -> Iterator[Weights]:
    """The checkpoint, tensor by tensor; all of it at once where only transformers knows what its names mean."""
    quantized, part = is_quantized(config), language_part_of(config)
    with _opened(source, skeleton, part, quantized=quantized) as weights:
        missing = missing_names(skeleton, weights)
        if not missing:
            yield weights
            return
    if quantized:
        raise BaseModelError(f"the base's checkpoint holds no {missing[0]}")
    yield ModelWeights(read_model(source.directory, CpuDevice(), part))


def _opened(source: BaseSource, skeleton: Any, part: LanguagePart | None, *, quantized: bool) -> CheckpointWeights:
    names = CheckpointNames.of(part, skeleton).names
    return CheckpointWeights(source.directory, skeleton.base_model_prefix, quantized=quantized, names=names)


def _dense(
    config: Any,
    skeleton: nn.Module,
    source: BaseSource,
    base_id: str,
    packing: Packing,
    cache_dir: Path,
    report: Report,
) -> nn.Module:
    """The 16-bit model with the NF4 weights that are served in it, in fp32."""
    packed = _packed(config, skeleton, source, base_id, packing, cache_dir, report)
    model: nn.Module = read_model(source.directory, CpuDevice(), language_part_of(config))
    for path, layer in list(packed.named_modules()):
        if isinstance(layer, NF4Linear) and not put_expert(model, path, layer.dequantized()):
            model.set_submodule(path, dequantized(layer))
    return model


def _load_quantized(config: Any, skeleton: Any, source: BaseSource, device: Device) -> Any:
    """On bitsandbytes' layers, after all that they are made of was checked."""
    part = language_part_of(config)
    with _opened(source, skeleton, part, quantized=True) as weights:
        for name, each in skeleton.named_parameters():
            numbers = weights.nf4(name)
            if numbers is not None and numbers.shape != tuple(each.shape):
                raise BaseModelError(f"the base's {name} is of shape {numbers.shape}, and not {tuple(each.shape)}")
    return _load(source.directory, device, part)


def _load_nf4(
    directory: Path, device: Device, part: LanguagePart | None, base_id: str, cache_dir: Path, report: Report
) -> Any:
    from transformers import BitsAndBytesConfig

    untyped: Any = BitsAndBytesConfig
    nf4 = untyped(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return quantized_once(
        cache_dir,
        base_id,
        device,
        report,
        read=lambda kept: _load(kept, device, None),  # what is kept holds the language part alone
        quantize=lambda: _load(directory, device, part, quantization_config=nf4),
    )


def _load(directory: Path, device: Device, part: LanguagePart | None, **options: Any) -> Any:
    return _settle(read_model(directory, device, part, **options))


def _settle(model: Any) -> Any:
    """Copies what still points into the mapped checkpoint, so that the file can be unmapped."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if in_host_memory(tensor):
            tensor.data = tensor.data.clone()
    for holder, name, constant in quantization_constants(model):
        if in_host_memory(constant):
            setattr(holder, name, constant.clone())
    return model


def _check_quantized(model: Any, name: str) -> None:
    """What is described as NF4 must be NF4: every linear layer but the output head, with doubly quantized scales."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            state = getattr(module.weight, "quant_state", None)
            if state is None or state.quant_type != "nf4" or not state.nested:
                raise BaseModelError(f"base {name}: layer {path} was not quantized to NF4")


def resident_bytes(model: nn.Module) -> int:
    """Exact bytes of all weights, quantization constants and buffers as they lie in memory; shared ones count once."""
    tensors: dict[int, int] = {}

    def add(tensor: torch.Tensor) -> None:
        if tensor.numel():
            storage = tensor.untyped_storage()
            tensors[storage.data_ptr()] = storage.nbytes()

    for parameter in [*model.parameters(), *model.buffers()]:
        add(parameter)
    for _, _, constant in quantization_constants(model):
        add(constant)
    return sum(tensors.values())


def _bytes_16bit(model: nn.Module) -> int:
    """A quantized layer's weight counts as so many numbers as it stands for; of the others, each parameter once."""
    quantized = {
        id(module.weight): module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.uint8
    }
    layers = {id(each): each.in_features * each.out_features for each in quantized.values()}
    rest = sum(each.numel() for each in model.parameters() if id(each) not in quantized)
    return 2 * (sum(layers.values()) + rest)


def _kept_floats(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every name of every weight that lies as it was loaded; tied weights appear under each of their names."""
    dequantized = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, DequantizedNF4)}
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and parameter.numel()
        and name not in dequantized
    }


def _packed_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    head = output_head(model)[1]
    for path, module in model.named_modules():
        if module is head and isinstance(module, PackedHead):
            shapes[f"{path}.weight"] = module.out_features, module.in_features
        elif isinstance(module, PackedEmbedding):
            shapes[f"{path}.weight"] = module.num_embeddings, module.embedding_dim
    return shapes


def _refuse(name: str, reasons: list[str]) -> None:
    if reasons:
        raise BaseModelError(f"base {name} cannot be served correctly: {'; '.join(reasons)}")


def _timed(stages: list[tuple[str, float]], what: str, work: Any) -> Any:
    start = time.perf_counter()
    result = work()
    stages.append((what, time.perf_counter() - start))
    return result
