"""Kinds of small decoders, and sequences that are fed to them with adapters, in steps of several rows of each."""

from __future__ import annotations

import numpy as np

from loramux_server.kernels.compiled.abi import VectorIsa
from support.exact_models import TILE, Array, Decoder, Row, Shape

SHAPES = {
    "Llama": Shape(),
    "Llama 3.2": Shape(tied=True),
    "Gemma": Shape(tied=True, gelu=True, embedding_factor=11.3),
    "Qwen2": Shape(bias=True),
    "Qwen3": Shape(qk_norm="head", head_dim=64),
    "Mistral": Shape(window=11),
    "Gemma 2": Shape(post_norms=True, gelu=True, softcap=8.0, logit_softcap=3.0, embedding_factor=11.3),
    "Gemma 3": Shape(post_norms=True, gelu=True, qk_norm="head", window=9, head_dim=96, heads=2, kv_heads=1),
    "Phi-3": Shape(fused=True),
    "Granite": Shape(residual_factor=0.22, logit_divisor=8.0, embedding_factor=12.0),
    "OLMo 2": Shape(pre_norms=False, post_norms=True, qk_norm="whole"),
    "SmolLM3": Shape(rotary=False, heads=9, kv_heads=3, head_dim=64, hidden=192),
    "many heads": Shape(heads=28, kv_heads=2, head_dim=16, hidden=64),
    "long heads": Shape(heads=2, kv_heads=2, head_dim=256, hidden=64),
}
ADAPTERS: list[tuple[tuple[int, int, float], ...]] = [
    (),
    ((0, 8, 1.0),),
    ((8, 16, 0.5),),
    ((0, 8, 1.0), (24, 8, -2.0)),
]


def feed(decoder: Decoder, isa: VectorIsa, sequences: list[list[int]], chunk: int, threads: int = 1) -> list[Array]:
    """Logits of every token of each sequence; `chunk` tokens of each go into a step, all sequences together."""
    width = -(-max(map(len, sequences)) // TILE)
    tables = np.arange(len(sequences) * width, dtype=np.int32).reshape(len(sequences), width)[::-1].copy()
    cache = decoder.cache(len(sequences) * width)
    logits: list[list[Array]] = [[] for _ in sequences]
    for first in range(0, max(map(len, sequences)), chunk):
        rows = [
            Row(token, first + offset, index, ADAPTERS[index % len(ADAPTERS)])
            for index, tokens in enumerate(sequences)
            for offset, token in enumerate(tokens[first : first + chunk])
        ]
        got = decoder.run(isa, cache, rows, list(range(len(rows))), tables, threads)
        for row, its in zip(rows, got, strict=True):
            logits[row.sequence].append(its)
    return [np.stack(each) for each in logits]


def sequences_of(shape: Shape) -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(0, shape.vocabulary, length).tolist() for length in (37, 5, 16, 23, 1)]
