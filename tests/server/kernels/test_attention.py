"""Attention over the paged cache: compiled kernels and tensor path against plain softmax in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loramux_server.errors import BaseModelError
from loramux_server.kernels.abi import Isa
from loramux_server.kernels.attention import (
    Attend,
    AttentionParams,
    AttentionStep,
    NativeAttend,
    attend_reference,
    attention_forward,
)
from loramux_server.kernels.choice import choose_kernels
from loramux_server.kernels.kv_cache import BLOCK_SIZE, KVCache, KVShape
from loramux_server.kernels.native import native_library
from loramux_server.kernels.varlen_attention import VarlenAttend, varlen_attend
from support.slow_varlen import slow_varlen

CPU = torch.device("cpu")
LENGTHS = [1, 5, 16, 17, 33, 100]
BLOCKS = 24


def paths() -> dict[str, tuple[Attend, bool]]:
    """Name -> (path, whether it reads the tiled cache)."""
    found: dict[str, tuple[Attend, bool]] = {
        "reference": (attend_reference, False),
        "reference on tiles": (attend_reference, True),
        "varlen paged": (VarlenAttend(slow_varlen, paged=True), False),
        "varlen gathered": (VarlenAttend(slow_varlen, paged=False), False),
    }
    if (library := native_library()) is not None:
        found["native"] = (NativeAttend(library, library.best_isa), True)
        found["native portable"] = (NativeAttend(library, Isa.PORTABLE), True)
    return found


PATHS = ["reference", "reference on tiles", "varlen paged", "varlen gathered", "native", "native portable"]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: AttentionParams) -> torch.Tensor:
    """One whole sequence in double precision: q [n, heads, dim], k and v [n, kv_heads, dim]."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1).double() for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), keys) * params.scaling
    if params.softcap:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))[None]
    hidden = (distance < 0) | ((distance >= params.window) if params.window else torch.zeros_like(distance).bool())
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


class Case:
    """Sequences of LENGTHS tokens with random content, their blocks scattered over a cache full of NaN."""

    def __init__(self, heads: int, kv_heads: int, dim: int) -> None:
        generator = torch.Generator().manual_seed(heads * 1000 + dim)
        total = sum(LENGTHS)
        self.q, self.k, self.v = (
            torch.randn(total, count, dim, generator=generator).bfloat16() for count in (heads, kv_heads, kv_heads)
        )
        self.shape = KVShape(2, kv_heads, dim)
        order = torch.randperm(BLOCKS, generator=generator).int()
        self.tables = torch.zeros(len(LENGTHS), max(LENGTHS) // BLOCK_SIZE + 1, dtype=torch.int32)
        self.starts: list[int] = []
        taken = start = 0
        for index, length in enumerate(LENGTHS):
            count = -(-length // BLOCK_SIZE)
            self.tables[index, :count] = order[taken : taken + count]
            taken += count
            self.starts.append(start)
            start += length

    def cache(self, tiled: bool) -> KVCache:
        cache = KVCache(self.shape, BLOCKS, CPU, tiled=tiled)
        for tensor in [*cache.k, *cache.v]:
            tensor.fill_(float("nan"))  # what other sequences left behind must never be read
        return cache

    def step(self, cache: KVCache, attend: Attend, parts: list[tuple[int, int, int]]) -> AttentionStep:
        """Parts are (sequence, first position, count)."""
        runs, sequence, position = [], [], []
        for index, (_, first, count) in enumerate(parts):
            runs.append((index, len(sequence), count, first))
            sequence += [index] * count
            position += range(first, first + count)
        ints: Any = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
        tables = self.tables[[which for which, _, _ in parts]].contiguous()
        return AttentionStep(cache, attend, tables, ints(sequence), ints(position), tuple(runs))

    def run(
        self, attend: Attend, cache: KVCache, parts: list[tuple[int, int, int]], params: AttentionParams, layer: int = 1
    ) -> torch.Tensor:
        rows = torch.cat([torch.arange(self.starts[w] + first, self.starts[w] + first + n) for w, first, n in parts])
        return attend(self.q[rows], self.k[rows], self.v[rows], layer, self.step(cache, attend, parts), params)


ALL = [(index, 0, length) for index, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (8, 8, 64), (8, 1, 128), (4, 2, 16), (14, 2, 80)])
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (5.0, 0), (0.0, 20), (5.0, 7)])
def test_every_path_gives_softmax_attention(
    path: str, heads: int, kv_heads: int, dim: int, softcap: float, window: int
) -> None:
    attend, tiled = paths()[path]
    case, params = Case(heads, kv_heads, dim), AttentionParams(dim**-0.5, softcap, window)
    out = case.run(attend, case.cache(tiled), ALL, params)
    for start, length in zip(case.starts, LENGTHS, strict=True):
        rows = slice(start, start + length)
        expected = exact(case.q[rows], case.k[rows], case.v[rows], params)
        assert (out[rows].double() - expected).abs().max() < 0.02  # bf16 of values up to about 4


@pytest.mark.parametrize("path", ["native", "native portable"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 50])
def test_bits_do_not_depend_on_chunks_or_company(path: str, chunk: int) -> None:
    attend, tiled = paths()[path]
    case, params = Case(9, 3, 64), AttentionParams(0.125)
    together = case.run(attend, case.cache(tiled), ALL, params)
    cache, which = case.cache(tiled), len(LENGTHS) - 1
    for first in range(0, LENGTHS[which], chunk):
        count = min(chunk, LENGTHS[which] - first)
        part = case.run(attend, cache, [(which, first, count)], params)
        start = case.starts[which] + first
        assert torch.equal(part, together[start : start + count])


@pytest.mark.parametrize("tiled", [False, True])
def test_the_cache_gives_back_what_was_written(tiled: bool) -> None:
    cache = KVCache(KVShape(1, 3, 32), 4, CPU, tiled=tiled)
    k, v = torch.randn(20, 3, 32).bfloat16(), torch.randn(20, 3, 32).bfloat16()
    positions = torch.arange(20)
    blocks = torch.tensor([2, 0])
    cache.write(0, blocks[positions // BLOCK_SIZE], positions % BLOCK_SIZE, k, v)
    keys, values = cache.read(0, blocks, 20)
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    assert cache.nbytes == sum(t.numel() * t.element_size() for t in [*cache.k, *cache.v])


def test_the_compiled_kernel_is_chosen_where_it_can_run() -> None:
    assert choose_kernels(CPU, shape=KVShape(1, 3, 64)).attention.startswith("native")
    assert choose_kernels(CPU, shape=KVShape(1, 3, 24)).attend is attend_reference
    assert choose_kernels(CPU, shape=KVShape(1, 3, 64, torch.float32)).attend is attend_reference


def test_the_librarys_kernel_is_tried_before_it_is_used_and_asked_for_what_it_can() -> None:
    def no_blocks(*args: Any, **options: Any) -> torch.Tensor:
        if options["block_table"] is not None:
            raise RuntimeError("blocks of 256 only")
        return slow_varlen(*args, **options)

    def wrong(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return q

    def chosen(kernel: Any) -> str | None:
        path = varlen_attend(kernel, CPU, KVShape(4, 3, 64))
        return path.name if path else None

    assert [chosen(kernel) for kernel in (slow_varlen, no_blocks, wrong)] == ["varlen paged", "varlen gathered", None]


def test_the_compiled_kernel_refuses_what_it_would_misread() -> None:
    attend, _ = paths()["native"]
    case, params = Case(4, 2, 16), AttentionParams(0.25)
    with pytest.raises(ValueError, match="tiled cache"):
        case.run(attend, case.cache(tiled=False), ALL, params)
    other = KVCache(KVShape(2, 4, 16), BLOCKS, CPU, tiled=True)
    with pytest.raises(ValueError, match="do not fit the cache"):
        case.run(attend, other, ALL, params)


def test_a_kind_of_attention_that_is_unknown_is_refused_not_ignored() -> None:
    case = Case(4, 2, 16)
    step = case.step(case.cache(False), attend_reference, [(0, 0, 1)])
    module = torch.nn.Module()
    tensors = [x[:1].transpose(0, 1)[None] for x in (case.q, case.k, case.v)]
    with pytest.raises(BaseModelError, match="s_aux"):
        attention_forward(module, *tensors, None, loramux_step=step, s_aux=torch.zeros(4))
    with pytest.raises(BaseModelError, match="mask"):
        attention_forward(module, *tensors, torch.zeros(1), loramux_step=step)
