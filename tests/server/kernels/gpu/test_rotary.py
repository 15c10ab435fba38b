"""Norms, rotation and the way into the cache, against the slow reference."""

from __future__ import annotations

import pytest
import torch

from loramux_server.kernels.gpu.launch import launch_now
from loramux_server.kernels.gpu.rotary import rotate_and_write, rotate_and_write_reference
from loramux_server.kernels.layers.recognition import RMSNorm
from support.attention_steps import Chunk, Paged

CHUNKS: list[Chunk] = [(1, 17, 2), (0, 0, 3)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "pairs", "norm", "dtype"),
    [
        (4, 2, 32, 16, "", None),
        (18, 2, 64, 32, "head", torch.float32),
        (3, 3, 96, 24, "all", None),
        (9, 1, 80, 0, "", torch.float32),
        (4, 4, 16, 8, "all", torch.float32),
        (2, 1, 256, 0, "head", None),
    ],
)
def test_rotation_agrees_with_its_reference_and_touches_nothing_else(
    device: torch.device,
    act: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    pairs: int,
    norm: str,
    dtype: torch.dtype,
) -> None:
    paged = Paged([3, 19], kv_heads=kv_heads, device=device, act=act, group=heads // kv_heads, head_dim=dim)
    tables = paged.tables(CHUNKS)
    random = torch.Generator().manual_seed(dim)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(device)

    qkv = (3 * normal(7, (heads + 2 * kv_heads) * dim)).to(dtype or act)
    cos, sin = (normal(20, pairs), normal(20, pairs)) if pairs else (None, None)
    norms = {}
    if norm:
        for name, count in (("q_norm", heads), ("k_norm", kv_heads)):
            norms[name] = RMSNorm(normal(dim if norm == "head" else count * dim), 1e-5)
    found = []
    for way in (rotate_and_write, rotate_and_write_reference):
        tensors = [torch.full((7, heads * dim), 5, dtype=act, device=device)]
        tensors += [torch.full_like(paged.k_cache, 7) for _ in range(2)]
        q_out, k_cache, v_cache = tensors
        first = (launch_now,) if way is rotate_and_write else ()
        way(*first, q_out, qkv, cos, sin, k_cache, v_cache, tables, **norms)  # type: ignore[arg-type]
        found.append(tensors)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.002, atol=0.002)
    assert (found[0][0][5:] == 5).all()
    assert int((found[0][1] != 7).any(-1).sum()) == 5 * kv_heads


@pytest.mark.parametrize("broken", ["key", "value", "key too large"])
def test_a_token_that_is_not_finite_has_a_key_of_nan_and_values_of_zero(
    device: torch.device, act: torch.dtype, broken: str
) -> None:
    paged = Paged([3, 19], kv_heads=2, device=device, act=act, group=1, head_dim=16)
    tables = paged.tables(CHUNKS)
    qkv = torch.ones(5, 6, 16, device=device)
    head = {"key": 2, "value": 4, "key too large": 2}[broken]
    qkv[1, head, 3] = torch.nan if broken != "key too large" else 3e38
    if broken == "key too large":
        qkv[1, head, 3] *= 2
    for cache in (paged.k_cache, paged.v_cache):
        cache.fill_(1)
    q_out = torch.zeros(5, 32, dtype=act, device=device)
    rotate_and_write(launch_now, q_out, qkv.flatten(1), None, None, paged.k_cache, paged.v_cache, tables)
    block, at = int(paged.blocks[1][18 // 16]), 18 % 16
    assert paged.k_cache[block, at, 0].isnan().all()
    assert (paged.v_cache[block, at, 0] == 0).all()
    assert int(paged.k_cache.isnan().sum()) == int((paged.v_cache == 0).sum()) == 16
    assert (q_out == 1).all()
