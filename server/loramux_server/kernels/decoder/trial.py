"""A model's own modules on a few sequences: what a whole step is compared with before it takes their place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache
from loramux_server.kernels.attention.paged_attention import Attend, AttentionParams, AttentionStep
from loramux_server.kernels.decoder.description import Description, NotOfThisShape
from loramux_server.kernels.decoder.whole_step import WholeStep

LENGTHS = (BLOCK_SIZE + 5, 3, 1)  # tokens of the sequences that a model is tried on
BLOCKS = tuple(-(-length // BLOCK_SIZE) for length in LENGTHS)
_SOME = [1, 3]  # rows whose logits are wanted where the longest sequence is left out
_FARTHEST = 1 << 20  # position that is looked at
_ROUNDED = 1e-5  # relative, of a rotation in fp32


class Trial:
    """A model's own modules on sequences of several lengths, to compare a step with.

    Adapters are not tried: the slots hold none yet.

    Attributes:
        asked: what each layer asked of its attention.
        expected: [rows, vocabulary] logits of all rows.
    """

    def __init__(self, attend: Attend, model: Any, cache: KVCache) -> None:
        """
        Args:
            attend: the attention that modules run on; with its bits the step's are compared.
            cache: nobody's yet; the first sum(BLOCKS) of its blocks are written to.
        Raises:
            NotOfThisShape: some layers have no attention.
        """
        seen: dict[int, AttentionParams] = {}

        def record(q: Any, k: Any, v: Any, layer: int, step: AttentionStep, params: AttentionParams) -> torch.Tensor:
            seen[layer] = params
            return attend(q, k, v, layer, step, params)

        self._step = _step_of(cache, record)
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().num_embeddings
        self._tokens: list[int] = torch.randint(vocabulary, (sum(LENGTHS),), generator=generator).tolist()
        self._rows = list(range(len(self._tokens)))
        device = cache.device
        self.expected: torch.Tensor = model(
            input_ids=device.put(torch.tensor([self._tokens])),
            position_ids=device.put(self._step.position[None].long()),
            logits_to_keep=device.put(torch.tensor(self._rows)),
            use_cache=False,
            loramux_step=_on_device(self._step),
        ).logits[0]
        if sorted(seen) != list(range(cache.shape.layers)):
            raise NotOfThisShape("some layers have no attention")
        self.asked = [seen[layer] for layer in range(cache.shape.layers)]
        self._far = _FarOut(model, self._step)

    def all_rows(self, step: WholeStep) -> torch.Tensor:
        """Logits [rows, vocabulary] of a whole step, as `expected` has them."""
        return step.forward(self._tokens, self._rows, self._step, None, None)

    def some_rows(self, step: WholeStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Once more without the longest sequence, of two rows: of rows without logits the last layer computes less.

        Returns:
            Logits [2, vocabulary], and those that are expected.
        """
        first = LENGTHS[0]
        part = replace(
            self._step,
            sequence=self._step.sequence[first:],
            position=self._step.position[first:],
            runs=tuple((index, row - first, count, start) for index, row, count, start in self._step.runs[1:]),
        )
        return step.forward(self._tokens[first:], _SOME, part, None, None), self.expected[first:][_SOME]

    def compare_far_out(self, description: Description) -> None:
        """Raises NotOfThisShape: at some position queries or keys do more than the description says."""
        self._far.compare(description)


class _FarOut:
    """What a model's attention is given for one token at positions up to the last that it knows.

    Some models change their queries with the position, but only far out, where no trial can go: here attention adds
    nothing, so a layer's input does not depend on the position, and queries and keys may only turn.
    """

    def __init__(self, model: Any, step: AttentionStep) -> None:
        longest = min(getattr(model.config, "max_position_embeddings", None) or LENGTHS[0], _FARTHEST)
        self._positions = torch.tensor([0, longest // 3, longest // 2, longest - 1])
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        device = step.cache.device

        def record(q: Any, k: Any, v: Any, layer: int, step: AttentionStep, params: AttentionParams) -> torch.Tensor:
            first, second, third = (device.take(x).clone() for x in (q, k, v))
            self._seen[layer] = first, second, third
            return torch.zeros_like(q)

        position = self._positions[None]
        model(
            input_ids=device.put(torch.ones_like(position)),
            position_ids=device.put(position),
            logits_to_keep=device.put(torch.tensor([0])),
            use_cache=False,
            loramux_step=replace(_on_device(step), attend=record, position=device.put(self._positions.int())),
        )

    def compare(self, description: Description) -> None:
        for index, (q, k, v) in self._seen.items():
            number = description.layers[index].rotary
            for x, table in ((q, number), (k, number), (v, -1)):
                expected = x[:1].float().expand(x.shape).clone()  # at position 0 nothing turns
                if table >= 0:
                    angles = description.angles[table]
                    factor, _ = angles.at(self._positions[:1])
                    cos, sin = (part[:, None] / factor for part in angles.at(self._positions))
                    low, high = x[:1, :, : angles.pairs].float(), x[:1, :, angles.pairs : 2 * angles.pairs].float()
                    turned = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
                    expected[..., : 2 * angles.pairs] = turned
                if not (x.float() - expected).abs().max() <= _rounded(x.dtype) * x.float().abs().max():
                    raise NotOfThisShape(f"queries or keys of layer {index} do more than turn with their position")


def _rounded(dtype: torch.dtype) -> float:
    """Relative, of what was rotated in a dtype: angles, products and sum are rounded, and so is what they turn."""
    return _ROUNDED if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


def _step_of(cache: KVCache, attend: Attend) -> AttentionStep:
    """A step that feeds sequences of `LENGTHS` tokens from their beginning; its tables in host memory."""
    tables = torch.zeros(len(BLOCKS), max(BLOCKS), dtype=torch.int32)
    runs, row, block = [], 0, 0
    for index, (length, count) in enumerate(zip(LENGTHS, BLOCKS, strict=True)):
        tables[index, :count] = torch.arange(block, block + count)
        runs.append((index, row, length, 0))
        row, block = row + length, block + count
    return AttentionStep(
        cache=cache,
        attend=attend,
        tables=tables,
        sequence=torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).int(),
        position=torch.cat([torch.arange(length) for length in LENGTHS]).int(),
        runs=tuple(runs),
    )


def _on_device(step: AttentionStep) -> AttentionStep:
    """As modules take it."""
    put = step.cache.device.put
    return replace(step, tables=put(step.tables), sequence=put(step.sequence), position=put(step.position))
