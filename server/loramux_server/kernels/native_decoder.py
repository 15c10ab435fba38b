"""A whole step on the compiled CPU kernels in one call (csrc/decoder.cpp), for models of Llama's shape.

transformers' code around our kernels takes 10 ms of every step on two cores and gives up the interpreter lock 1,500
times; here both are next to nothing, so other threads (uploads, HTTP) and the engine hardly notice each other. A model
is run this way only if, tried at start, every logit has the bits that its modules give; others keep their modules.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from loramux_adapters.lora.ops import LoraRows
from loramux_server.kernels.abi import DecoderLayer, DecoderModel, DecoderStep
from loramux_server.kernels.adapter_kernels import rows_of
from loramux_server.kernels.attention import Attend, AttentionParams, AttentionStep
from loramux_server.kernels.decoder_weights import (
    NotOfThisShape,
    base_layer_of,
    dense,
    layer_of,
    lora_arena_of,
    norm_of,
    parts_of,
    pointers_to,
)
from loramux_server.kernels.kv_cache import BLOCK_SIZE, KVCache, KVShape
from loramux_server.kernels.native import NativeLibrary

_TRIAL = (2 * BLOCK_SIZE + 5, 3, 1)  # tokens of the sequences that a model is tried on


class NativeDecoder:
    """Runs steps of one model. Owner: the engine thread.

    The model's weights and the arenas of its adapters are read where they lie; they must outlive this object.
    """

    def __init__(self, library: NativeLibrary, model: Any, cache_shape: KVShape, layers: list[AttentionParams]) -> None:
        """`layers`: what each layer asks of its attention.

        Raises:
            NotOfThisShape: the model cannot be run this way.
        """
        body, head = parts_of(model)
        linear = base_layer_of(head)
        self._step = library.function("loramux_decoder_step")
        self._layers = (DecoderLayer * len(layers))(*map(layer_of, body.layers, layers))
        self._rotary = body.rotary_emb
        self._cos = self._sin = torch.empty(0)
        self.vocabulary = linear.out_features
        hidden = linear.in_features
        dim = cache_shape.head_dim
        for layer in self._layers:
            if layer.q.outputs % dim or layer.k.outputs != cache_shape.kv_heads * dim or layer.q.inputs != hidden:
                raise NotOfThisShape("a layer's projections do not fit the cache")
        self._model = DecoderModel(
            layers=ctypes.addressof(self._layers),
            embedding=dense(body.embed_tokens.weight),
            head=dense(linear.weight),
            head_arena=lora_arena_of(head),
            norm=norm_of(body.norm),
            num_layers=len(layers),
            hidden=hidden,
            heads=self._layers[0].q.outputs // dim,
            kv_heads=cache_shape.kv_heads,
            head_dim=dim,
            vocabulary=self.vocabulary,
        )
        self._at = ctypes.addressof(self._model)
        self._per_row = int(library.function("loramux_decoder_scratch")(self._at, 1))
        self._scratch = torch.empty(0, dtype=torch.bfloat16)
        self._caches: tuple[KVCache, Any, Any] | None = None

    def forward(
        self, tokens: list[int], heads: list[int], step: AttentionStep, lora: LoraRows | None, head: LoraRows | None
    ) -> torch.Tensor:
        """Logits [len(heads), vocabulary] bf16; keys and values of all rows are in the cache afterwards.

        Args:
            tokens: the token of each row.
            heads: the rows, in order, whose logits are wanted.
            lora, head: adapters of all rows, and of the rows in `heads`.
        """
        rows, threads = len(tokens), torch.get_num_threads()
        if self._scratch.numel() < rows * self._per_row:
            self._scratch = torch.empty(rows * self._per_row, dtype=torch.bfloat16)
        self._know_positions(max(first + count for _, _, count, first in step.runs))
        if self._caches is None or self._caches[0] is not step.cache:
            self._caches = step.cache, pointers_to(step.cache.k), pointers_to(step.cache.v)
        ids, sampled = np.array(tokens, dtype=np.int64), np.array(heads, dtype=np.int64)
        logits = torch.empty(len(heads), self.vocabulary, dtype=torch.bfloat16)
        entries, head_entries = rows_of(lora) if lora else None, rows_of(head) if head else None
        call = DecoderStep(
            tokens=ids.ctypes.data,
            position=step.position.data_ptr(),
            sequence=step.sequence.data_ptr(),
            tables=step.tables.data_ptr(),
            sampled=sampled.ctypes.data,
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
            k_cache=ctypes.addressof(self._caches[1]),
            v_cache=ctypes.addressof(self._caches[2]),
            lora=ctypes.addressof(entries) if entries else None,
            head_lora=ctypes.addressof(head_entries) if head_entries else None,
            scratch=self._scratch.data_ptr(),
            logits=logits.data_ptr(),
            rows=rows,
            samples=len(heads),
            table_width=step.tables.shape[1],
            threads=threads,
        )
        self._step(self._at, ctypes.addressof(call))
        return logits

    def _know_positions(self, count: int) -> None:
        """Angles of positions below `count`, from the model's own code; kept."""
        if len(self._cos) < count:
            positions = torch.arange(1 << (count - 1).bit_length())[None]
            cos, sin = self._rotary(torch.empty(1, dtype=torch.bfloat16), positions)
            self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()
            if self._cos.dtype != torch.bfloat16 or self._cos.shape[1] != self._model.head_dim:
                raise NotOfThisShape("the rotation of its positions is another one")


@torch.inference_mode()
def native_decoder(library: NativeLibrary, attend: Attend, model: Any, cache: KVCache) -> NativeDecoder | None:
    """The compiled step for a model that runs on our attention already; None if it gives other bits than the modules.

    `attend` and the layers' adapters are those that the step itself runs on (choice.py sees to it).

    Tried on sequences of several lengths, with a cache of its own. Adapters are not: the slots hold none yet.
    """
    blocks = [-(-length // BLOCK_SIZE) for length in _TRIAL]
    trial = KVCache(cache.shape, sum(blocks), cache.k[0].device, tiled=cache.tiled)
    seen: dict[int, AttentionParams] = {}

    def record(q: Any, k: Any, v: Any, layer: int, step: AttentionStep, params: AttentionParams) -> torch.Tensor:
        seen[layer] = params
        return attend(q, k, v, layer, step, params)

    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (sum(_TRIAL),), generator=generator).tolist()
    step = _step_of(trial, record, blocks)
    rows = list(range(len(tokens)))
    try:
        expected = model(
            input_ids=torch.tensor([tokens]),
            position_ids=step.position[None].long(),
            logits_to_keep=torch.tensor(rows),
            use_cache=False,
            loramux_step=step,
        ).logits[0]
        decoder = NativeDecoder(library, model, cache.shape, [seen[layer] for layer in range(cache.shape.layers)])
        got = decoder.forward(tokens, rows, step, None, None)
        last = decoder.forward(tokens, rows[-1:], step, None, None)
    except NotOfThisShape:
        return None
    return decoder if torch.equal(got, expected) and torch.equal(last, expected[-1:]) else None


def _step_of(cache: KVCache, attend: Any, blocks: list[int]) -> AttentionStep:
    """A step that feeds sequences of `_TRIAL` tokens from their beginning."""
    tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
    runs, row, block = [], 0, 0
    for index, (length, count) in enumerate(zip(_TRIAL, blocks, strict=True)):
        tables[index, :count] = torch.arange(block, block + count)
        runs.append((index, row, length, 0))
        row, block = row + length, block + count
    return AttentionStep(
        cache=cache,
        attend=attend,
        tables=tables,
        sequence=torch.repeat_interleave(torch.arange(len(_TRIAL)), torch.tensor(_TRIAL)).int(),
        position=torch.cat([torch.arange(length) for length in _TRIAL]).int(),
        runs=tuple(runs),
    )
