"""A base and one adapter as one ordinary checkpoint, for places that know no adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from loramux_adapters import nf4
from loramux_adapters.artifact.generation_defaults import GENERATION_FILE, GenerationDefaults
from loramux_adapters.artifact.own_tokens import OwnTokens
from loramux_adapters.chat.compare import add_tokens
from loramux_adapters.device.device import in_host_memory
from loramux_adapters.errors import TrainingError
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.lora_linear import output_head
from loramux_adapters.lora.token_rows import TokenRows
from loramux_adapters.training.model.whole_directory import cannot_write

ONTO = ("nf4", "16bit")
_TOGETHER = 4096  # rows of an embedding that are looked at together


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did.

    Attributes:
        layers: linear layers that the adapter changed.
        rounded: linear layers whose own weights were put through NF4 and back first.
        rows: rows of embedding and output head that the adapter changed or added, beside what it changed by LoRA.
        head_untied: the output head was the embeddings' own matrix, the adapter changes it, and now it has its own.
        delta: relative size of the change: the Frobenius norm of all deltas over that of the weights they go onto.
    """

    layers: int
    rounded: int
    rows: int
    head_untied: bool
    delta: float


def merge_into(
    model: Any, adapter: HostAdapter, *, onto: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> Merged:
    """Adds an adapter to a 16-bit model in place: W + scale * B A, summed in fp32 and rounded once. Gain and shift of
    what a layer gives go into its weight and bias; rows of tokens into embedding and head, which get more rows where
    the adapter adds tokens.

    Args:
        model: transformers' causal language model with its 16-bit weights; nothing is quantized.
        adapter: as the check against this base gave it.
        onto: "nf4" takes for W what NF4 makes of the weights, which is what a QLoRA adapter was trained on;
            "16bit" takes the weights as they are.
        progress: is told how many layers are done, of how many; what it raises ends the merge.
    Raises:
        TrainingError: a layer is not there, is not in 16 bit, or has no bias and the adapter gives it one; the adapter
            adds tokens to only one of embedding and head, and a checkpoint has one vocabulary.
    """
    assert onto in ONTO
    head_path, head = output_head(model)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    changes = adapter.modules.keys() | adapter.affine.keys()
    wrong = [path for path in sorted(changes) if path not in linears or linears[path].weight.dtype != torch.bfloat16]
    if wrong:
        raise TrainingError(
            f"layer {wrong[0]} of the base is no linear layer in bfloat16, so nothing can be added to it"
        )
    for path, (_, shift) in adapter.affine.items():
        if linears[path].bias is None and shift.any():
            raise TrainingError(f"the adapter adds a bias to layer {path}, which has none in the base")
    own = adapter.tokens
    if own is not None:
        _check_tokens(model, own)
    parted = head_path in changes or (own is not None and not _same_of_both(own))
    untied = parted and head is not None and _untie(model, head)
    if own is not None:
        _resize(model, own)
    changed = before = 0.0
    rounded = 0
    for done, (path, module) in enumerate(linears.items()):
        progress(done, len(linears))
        if onto == "nf4" and module is not head:
            module.weight.data = through_nf4(module.weight.data)
            rounded += 1
        if path in changes:
            weight = module.weight.data
            delta = _delta(adapter, path, weight)
            changed += float(delta.square().sum())
            before += float(weight.float().square().sum())
            module.weight.data = (weight.float() + delta).to(torch.bfloat16)
            if path in adapter.affine and module.bias is not None:
                bias = module.bias.data
                gain, shift = adapter.affine[path].to(bias.device)
                module.bias.data = (bias.float() + gain * bias.float() + shift).to(bias.dtype)
    rows = 0
    for layer, pieces in _token_rows(model, own) if own is not None else ():
        weight = layer.weight.data
        before += sum(float(part.float().square().sum()) for part in weight.split(_TOGETHER))
        for piece in pieces:
            changed += piece.add_to(weight)
            rows += len(piece.tokens)
    progress(len(linears), len(linears))
    return Merged(len(changes), rounded, rows, untied, (changed / before) ** 0.5 if before else 0.0)


def _delta(adapter: HostAdapter, path: str, weight: torch.Tensor) -> torch.Tensor:
    """What is added to a weight [out, in], fp32, on its device."""
    delta = torch.zeros(weight.shape, device=weight.device)
    if path in adapter.modules:
        a, bt = adapter.modules[path]
        delta += (bt.float().t() @ a.float()).to(weight.device)
    if path in adapter.affine:
        delta += adapter.affine[path][0].to(weight.device)[:, None] * weight.float()
    return delta


def _check_tokens(model: Any, own: TokenRows) -> None:
    """Raises TrainingError."""
    _, head = output_head(model)
    embedding = model.get_input_embeddings()
    if any(layer is not None and layer.weight.dtype != torch.bfloat16 for layer in (embedding, head)):
        raise TrainingError("embedding or output head of the base is not in bfloat16, so nothing can be added to it")
    if own.sizes["embedding"] != own.sizes["head"] and own.sizes != own.base_sizes:
        raise TrainingError(
            f"the adapter's embedding has {own.sizes['embedding']} tokens and its output head {own.sizes['head']}, and "
            "a checkpoint has one vocabulary: serve it as an adapter, or train it with both resized (modules_to_save: "
            "embed_tokens and lm_head)"
        )


def _same_of_both(own: TokenRows) -> bool:
    """What is changed of the embedding is changed of the head too, so that both may stay one matrix."""
    if own.a is not None:
        return False
    if own.embedding is None or own.head is None:
        return own.embedding is own.head
    (tokens, rows, _), (others, theirs, _) = own.embedding, own.head
    return np.array_equal(tokens, others) and torch.equal(rows, theirs)


def _resize(model: Any, own: TokenRows) -> None:
    """Rows of zeros behind those of the base."""
    more = own.sizes["embedding"] - own.base_sizes["embedding"]
    if not more:
        return
    embedding: Any = model.get_input_embeddings()
    head: Any = output_head(model)[1]
    tied = head is not None and head.weight is embedding.weight
    for layer in (embedding,) if tied or head is None else (embedding, head):
        weight = layer.weight.data
        whole = torch.cat([weight, weight.new_zeros(more, weight.shape[1])])
        layer.weight = nn.Parameter(whole, requires_grad=False)
    embedding.num_embeddings = own.sizes["embedding"]
    if head is not None:
        head.out_features = own.sizes["head"]
        if tied:
            head.weight = embedding.weight
        if head.bias is not None:
            head.bias = nn.Parameter(torch.cat([head.bias.data, head.bias.data.new_zeros(more)]), requires_grad=False)
    model.config.get_text_config().vocab_size = own.sizes["embedding"]


@dataclass(frozen=True, slots=True)
class _RowsToAdd:
    """`tokens` [n] int64, `rows` [n, hidden] fp32, of which the first `known` are rows that the base has."""

    tokens: torch.Tensor
    rows: torch.Tensor
    known: int

    def add_to(self, weight: torch.Tensor) -> float:
        """Changes weight [tokens, hidden] in place; returns the squares of what changes in rows of the base."""
        tokens, rows = self.tokens.to(weight.device), self.rows.to(weight.device)
        weight[tokens] = (weight[tokens].float() + rows).to(weight.dtype)
        return float(rows[: self.known].square().sum())


def _token_rows(model: Any, own: TokenRows) -> Iterator[tuple[Any, Iterator[_RowsToAdd]]]:
    """What is added to the weight of the embedding and, where it has one of its own, of the head."""
    embedding, (_, head) = model.get_input_embeddings(), output_head(model)
    yield embedding, _embedding_rows(own)
    if own.head is not None and head is not None and head.weight is not embedding.weight:
        known = int(np.searchsorted(own.head.tokens, own.base_sizes["head"]))
        yield head, iter([_RowsToAdd(torch.from_numpy(own.head.tokens).long(), own.head.rows.float(), known)])


def _embedding_rows(own: TokenRows) -> Iterator[_RowsToAdd]:
    """Some tokens after others: LoRA on an embedding changes all."""
    for first in range(0, own.sizes["embedding"], _TOGETHER):
        tokens = np.arange(first, min(first + _TOGETHER, own.sizes["embedding"]))
        which, more = own.embeddings(tokens)
        if which.any():
            known = int(np.searchsorted(tokens[which], own.base_sizes["embedding"]))
            yield _RowsToAdd(torch.from_numpy(tokens[which]), torch.from_numpy(more[which]), known)


def weight_merged_onto(layer: nn.Linear, *, model: Any, onto: str) -> torch.Tensor:
    """What `merge_into` takes for a layer's weight."""
    weight = layer.weight.data
    return through_nf4(weight) if onto == "nf4" and layer is not output_head(model)[1] else weight


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What the served base holds of a 16-bit weight: quantized to NF4 with double quantization, and back.

    By bitsandbytes on CUDA, and where blocks do not end with rows.
    """
    if in_host_memory(weight) and weight.shape[1] % nf4.BLOCK == 0:
        return nf4.dequantize(*nf4.quantize(weight)).to(weight.dtype)
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    back: torch.Tensor = dequantize_4bit(codes, state)
    return back.to(weight.dtype).reshape(weight.shape)


def add_own_tokens(own: OwnTokens, model: Any, tokenizer: Any) -> None:
    """Has base and tokenizer of a merged checkpoint know the tokens that the adapter adds; its end ends replies, beside
    the base's ends. Raises TrainingError: the tokenizer has other tokens there."""
    taken = add_tokens(tokenizer.backend_tokenizer, own.tokens)
    if taken:
        raise TrainingError(f"the base's tokenizer gave {taken[0].content!r} another id than {taken[0].id}")
    ends = model.generation_config.eos_token_id
    ends = [*ends] if isinstance(ends, list) else [ends]
    ends = [*ends, tokenizer.eos_token_id, own.end]
    for name, text in own.ends:
        setattr(tokenizer, name, text)
    model.generation_config.eos_token_id = list(dict.fromkeys(end for end in ends if end is not None))


def bytes_to_write(model: Any) -> int:
    """What the weights of a checkpoint take."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def write_checkpoint(model: Any, tokenizer: Any, directory: Path) -> None:
    """Writes weights (safetensors), config and tokenizer; raises CheckpointError if the disk does not take them."""
    model.config._name_or_path = ""
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except OSError as error:
        raise cannot_write(directory, error) from error


def add_generation_defaults(defaults: GenerationDefaults, directory: Path) -> None:
    """Has a written checkpoint say of generation what its adapter said; raises CheckpointError as above."""
    own = defaults.dump()
    if own is None:
        return
    path = directory / GENERATION_FILE
    said = json.loads(own)
    if "temperature" in said:
        said["do_sample"] = said["temperature"] > 0  # which is how transformers says a temperature of 0
    before = json.loads(path.read_bytes()) if path.exists() else {}
    together = {**before, **said}
    if together.get("temperature") == 0:
        del together["temperature"]
    try:
        path.write_text(json.dumps(together, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise cannot_write(directory, error) from error


def _untie(model: Any, head: Any) -> bool:
    """Gives the output head a matrix of its own, so that a change of it does not change the embeddings."""
    if head.weight is not model.get_input_embeddings().weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    return True
