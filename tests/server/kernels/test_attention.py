"""Attention over the paged cache: compiled kernels and tensor path against plain softmax in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.errors import BaseModelError
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache, KVShape
from loramux_server.kernels.attention.paged_attention import (
    Attend,
    AttentionParams,
    AttentionStep,
    NativeAttend,
    attend_reference,
    attention_forward,
    probe_kv_shape,
)
from loramux_server.kernels.attention.varlen_attention import VarlenAttend, varlen_attend
from loramux_server.kernels.choice import choose_kernels
from loramux_server.kernels.compiled.library import Compiled, native_library
from support.slow_varlen import slow_varlen

CPU = CpuDevice()
LENGTHS = [1, 5, 16, 17, 33, 100]
BLOCKS = 24


BF16, FP32, WHOLE = torch.bfloat16, torch.float32, torch.int16


def paths() -> dict[str, tuple[Attend, torch.dtype]]:
    """Name -> (path, what the cache that it reads holds)."""
    found: dict[str, tuple[Attend, torch.dtype]] = {
        "reference": (attend_reference, BF16),
        "reference in fp32": (attend_reference, FP32),
        "reference on whole numbers": (attend_reference, WHOLE),
        "varlen paged": (VarlenAttend(slow_varlen, paged=True), BF16),
        "varlen gathered": (VarlenAttend(slow_varlen, paged=False), BF16),
    }
    if (library := native_library()) is not None:
        for isa in library.isas:
            found[f"native {isa.label}"] = (NativeAttend(Compiled(library, isa)), WHOLE)
    return found


PATHS = list(paths())
NATIVE = [path for path in PATHS if path.startswith("native")]
# of values up to about 4: bf16 in, bf16 out; fp32 all the way; keys of 13 bits, values of 15
TOLERANCE = {BF16: 0.02, FP32: 1e-5, WHOLE: 2e-3}


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: AttentionParams) -> torch.Tensor:
    """One whole sequence in double precision: q [n, heads, dim], k and v [n, kv_heads, dim]."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1).double() for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), keys) * params.scaling
    if params.softcap:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))[None]
    hidden = (distance < 0) | ((distance >= params.window) if params.window else torch.zeros_like(distance).bool())
    if params.chunk:
        of_chunk = torch.arange(len(q)) // params.chunk
        hidden |= of_chunk[:, None] != of_chunk[None]
    scores = scores.masked_fill(hidden, float("-inf"))
    if params.sinks is not None:
        scores = torch.cat([scores, params.sinks.double()[:, None, None].expand(-1, len(q), 1)], dim=-1)
    return torch.einsum("hts,shd->thd", scores.softmax(-1)[..., : len(q)], values)


class Case:
    """Sequences of LENGTHS tokens with random content, their blocks scattered over a cache full of NaN."""

    def __init__(self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = FP32) -> None:
        """`dtype`: of the cache."""
        generator = torch.Generator().manual_seed(heads * 1000 + dim)
        total = sum(LENGTHS)
        self.q, self.k, self.v = (
            torch.randn(total, count, dim, generator=generator).to(BF16 if dtype == BF16 else FP32)
            for count in (heads, kv_heads, kv_heads)
        )
        self.shape = KVShape(2, kv_heads, dim, dtype)
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

    def cache(self) -> KVCache:
        """Full of what other sequences left behind, which must never be read."""
        cache = KVCache(self.shape, BLOCKS, CPU)
        for tensor in [*cache.k, *cache.v, *cache.scales]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -4095)
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
    attend, dtype = paths()[path]
    case, params = Case(heads, kv_heads, dim, dtype), AttentionParams(dim**-0.5, softcap, window)
    out = case.run(attend, case.cache(), ALL, params)
    for start, length in zip(case.starts, LENGTHS, strict=True):
        rows = slice(start, start + length)
        expected = exact(case.q[rows], case.k[rows], case.v[rows], params)
        assert (out[rows].double() - expected).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (8, 8, 16)])
@pytest.mark.parametrize("chunk", [1, 7, 16, 40, 500])
def test_every_path_sees_the_keys_of_a_rows_own_chunk(
    path: str, heads: int, kv_heads: int, dim: int, chunk: int
) -> None:
    attend, dtype = paths()[path]
    case, params = Case(heads, kv_heads, dim, dtype), AttentionParams(dim**-0.5, chunk=chunk)
    out = case.run(attend, case.cache(), ALL, params)
    for start, length in zip(case.starts, LENGTHS, strict=True):
        rows = slice(start, start + length)
        expected = exact(case.q[rows], case.k[rows], case.v[rows], params)
        assert (out[rows].double() - expected).abs().max() < TOLERANCE[dtype]
    cache, which = case.cache(), len(LENGTHS) - 1  # over a chunk's edge, in pieces
    pieces = [case.run(attend, cache, [(which, first, 10)], params) for first in range(0, LENGTHS[which], 10)]
    whole = out[case.starts[which] :]
    assert torch.equal(torch.cat(pieces), whole) if "varlen" not in path else torch.allclose(torch.cat(pieces), whole)


@pytest.mark.parametrize("chunk", [7, 40])
def test_chunks_have_the_same_bits_on_every_instruction_set_and_in_company(chunk: int) -> None:
    case, params = Case(9, 3, 64, WHOLE), AttentionParams(0.125, chunk=chunk)
    whole = [case.run(paths()[path][0], case.cache(), ALL, params) for path in NATIVE]
    assert all(torch.equal(out, whole[0]) for out in whole)
    for which, start in enumerate(case.starts):
        alone = case.run(paths()[NATIVE[0]][0], case.cache(), [(which, 0, LENGTHS[which])], params)
        assert torch.equal(alone, whole[0][start : start + LENGTHS[which]])


def test_a_layer_with_chunks_and_a_window_is_refused() -> None:
    with pytest.raises(BaseModelError, match="chunks and a window"):
        AttentionParams(0.125, window=7, chunk=40)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(8, 2, 64, 0), (9, 3, 64, 20), (8, 8, 16, 7)])
@pytest.mark.parametrize("size", [0.5, 20.0])
def test_sinks_take_their_share_of_every_path(
    path: str, heads: int, kv_heads: int, dim: int, window: int, size: float
) -> None:
    """Both sinks that hardly count, and such that are the largest score."""
    attend, dtype = paths()[path]
    sinks = size * torch.randn(heads, generator=torch.Generator().manual_seed(3))
    case, params = Case(heads, kv_heads, dim, dtype), AttentionParams(dim**-0.5, 0.0, window, sinks)
    out = case.run(attend, case.cache(), ALL, params)
    without = case.run(attend, case.cache(), ALL, AttentionParams(dim**-0.5, 0.0, window))
    assert (out - without).abs().max() > 0.1
    for start, length in zip(case.starts, LENGTHS, strict=True):
        rows = slice(start, start + length)
        expected = exact(case.q[rows], case.k[rows], case.v[rows], params)
        assert (out[rows].double() - expected).abs().max() < TOLERANCE[dtype]


def test_sinks_have_the_same_bits_on_every_instruction_set_and_in_chunks() -> None:
    case, params = Case(9, 3, 64, WHOLE), AttentionParams(0.125, sinks=torch.linspace(-2, 2, 9))
    whole = [case.run(paths()[path][0], case.cache(), ALL, params) for path in NATIVE]
    assert all(torch.equal(out, whole[0]) for out in whole)
    cache, which = case.cache(), len(LENGTHS) - 1
    for first in range(0, LENGTHS[which], 7):
        count = min(7, LENGTHS[which] - first)
        part = case.run(paths()[NATIVE[0]][0], cache, [(which, first, count)], params)
        assert torch.equal(part, whole[0][case.starts[which] + first :][:count])


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("chunk", [1, 7, 16, 50])
def test_bits_do_not_depend_on_chunks_or_company(path: str, chunk: int) -> None:
    attend, dtype = paths()[path]
    case, params = Case(9, 3, 64, dtype), AttentionParams(0.125)
    together = case.run(attend, case.cache(), ALL, params)
    cache, which = case.cache(), len(LENGTHS) - 1
    for first in range(0, LENGTHS[which], chunk):
        count = min(chunk, LENGTHS[which] - first)
        part = case.run(attend, cache, [(which, first, count)], params)
        start = case.starts[which] + first
        assert torch.equal(part, together[start : start + count])


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (14, 2, 80), (3, 1, 512), (40, 2, 16)])
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (5.0, 7)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_instruction_set_gives_the_same_bits_in_and_beside_the_cache(
    heads: int, kv_heads: int, dim: int, softcap: float, window: int, threads: int
) -> None:
    case, params = Case(heads, kv_heads, dim, WHOLE), AttentionParams(dim**-0.5, softcap, window)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for path in NATIVE:
            cache = case.cache()
            out = case.run(paths()[path][0], cache, ALL, params)
            results.append([part.view(torch.int32) for part in (out, cache.scales[1])] + [cache.k[1], cache.v[1]])
    finally:
        torch.set_num_threads(before)
    reference = case.cache()
    expected = case.run(attend_reference, reference, ALL, params)
    for result in results:
        assert all(torch.equal(part, first) for part, first in zip(result, results[0], strict=True))
        out = result[0].view(torch.float32)
        assert (out - expected).abs().max() < 1e-3, "near the reference, which reads the same whole numbers"
        written = torch.isfinite(reference.scales[1])
        ours = result[1].view(torch.float32)
        assert torch.equal(torch.isfinite(ours), written) and torch.equal(ours[written], reference.scales[1][written])


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_sequence_with_a_number_that_is_none_harms_no_other(path: str, part: str) -> None:
    attend, dtype = paths()[path]
    params = AttentionParams(0.125)
    whole = Case(9, 3, 64, dtype)
    expected = whole.run(attend, whole.cache(), ALL, params)
    sick, which, at = Case(9, 3, 64, dtype), len(LENGTHS) - 1, 40
    row = sick.starts[which] + at
    getattr(sick, part)[row, 0, 5] = float("nan")
    got = sick.run(attend, sick.cache(), ALL, params)
    assert torch.equal(got[:row], expected[:row])
    assert got[row, 0].isnan().all(), "its own row, in the head that reads it"
    assert part == "q" or got[row:, 0].isnan().all(), "and all that see its key or value"


@pytest.mark.parametrize("path", NATIVE)
def test_queries_and_keys_may_lie_as_modules_leave_them(path: str) -> None:
    attend, dtype = paths()[path]
    case, params = Case(4, 2, 16, dtype), AttentionParams(0.25)
    expected = case.run(attend, case.cache(), ALL, params)
    case.q, case.k, case.v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (case.q, case.k, case.v))
    assert torch.equal(case.run(attend, case.cache(), ALL, params), expected), "heads first"
    fused = torch.cat([x.reshape(len(x), -1) for x in (case.q, case.k, case.v)], dim=1)
    case.q, case.k, case.v = (part.view(len(fused), -1, 16) for part in fused.split([4 * 16, 2 * 16, 2 * 16], dim=1))
    step = case.step(cache := case.cache(), attend, ALL)
    assert torch.equal(attend(case.q, case.k, case.v, 1, step, params), expected), "side by side in one row"
    assert cache.scales[1].isfinite().any()


@pytest.mark.parametrize("dtype", [BF16, FP32, WHOLE])
def test_the_cache_gives_back_what_was_written(dtype: torch.dtype) -> None:
    cache = KVCache(KVShape(1, 3, 32, dtype), 4, CPU)
    k, v = torch.randn(20, 3, 32), torch.randn(20, 3, 32)
    if dtype == BF16:
        k, v = k.bfloat16(), v.bfloat16()
    positions = torch.arange(20)
    blocks = torch.tensor([2, 0])
    cache.write(0, blocks[positions // BLOCK_SIZE], positions % BLOCK_SIZE, k, v)
    keys, values = cache.read(0, blocks, 20)
    largest_k, largest_v = k.abs().amax(-1, keepdim=True), v.abs().amax(-1, keepdim=True)
    assert ((keys - k).abs() <= (largest_k / 4095 * 0.501 if dtype == WHOLE else 0)).all(), "half a whole number"
    assert ((values - v).abs() <= (largest_v / 16383 * 0.501 if dtype == WHOLE else 0)).all()
    assert cache.nbytes == sum(t.numel() * t.element_size() for t in [*cache.k, *cache.v, *cache.scales])


def test_the_compiled_kernel_is_chosen_where_it_can_run() -> None:
    assert choose_kernels(CPU, shape=KVShape(1, 3, 64, WHOLE)).attention == "native"
    assert choose_kernels(CPU, shape=KVShape(1, 3, 24, FP32)).attend is attend_reference


def test_the_librarys_kernel_is_tried_before_it_is_used_and_asked_for_what_it_can() -> None:
    def no_blocks(*args: Any, **options: Any) -> torch.Tensor:
        if options["block_table"] is not None:
            raise RuntimeError("blocks of 256 only")
        return slow_varlen(*args, **options)

    def wrong(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return q

    def of_other_arguments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q

    def chosen(kernel: Any) -> str | None:
        path = varlen_attend(kernel, CPU, KVShape(4, 3, 64))
        return path.name if path else None

    assert [chosen(kernel) for kernel in (slow_varlen, no_blocks)] == ["varlen paged", "varlen gathered"]
    assert [chosen(kernel) for kernel in (wrong, of_other_arguments)] == [None, None]


def test_the_compiled_kernel_refuses_what_it_would_misread() -> None:
    attend, _ = paths()[NATIVE[-1]]
    case, params = Case(4, 2, 16), AttentionParams(0.25)
    with pytest.raises(ValueError, match="a cache of whole numbers"):
        case.run(attend, case.cache(), ALL, params)
    with pytest.raises(ValueError, match="takes fp32"):
        Case(4, 2, 16, BF16).run(attend, KVCache(KVShape(2, 2, 16, WHOLE), BLOCKS, CPU), ALL, params)
    with pytest.raises(ValueError, match="do not fit the cache"):
        case.run(attend, KVCache(KVShape(2, 4, 16, WHOLE), BLOCKS, CPU), ALL, params)


def test_a_kind_of_attention_that_is_unknown_is_refused_not_ignored() -> None:
    case = Case(4, 2, 16)
    step = case.step(case.cache(), attend_reference, [(0, 0, 1)])
    module = torch.nn.Module()
    tensors = [x[:1].transpose(0, 1)[None] for x in (case.q, case.k, case.v)]
    with pytest.raises(BaseModelError, match="position_bias"):
        attention_forward(module, *tensors, None, loramux_step=step, position_bias=torch.zeros(4))
    with pytest.raises(BaseModelError, match="mask"):
        attention_forward(module, *tensors, torch.zeros(1), loramux_step=step)


def test_a_model_without_attention_is_refused() -> None:
    class Stateful(torch.nn.Module):
        def set_attn_implementation(self, name: str) -> None: ...

        def forward(self, **inputs: Any) -> None: ...

    with pytest.raises(BaseModelError, match="no attention"):
        probe_kv_shape(Stateful(), CpuDevice(), whole_numbers=True)
