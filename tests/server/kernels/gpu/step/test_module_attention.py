"""A whole step's attention kernels behind a base's modules: against the reference, and equal bits however cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loramux_server.kernels.attention.kv_cache import KVCache, KVShape
from loramux_server.kernels.attention.paged_attention import AttentionParams, AttentionStep, attend_reference
from loramux_server.kernels.gpu.step import module_attention
from loramux_server.kernels.gpu.step.module_attention import TritonAttend, triton_attend
from support.emulated import EmulatedDevice

SHAPE = KVShape(2, 2, 16, torch.float16)
HEADS = 6
TABLES = [[5, 1, 3], [2, 0, 4]]
LENGTHS = (40, 21)
PARAMS = [
    AttentionParams(0.25),
    AttentionParams(0.25, softcap=3.0, window=9),
    AttentionParams(0.25, chunk=15),
    AttentionParams(0.25, window=18, sinks=torch.linspace(-3, 4, HEADS).half()),
]


class Steps:
    """Two sequences on a device of their own, with keys and values of two layers in a cache that is NaN elsewhere."""

    def __init__(self, attend: Any, device: EmulatedDevice) -> None:
        self.attend, self.device, self.cache = attend, device, KVCache(SHAPE, 6, device)
        for layer in (*self.cache.k, *self.cache.v):
            device.fill(layer, float("nan"))
        random = torch.Generator().manual_seed(3)
        self.q, self.k, self.v = (
            [torch.randn(length, heads, 16, generator=random).half() for length in LENGTHS] for heads in (HEADS, 2, 2)
        )

    def run(self, chunks: list[tuple[int, int, int]], params: AttentionParams) -> list[torch.Tensor]:
        """chunks: (sequence, first position, number of rows); what each has of the second of two layers."""
        put, runs, row = self.device.put, [], 0
        for at, (_, first, count) in enumerate(chunks):
            runs.append((at, row, count, first))
            row += count
        sequence = [at for at, _, count, _ in runs for _ in range(count)]
        position = [first + i for _, _, count, first in runs for i in range(count)]
        owner, place = (put(torch.tensor(them, dtype=torch.int32)) for them in (sequence, position))
        tables = put(torch.tensor([TABLES[one] for one, _, _ in chunks], dtype=torch.int32))
        step = AttentionStep(self.cache, self.attend, tables, owner, place, tuple(runs))
        if params.sinks is not None:
            params = replace(params, sinks=put(params.sinks))
        with self.device.used(), torch.inference_mode():
            q, k, v = (
                put(torch.cat([part[one][first : first + count] for one, first, count in chunks]))
                for part in (self.q, self.k, self.v)
            )
            for layer in range(2):
                out = self.attend(q * (1 - layer / 2), k, v, layer, step, params)
            return list(self.device.take(out).split([count for *_, count in chunks]))


@pytest.mark.parametrize("params", PARAMS, ids=["plain", "cap and window", "chunks", "sinks and window"])
def test_it_gives_what_the_reference_gives_and_the_same_bits_however_a_prompt_is_cut(params: AttentionParams) -> None:
    device = EmulatedDevice(early=0.3, seed=1)
    ours = Steps(TritonAttend(device), device)
    whole = ours.run([(0, 0, 40), (1, 0, 21)], params)
    for mine, theirs in zip(whole, Steps(attend_reference, device).run([(0, 0, 40), (1, 0, 21)], params), strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.01, atol=0.01)
    other = Steps(TritonAttend(device), device)
    first = other.run([(0, 0, 17)], params)[0]
    second, alone = other.run([(0, 17, 22), (1, 0, 21)], params)
    (last,) = other.run([(0, 39, 1)], params)
    assert torch.equal(torch.cat([first, second, last]), whole[0]) and torch.equal(alone, whole[1])


def test_it_is_not_taken_where_it_does_not_fit_or_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    device, attend = EmulatedDevice(), module_attention.attend
    assert triton_attend(device, SHAPE) is not None
    for shape in (KVShape(1, 2, 24, torch.float16), KVShape(1, 2, 16, torch.bfloat16), KVShape(1, 1, 272)):
        assert triton_attend(device, shape) is None

    def without_sinks(launch: Any, *given: Any) -> None:
        *others, params, scratch = given
        attend(launch, *others, replace(params, sinks=None), scratch)

    def fails(*given: Any) -> None:
        raise RuntimeError("ptxas fatal: out of registers")

    for wrong in (without_sinks, fails):
        monkeypatch.setattr(module_attention, "attend", wrong)
        assert triton_attend(device, SHAPE) is None
