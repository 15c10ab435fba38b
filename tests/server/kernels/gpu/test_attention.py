"""Attention over the paged cache: against slow references, and equal bits however a step is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache, KVShape
from loramux_server.kernels.attention.paged_attention import AttentionParams, AttentionStep
from loramux_server.kernels.attention.paged_attention import attend_reference as attend_of_the_cpu
from loramux_server.kernels.gpu.attention import AttentionScratch, attend
from loramux_server.kernels.gpu.launch import launch_now
from support.attention_steps import Chunk, Paged

MIXED: list[Chunk] = [(0, 149, 1), (1, 60, 5), (2, 0, 20)]  # a decode row over three splits, a chunk, a prompt
LENGTHS = [150, 65, 20]


def close(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.02, atol=0.01)


def sinks(heads: int) -> torch.Tensor:
    """From some that count for nothing to one that is above all scores."""
    return torch.linspace(-9, 12, heads)


@pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "params", "more"),
    [
        (2, 1, 16, AttentionParams(0.25), {}),
        (1, 3, 64, AttentionParams(0.125, window=70), {}),
        (2, 4, 32, AttentionParams(0.2, softcap=2.0), {"tensor_cores": False}),
        (1, 9, 80, AttentionParams(0.1, softcap=5.0, window=9), {}),
        (1, 16, 96, AttentionParams(0.1), {}),
        (1, 20, 32, AttentionParams(0.2), {}),
        (1, 2, 128, AttentionParams(0.09, window=1), {}),
        (1, 2, 256, AttentionParams(0.06, window=64), {}),
        (1, 3, 32, AttentionParams(0.2, chunk=64), {}),
        (2, 2, 16, AttentionParams(0.2, chunk=37, softcap=5.0, sinks=sinks(4)), {}),
        (2, 4, 32, AttentionParams(0.2, sinks=sinks(8)), {}),
        (2, 3, 64, AttentionParams(0.125, window=70, sinks=sinks(6).bfloat16()), {}),
        (1, 9, 16, AttentionParams(0.2, softcap=5.0, window=9, sinks=sinks(9).half()), {"tensor_cores": False}),
    ],
)
def test_attention_agrees_with_its_reference_over_heads_of_any_size_and_number(
    device: torch.device,
    act: torch.dtype,
    kv_heads: int,
    group: int,
    dim: int,
    params: AttentionParams,
    more: dict[str, Any],
) -> None:
    paged = Paged(LENGTHS, kv_heads=kv_heads, device=device, act=act, group=group, head_dim=dim, split=64, **more)
    close(paged.attend(MIXED, params), paged.reference(MIXED, params))


@pytest.mark.parametrize(
    "params",
    [
        AttentionParams(0.25, softcap=3.0, window=100),
        AttentionParams(0.25, softcap=3.0, window=100, sinks=sinks(6)),
        AttentionParams(0.25, chunk=70),
    ],
)
def test_attention_agrees_with_the_reference_of_the_cpu(
    device: torch.device, act: torch.dtype, params: AttentionParams
) -> None:
    paged = Paged(LENGTHS, kv_heads=2, device=device, act=act, group=3, head_dim=16, split=64)
    got = paged.attend(MIXED, params)
    wanted = []
    for sequence, position, count in MIXED:
        end = position + count
        cache = KVCache(KVShape(1, 2, 16, act), 12, CpuDevice())
        tables = torch.arange(-(-end // BLOCK_SIZE), dtype=torch.int32)[None]
        at = torch.arange(end, dtype=torch.int32)
        step = AttentionStep(cache, attend_of_the_cpu, tables, torch.zeros_like(at), at, ((0, 0, end, 0),))
        q = paged.q[sequence][:end].view(end, 6, 16).cpu()
        keys, values = paged.keys[sequence][:end].cpu(), paged.values[sequence][:end].cpu()
        wanted.append(attend_of_the_cpu(q, keys, values, 0, step, params).flatten(1)[position:])
    close([part.cpu() for part in got], wanted)


@pytest.mark.parametrize(
    ("params", "more"),
    [
        (AttentionParams(0.25), {}),
        (AttentionParams(0.25, softcap=2.0, window=50), {}),
        (AttentionParams(0.25, window=17), {"tensor_cores": False}),
        (AttentionParams(0.25, sinks=torch.tensor([6.0, -1.0])), {}),
        (AttentionParams(0.25, chunk=48), {}),
        (AttentionParams(0.25, chunk=50), {"tensor_cores": False}),
        (AttentionParams(0.25, window=50, sinks=torch.tensor([-2.0, 3.0])), {"tensor_cores": False}),
    ],
)
def test_a_rows_bits_depend_on_nothing_but_its_sequence(
    device: torch.device, act: torch.dtype, params: AttentionParams, more: dict[str, Any]
) -> None:
    paged = Paged([140, 90], kv_heads=1, device=device, act=act, group=2, head_dim=16, split=64, **more)
    whole = torch.cat([paged.attend([(0, first, 70)], params)[0] for first in (0, 70)])
    for start in (69, 139):  # alone, by a split each or by one program for all
        for parts in (32, 0):
            (row,) = paged.attend([(0, start, 1)], params, parts=parts)
            assert torch.equal(row[0], whole[start])
    chunks: list[Chunk] = [(0, 55, 18), (1, 82, 5)]  # other chunks, in company, and where parts do not suffice for all
    for large_tiles, parts in ((True, 4096), (False, 4096), (False, 12)):
        part, other = paged.attend(chunks, params, large_tiles=large_tiles, parts=parts)
        assert torch.equal(part, whole[55:73])
        assert torch.equal(other, paged.attend([(1, 82, 5)], params)[0])


def test_what_is_not_finite_harms_only_those_who_see_it(device: torch.device, act: torch.dtype) -> None:
    params = AttentionParams(0.25, window=30)
    paged = Paged([70, 40], kv_heads=1, device=device, act=act, group=2, head_dim=16, split=64)
    steps: list[Chunk] = [(0, 0, 30), (1, 0, 40)]
    clean = paged.attend(steps, params)
    paged.q[0][3] = torch.inf
    paged.keys[0][20], paged.values[0][20] = torch.nan, 0  # as rotate_and_write leaves a token that is not finite
    first, second = paged.attend(steps, params)
    seeing = [3, *range(20, 30)]
    assert not first[seeing].isfinite().any()
    unharmed = [row for row in range(30) if row not in seeing]
    assert torch.equal(first[unharmed], clean[0][unharmed])
    assert torch.equal(second, clean[1])
    later: list[Chunk] = [(0, 45, 20)]  # the first row's window reaches back to position 16: what is before is not read
    paged.keys[0][:16] = paged.values[0][:16] = torch.nan
    (rows,) = paged.attend(later, params)
    assert rows.isfinite().all(-1).tolist() == [row - 30 + 1 > 20 for row in range(45, 65)]


def test_rows_that_the_tables_do_not_hold_stay_as_they_are(device: torch.device, act: torch.dtype) -> None:
    paged = Paged([33], kv_heads=1, device=device, act=act, group=2, head_dim=16, split=64)
    tables = paged.tables([(0, 30, 3)])
    paged.write(0, 33)
    out = torch.full((8, 32), 5, dtype=act, device=device)
    scratch = AttentionScratch(*(torch.empty(shape, device=device) for shape in paged.scratch_shapes(tables.sizes)))
    args = (paged.k_cache, paged.v_cache, tables, AttentionParams(0.25), scratch)
    attend(launch_now, out, torch.ones_like(out), *args)
    assert (out[:3] != 5).any(-1).all()
    assert (out[3:] == 5).all()
    with pytest.raises(ValueError, match="2 heads of 16 numbers on 1 do not fit .* groups of 1 heads of 32"):
        attend(launch_now, out, out, *args[:2], paged.tables([(0, 30, 3)], group=1, head_dim=32), *args[3:])
    with pytest.raises(ValueError, match=r"2 heads have one sink each, and not \(3,\)"):
        few = AttentionParams(0.25, sinks=torch.ones(3, device=device))
        attend(launch_now, out, out, *args[:3], few, scratch)
