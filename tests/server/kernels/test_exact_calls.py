"""Operations called one by one, as a base that runs module by module calls them, have the bits of the whole step."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from loramux_server.kernels.compiled.abi import VectorIsa
from loramux_server.kernels.compiled.library import NativeLibrary, native_library
from support.exact_models import EPS, TILE, Array, Cache, Decoder, Linear, Row, Shape, _entries, at, widened

SHAPES = {
    "Llama": Shape(),
    "Qwen3": Shape(bias=True, qk_norm="head", head_dim=64),
    "Gemma 3": Shape(post_norms=True, gelu=True, qk_norm="head", window=9, softcap=8.0, embedding_factor=11.3),
    "Phi-3": Shape(fused=True),
    "Granite": Shape(residual_factor=0.22, logit_divisor=6.0, embedding_factor=12.0),
    "OLMo 2": Shape(pre_norms=False, post_norms=True, qk_norm="whole"),
    "SmolLM3": Shape(rotary=False, heads=9, kv_heads=3, head_dim=64, hidden=192),
}
ADAPTERS: list[tuple[tuple[int, int, float], ...]] = [(), ((0, 8, 1.0),), ((8, 16, 0.5), (24, 8, -2.0))]


class Modules:
    """The same decoder, an operation at a time; what stands between the calls is exact or rounded once, in numpy."""

    def __init__(self, decoder: Decoder, isa: VectorIsa, threads: int) -> None:
        self.decoder, self.shape = decoder, decoder.shape
        self._last = (isa, threads)

    def call(self, name: str, *arguments: Any) -> None:
        self.decoder.library.function(name)(*arguments, *self._last)

    def norm(self, x: Array, weight: Array | None) -> Array:
        """x [..., dim], the last axis normed by a weight of its size."""
        if weight is None:
            return x
        y, x = np.empty(x.shape, np.float32), np.ascontiguousarray(x)
        self.call("loramux_exact_rms_norm", at(y), at(x), at(weight), x.size // len(weight), len(weight), EPS)
        return y

    def linear(self, x: Array, layer: Linear, entries: Any) -> Array:
        outputs, inputs = layer.weight.shape
        y, x = np.empty((len(x), outputs), np.float32), np.ascontiguousarray(x)
        self.call("loramux_exact_product", at(y), at(x), at(layer.codes), at(layer.scales), len(x), inputs, outputs)
        if layer.bias is not None:
            y += widened(layer.bias)
        arena = layer.arena()
        addresses = (ctypes.addressof(part) for part in (arena, entries))
        self.call("loramux_exact_add_lora", at(y), outputs, at(x), *addresses)
        return y

    def heads(self, x: Array, norm: Array | None, position: Array) -> Array:
        """Norm and rotation of x [rows, heads, dim]."""
        whole = self.shape.qk_norm == "whole"
        x = self.norm(x.reshape(len(x), -1) if whole else x, norm).reshape(x.shape)
        if not self.shape.rotary:
            return x
        cos, sin = (table[position][:, None] for table in (self.decoder.cos, self.decoder.sin))
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def logits(self, cache: Cache, rows: list[Row], tables: Array) -> Array:
        s, d = self.shape, self.decoder
        position = np.array([row.position for row in rows], np.int32)
        sequence = np.array([row.sequence for row in rows], np.int32)
        entries, kept = _entries([row.adapters for row in rows])
        x = d.embed([row.token for row in rows]) * np.float32(s.embedding_factor)
        for index, layer in enumerate(d.layers):
            n = self.norm(x, layer["before_attention"])
            q = self.linear(n, layer["q"], entries)
            if s.fused:
                q, k, v = np.split(q, [s.heads * s.head_dim, (s.heads + s.kv_heads) * s.head_dim], axis=1)
            else:
                k, v = (self.linear(n, layer[name], entries) for name in ("k", "v"))
            q, k, v = (part.reshape(len(rows), -1, s.head_dim) for part in (q, k, v))
            q, k = self.heads(q, layer["q_norm"], position), self.heads(k, layer["k_norm"], position)
            out, v = np.empty(q.shape, np.float32), np.ascontiguousarray(v)
            self.call(
                "loramux_exact_attention",
                *(at(out), at(q), s.heads * s.head_dim, at(k), s.kv_heads * s.head_dim, at(v), s.kv_heads * s.head_dim),
                *(at(cache.k[index]), at(cache.v[index]), at(cache.scales[index]), at(tables), tables.shape[1]),
                *(at(sequence), at(position), len(rows), s.heads, s.kv_heads, s.head_dim),
                *(d.scaling, s.softcap, s.window, None),
            )
            part = self.norm(self.linear(out.reshape(len(rows), -1), layer["o"], entries), layer["after_attention"])
            x = x + part * np.float32(s.residual_factor)
            n = self.norm(x, layer["before_mlp"])
            gate = self.linear(n, layer["gate"], entries)
            up = gate[:, s.inner :] if s.fused else self.linear(n, layer["up"], entries)
            y, row = np.empty((len(rows), s.inner), np.float32), gate.shape[1]
            self.call("loramux_exact_gate", at(y), at(gate), up.ctypes.data, len(rows), s.inner, row, int(s.gelu))
            part = self.norm(self.linear(y, layer["down"], entries), layer["after_mlp"])
            x = x + part * np.float32(s.residual_factor)
        n = self.norm(x, d.norm)
        y = np.empty((len(rows), d.padded), np.float32)
        sizes = (len(rows), s.hidden, d.padded)
        self.call("loramux_exact_dense", at(y), at(n), at(d.numbers), at(d.head_scales), *sizes)
        assert kept  # until here the entries' arrays are in use
        return (y / np.float32(s.logit_divisor))[:, : s.vocabulary]


@pytest.mark.parametrize("name", SHAPES)
def test_single_calls_have_the_bits_of_the_whole_step_on_every_instruction_set(name: str) -> None:
    library: NativeLibrary | None = native_library()
    if library is None:
        pytest.skip("there are no compiled kernels")
    decoder, random = Decoder(library, SHAPES[name]), np.random.default_rng(5)
    lengths = (21, 5, 1, 37)
    rows = [
        Row(int(random.integers(decoder.shape.vocabulary)), position, index, ADAPTERS[index % len(ADAPTERS)])
        for index, length in enumerate(lengths)
        for position in range(length)
    ]
    width = -(-max(lengths) // TILE)
    tables = np.arange(len(lengths) * width, dtype=np.int32).reshape(len(lengths), width)[::-1].copy()
    blocks = len(lengths) * width
    for isa in library.isas:
        expected = decoder.run(isa, decoder.cache(blocks), rows, list(range(len(rows))), tables)
        for threads in (1, 3):
            got = Modules(decoder, isa, threads).logits(decoder.cache(blocks), rows, tables)
            assert got.tobytes() == np.ascontiguousarray(expected).tobytes(), (isa.label, threads)
