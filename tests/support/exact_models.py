"""Small random decoders for the kernels of exact integers: their structures, and a reference in double precision."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loramux_server.kernels.compiled.abi import (
    POINTER,
    ExactLayer,
    ExactLinear,
    ExactModel,
    ExactNorm,
    ExactStep,
    LoraArena,
    LoraEntries,
    VectorIsa,
)
from loramux_server.kernels.compiled.library import NativeLibrary
from loramux_server.kernels.layers.packed_head import rows_of

Array = NDArray[Any]

NF4 = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)
TILE = 16  # tokens of a block of the cache
EPS = 1e-5


def bf16(x: Array) -> Array:
    """fp32 -> the bits of bf16, for numbers that are finite."""
    words = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)


def widened(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def at(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data


@dataclass
class Linear:
    """A random NF4 weight and adapters beside it; `weight` [out, in] is what they stand for."""

    codes: Array
    scales: Array
    weight: Array
    bias: Array | None
    a: Array  # [ranks, in] bf16
    bt: Array  # [ranks, out] bf16
    targeted: Array

    @classmethod
    def random(cls, random: np.random.Generator, inputs: int, outputs: int, ranks: int, *, bias: bool) -> Linear:
        codes = random.integers(0, 16, (outputs, inputs), dtype=np.uint8)
        scales = random.uniform(0.02, 0.05, (inputs // 64, outputs)).astype(np.float32)
        weight = NF4[codes] * np.repeat(scales.T, 64, axis=1)
        tiles = codes.reshape(outputs // 16, 16, inputs // 4, 4).transpose(0, 2, 1, 3)
        packed = (tiles[..., :2] | tiles[..., 2:] << 4).reshape(outputs // 16, inputs // 4, 32)
        return cls(
            np.ascontiguousarray(packed),
            scales,
            weight,
            bf16(random.normal(0, 0.1, outputs)) if bias else None,
            bf16(random.normal(0, 0.05, (ranks, inputs))),
            bf16(random.normal(0, 0.05, (ranks, outputs))),
            np.ones(ranks // 8, dtype=np.uint8),
        )

    def structure(self) -> ExactLinear:
        outputs, inputs = self.weight.shape
        return ExactLinear(at(self.codes), at(self.scales), at(self.bias), self.arena(), inputs, outputs)

    def arena(self) -> LoraArena:
        return LoraArena(at(self.a), at(self.bt), at(self.targeted), None, self.a.shape[1], self.bt.shape[1])

    def reference(self, x: Array, adapters: list[tuple[int, int, float]]) -> Array:
        """x [in] -> [out]; adapters: (first rank, ranks, factor)."""
        y = self.weight @ x
        if self.bias is not None:
            y = y + widened(self.bias)
        for first, rank, factor in adapters:
            part = slice(first, first + rank)
            y = y + widened(self.bt[part]).T.astype(float) @ (factor * (widened(self.a[part]).astype(float) @ x))
        return y


@dataclass(frozen=True)
class Shape:
    """What kind of decoder."""

    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    inner: int = 192
    layers: int = 2
    vocabulary: int = 70
    tied: bool = False  # there is no embedding but the head
    bias: bool = False
    qk_norm: str = ""  # "", "head" or "whole"
    post_norms: bool = False
    pre_norms: bool = True
    fused: bool = False
    window: int = 0
    softcap: float = 0.0
    gelu: bool = False
    rotary: bool = True
    embedding_factor: float = 1.0
    residual_factor: float = 1.0
    logit_divisor: float = 1.0
    logit_softcap: float = 0.0


@dataclass
class Decoder:
    """One on all instruction sets, and slowly."""

    library: NativeLibrary
    shape: Shape
    ranks: int = 32
    keep: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        s, random = self.shape, np.random.default_rng(7)
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.scaling = s.head_dim**-0.5

        def linear(inputs: int, outputs: int, bias: bool = False) -> Linear:
            return Linear.random(random, inputs, outputs, self.ranks, bias=bias)

        def norm(dim: int, wanted: bool = True) -> Array | None:
            return random.uniform(0.5, 1.5, dim).astype(np.float32) if wanted else None

        qk = {"": 0, "head": 1, "whole": 2}[s.qk_norm]
        self.layers: list[dict[str, Any]] = []
        for _ in range(s.layers):
            layer: dict[str, Any] = {
                "before_attention": norm(s.hidden, s.pre_norms),
                "before_mlp": norm(s.hidden, s.pre_norms),
                "after_attention": norm(s.hidden, s.post_norms),
                "after_mlp": norm(s.hidden, s.post_norms),
                "q_norm": norm(q if qk == 2 else s.head_dim, qk > 0),
                "k_norm": norm(kv if qk == 2 else s.head_dim, qk > 0),
                "q": linear(s.hidden, q + 2 * kv if s.fused else q, s.bias),
                "k": None if s.fused else linear(s.hidden, kv, s.bias),
                "v": None if s.fused else linear(s.hidden, kv, s.bias),
                "o": linear(q, s.hidden),
                "gate": linear(s.hidden, 2 * s.inner if s.fused else s.inner),
                "up": None if s.fused else linear(s.hidden, s.inner),
                "down": linear(s.inner, s.hidden),
            }
            self.layers.append(layer)
        self.embedding = bf16(random.normal(0, 1, (s.vocabulary, s.hidden)))
        self.head = self.embedding if s.tied else bf16(random.normal(0, 0.1, (s.vocabulary, s.hidden)))
        self.norm = norm(s.hidden)
        positions = np.arange(256)[:, None] * 10000.0 ** (-np.arange(s.head_dim // 2) / (s.head_dim // 2))
        self.cos, self.sin = np.cos(positions).astype(np.float32), np.sin(positions).astype(np.float32)
        self._build()

    def _build(self) -> None:
        s = self.shape
        self.padded = -(-s.vocabulary // 32) * 32
        structures = (ExactLayer * s.layers)()
        for structure, layer in zip(structures, self.layers, strict=True):
            for name, part in layer.items():
                if isinstance(part, Linear):
                    setattr(structure, name, part.structure())
                elif part is not None:
                    setattr(structure, name, ExactNorm(at(part), EPS))
            structure.whole_norms = s.qk_norm == "whole"
            structure.rotary = 0 if s.rotary else -1
            structure.window, structure.gelu = s.window, s.gelu
            structure.scaling, structure.softcap = self.scaling, s.softcap
        self.numbers = np.zeros((3, self.padded // 32, 16, s.hidden), dtype=np.uint8)
        self.head_scales = np.zeros((s.hidden // 64, self.padded), dtype=np.float32)
        pack = self.library.function("loramux_exact_pack_head")
        pack(at(self.numbers), at(self.head_scales), at(self.head), s.vocabulary, self.padded, s.hidden, 0, 1)
        self.structures = structures
        self.model = ExactModel(
            layers=ctypes.addressof(structures),
            embedding=None if s.tied else at(self.embedding),
            head=at(self.numbers),
            head_scales=at(self.head_scales),
            norm=ExactNorm(at(self.norm), EPS),
            num_layers=s.layers,
            hidden=s.hidden,
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            rotary_pairs=s.head_dim // 2,
            vocabulary=s.vocabulary,
            padded_vocabulary=self.padded,
            embedding_factor=s.embedding_factor,
            residual_factor=s.residual_factor,
            logit_divisor=s.logit_divisor,
            logit_softcap=s.logit_softcap,
        )

    def embed(self, tokens: list[int]) -> Array:
        """[len(tokens), hidden] fp32, before the factor."""
        if not self.shape.tied:
            return widened(self.embedding[tokens])
        numbers, scales = torch.from_numpy(self.numbers), torch.from_numpy(self.head_scales)
        rows: Array = rows_of(numbers, scales, torch.tensor(tokens)).numpy()
        return rows

    def cache(self, blocks: int) -> Cache:
        s = self.shape
        k = [np.full((blocks, s.kv_heads, s.head_dim // 2, 16, 2), 9999, np.int16) for _ in range(s.layers)]
        v = [np.full((blocks, s.kv_heads, 8, s.head_dim, 2), 9999, np.int16) for _ in range(s.layers)]
        scales = [np.full((blocks, s.kv_heads, 2, 16), np.nan, np.float32) for _ in range(s.layers)]
        return Cache(k, v, scales)

    def run(
        self,
        isa: VectorIsa,
        cache: Cache,
        rows: list[Row],
        sampled: list[int],
        tables: Array,
        threads: int = 1,
    ) -> Array:
        """Logits [len(sampled), vocabulary] fp32."""

        def integers(values: list[int], kind: type) -> Array:
            return np.array(values, dtype=kind)

        tokens = integers([row.token for row in rows], np.int64)
        position = integers([row.position for row in rows], np.int32)
        sequence = integers([row.sequence for row in rows], np.int32)
        heads = integers(sampled, np.int64)
        entries, kept = _entries([row.adapters for row in rows])
        head_entries, head_kept = _entries([rows[row].adapters for row in sampled])
        size = int(self.library.function("loramux_exact_scratch")(ctypes.addressof(self.model), len(rows)))
        scratch = np.empty(size + 64, dtype=np.uint8)
        logits = np.full((max(1, len(sampled)), self.padded), np.nan, dtype=np.float32)
        pointers = [(POINTER * len(of))(*(at(each) for each in of)) for of in (cache.k, cache.v, cache.scales)]
        cos, sin = (POINTER * 1)(at(self.cos)), (POINTER * 1)(at(self.sin))
        step = ExactStep(
            tokens=at(tokens),
            position=at(position),
            sequence=at(sequence),
            tables=at(tables),
            sampled=at(heads),
            cos=ctypes.addressof(cos),
            sin=ctypes.addressof(sin),
            k_cache=ctypes.addressof(pointers[0]),
            v_cache=ctypes.addressof(pointers[1]),
            kv_scales=ctypes.addressof(pointers[2]),
            lora=ctypes.addressof(entries),
            head_lora=ctypes.addressof(head_entries),
            scratch=at(scratch),
            logits=at(logits),
            rows=len(rows),
            samples=len(sampled),
            table_width=tables.shape[1],
            threads=threads,
        )
        self.library.function("loramux_exact_step")(ctypes.addressof(self.model), ctypes.addressof(step), isa)
        del kept, head_kept
        return logits[: len(sampled), : self.shape.vocabulary].copy()

    def reference(self, tokens: list[int], adapters: list[tuple[int, int, float]]) -> Array:
        """Logits [len(tokens), vocabulary] in double precision, of one sequence from its beginning."""
        s = self.shape
        q_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
        x = widened(self.embedding[tokens]).astype(float) * s.embedding_factor
        for layer in self.layers:
            n = _norm(x, layer["before_attention"])
            if s.fused:
                qkv = np.stack([layer["q"].reference(row, adapters) for row in n])
                q, k, v = np.split(qkv, [q_width, q_width + kv_width], axis=1)
            else:
                q, k, v = (np.stack([layer[name].reference(row, adapters) for row in n]) for name in "qkv")
            q = self._turn(q, s.heads, layer["q_norm"])
            k = self._turn(k, s.kv_heads, layer["k_norm"])
            attended = self._attend(q, k, v.reshape(len(tokens), s.kv_heads, s.head_dim))
            part = np.stack([layer["o"].reference(row, adapters) for row in attended])
            x = x + s.residual_factor * _norm(part, layer["after_attention"])
            m = _norm(x, layer["before_mlp"])
            gate = np.stack([layer["gate"].reference(row, adapters) for row in m])
            if s.fused:
                gate, up = np.split(gate, 2, axis=1)
            else:
                up = np.stack([layer["up"].reference(row, adapters) for row in m])
            inner = _activation(gate, s.gelu) * up
            part = np.stack([layer["down"].reference(row, adapters) for row in inner])
            x = x + s.residual_factor * _norm(part, layer["after_mlp"])
        logits = _norm(x, self.norm) @ widened(self.head).T.astype(float) / s.logit_divisor
        return s.logit_softcap * np.tanh(logits / s.logit_softcap) if s.logit_softcap else logits

    def _turn(self, x: Array, heads: int, weight: Array | None) -> Array:
        s = self.shape
        if weight is not None and s.qk_norm == "whole":
            x = _norm(x, weight)
        x = x.reshape(len(x), heads, s.head_dim)
        if weight is not None and s.qk_norm == "head":
            x = _norm(x, weight)
        if not s.rotary:
            return x
        low, high = np.split(x, 2, axis=2)
        cos, sin = (table[: len(x), None].astype(float) for table in (self.cos, self.sin))
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2)

    def _attend(self, q: Array, k: Array, v: Array) -> Array:
        s, count = self.shape, len(q)
        group = s.heads // s.kv_heads
        scores = np.einsum("thd,jhd->htj", q, np.repeat(k, group, axis=1)) * self.scaling
        if s.softcap:
            scores = s.softcap * np.tanh(scores / s.softcap)
        t, j = np.mgrid[:count, :count]
        seen = (j <= t) & ((j > t - s.window) if s.window else True)
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        out = np.einsum("htj,jhd->thd", weights, np.repeat(v, group, axis=1))
        return out.reshape(count, -1)


@dataclass
class Cache:
    k: list[Array]
    v: list[Array]
    scales: list[Array]


@dataclass(frozen=True)
class Row:
    token: int
    position: int
    sequence: int = 0
    adapters: tuple[tuple[int, int, float], ...] = ()


def _entries(rows: list[tuple[tuple[int, int, float], ...]]) -> tuple[LoraEntries, list[Array]]:
    all_entries = [entry for row in rows for entry in row]
    arrays = [
        np.cumsum([0, *(len(row) for row in rows)]).astype(np.int32),
        np.array([first for first, _, _ in all_entries], dtype=np.int32),
        np.array([rank for _, rank, _ in all_entries], dtype=np.int32),
        np.array([factor for _, _, factor in all_entries], dtype=np.float32),
    ]
    return LoraEntries(*(at(array) for array in arrays), len(rows)), arrays


def _norm(x: Array, weight: Array | None) -> Array:
    if weight is None:
        return x
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * weight


def _activation(x: Array, gelu: bool) -> Array:
    if gelu:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-x))
