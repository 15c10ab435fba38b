"""A whole step of a model in one call on the compiled CPU kernels (csrc/exact/decoder.h).

transformers' code around our kernels takes 10 ms of every step on two cores and gives up the interpreter lock 1,500
times; here both are next to nothing, so other threads (uploads, HTTP) and the engine hardly notice each other. A model
is run this way only if, tried at start, every logit has the bits that its modules give; others keep their modules.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loramux_adapters.lora.ops import LoraRows
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache
from loramux_server.kernels.attention.paged_attention import Attend, AttentionParams, AttentionStep
from loramux_server.kernels.compiled.abi import POINTER, ExactStep
from loramux_server.kernels.compiled.adapter_kernels import rows_of
from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.decoder.description import Description, NotOfThisShape, describe
from loramux_server.kernels.decoder.exact_model import KINDS, exact_model
from loramux_server.kernels.layers.rotary import use_angles

_TRIAL = (BLOCK_SIZE + 5, 3, 1)  # tokens of the sequences that a model is tried on
_FARTHEST = 1 << 20  # position that is looked at
_ROUNDED = 1e-5  # relative, of a rotation in fp32
_LAST_BITS = 2.0**-22  # of a logit, beside its soft cap: PyTorch's tanh and ours are two


class Decoder:
    """Runs steps of one model. Owner: the engine thread.

    The model's weights and the arenas of its adapters are read where they lie; they must outlive this object.

    Attributes:
        description: the model.
        exact: the description as the compiled code reads it.
    """

    def __init__(self, compiled: Compiled, description: Description) -> None:
        self.description = description
        self.exact = exact_model(description)
        self._step = compiled.function("loramux_exact_step")
        self._bytes = compiled.function("loramux_exact_scratch")
        self._isa = compiled.isa
        self._at = ctypes.addressof(self.exact.model)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._rows = self._positions = 0  # that scratch, and tables of angles, are enough for
        self._cos = self._sin = pointers_to([])
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._caches: tuple[KVCache, Any, Any, Any] | None = None

    def forward(
        self, tokens: list[int], heads: list[int], step: AttentionStep, lora: LoraRows | None, head: LoraRows | None
    ) -> torch.Tensor:
        """Logits [len(heads), vocabulary] fp32, a view; keys and values of all rows are in the cache afterwards.

        Args:
            tokens: the token of each row.
            heads: the rows, in order, whose logits are wanted.
            lora, head: adapters of all rows, and of the rows in `heads`.
        """
        return self._run(tokens, heads, step, lora, head, None)

    def first_tokens(
        self, tokens: list[int], heads: list[int], step: AttentionStep, lora: LoraRows | None, head: LoraRows | None
    ) -> tuple[torch.Tensor, list[int]]:
        """The same where of the rows in `heads` nothing but the first largest logit is asked for, which may be cheaper.

        Returns:
            (logits; the token for each of these rows). A token of -1 was not looked for: then the row's logits are
            there, and else they mean nothing.
        """
        first = np.empty(len(heads), dtype=np.int64)
        logits = self._run(tokens, heads, step, lora, head, first)
        return logits, first.tolist()

    def _run(
        self,
        tokens: list[int],
        heads: list[int],
        step: AttentionStep,
        lora: LoraRows | None,
        head: LoraRows | None,
        first: npt.NDArray[np.int64] | None,
    ) -> torch.Tensor:
        rows = len(tokens)
        if self._rows < rows:
            self._rows = rows
            self._scratch = torch.empty(int(self._bytes(self._at, rows)), dtype=torch.uint8)
        self._know_positions(max(first + count for _, _, count, first in step.runs))
        if self._caches is None or self._caches[0] is not step.cache:
            places = (pointers_to(tensors) for tensors in (step.cache.k, step.cache.v, step.cache.scales))
            self._caches = (step.cache, *places)
        ids, sampled = np.array(tokens, dtype=np.int64), np.array(heads, dtype=np.int64)
        logits = torch.empty(len(heads), self.exact.padded)
        entries, head_entries = rows_of(lora) if lora else None, rows_of(head) if head else None
        call = ExactStep(
            tokens=ids.ctypes.data,
            position=step.position.data_ptr(),
            sequence=step.sequence.data_ptr(),
            tables=step.tables.data_ptr(),
            sampled=sampled.ctypes.data,
            cos=ctypes.addressof(self._cos),
            sin=ctypes.addressof(self._sin),
            k_cache=ctypes.addressof(self._caches[1]),
            v_cache=ctypes.addressof(self._caches[2]),
            kv_scales=ctypes.addressof(self._caches[3]),
            lora=ctypes.addressof(entries) if entries else None,
            head_lora=ctypes.addressof(head_entries) if head_entries else None,
            scratch=self._scratch.data_ptr(),
            logits=logits.data_ptr(),
            first_tokens=None if first is None else first.ctypes.data,
            rows=rows,
            samples=len(heads),
            table_width=step.tables.shape[1],
            threads=torch.get_num_threads(),
        )
        self._step(self._at, ctypes.addressof(call), self._isa)
        return logits[:, : self.description.vocabulary]

    def _know_positions(self, count: int) -> None:
        if self._positions < count:
            angles = self.description.angles
            for table in angles:
                table.know(count)
            self._cos, self._sin = (pointers_to(part) for part in zip(*((a.cos, a.sin) for a in angles), strict=True))
            self._tables = [(a.cos, a.sin) for a in angles]  # modules may make a table longer, and elsewhere
            self._positions = min(len(a.cos) for a in angles)


class Trial:
    """A model's own modules on sequences of several lengths, with a cache of its own, to compare a step with.

    Adapters are not tried: the slots hold none yet.

    Attributes:
        asked: what each layer asked of its attention.
    """

    def __init__(self, attend: Attend, model: Any, cache: KVCache) -> None:
        """`attend`: the attention that modules run on; with its bits the step's are compared."""
        seen: dict[int, AttentionParams] = {}

        def record(q: Any, k: Any, v: Any, layer: int, step: AttentionStep, params: AttentionParams) -> torch.Tensor:
            seen[layer] = params
            return attend(q, k, v, layer, step, params)

        blocks = [-(-length // BLOCK_SIZE) for length in _TRIAL]
        device = cache.device
        self._step = _step_of(KVCache(cache.shape, sum(blocks), device), record, blocks)
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().num_embeddings
        self._tokens = torch.randint(vocabulary, (sum(_TRIAL),), generator=generator).tolist()
        self._rows = list(range(len(self._tokens)))
        self._expected: torch.Tensor = model(
            input_ids=torch.tensor([self._tokens]),
            position_ids=self._step.position[None].long(),
            logits_to_keep=torch.tensor(self._rows),
            use_cache=False,
            loramux_step=self._step,
        ).logits[0]
        if sorted(seen) != list(range(cache.shape.layers)):
            raise NotOfThisShape("some layers have no attention")
        self.asked = [seen[layer] for layer in range(cache.shape.layers)]
        self._far = _FarOut(model, self._step)

    def compare(self, decoder: Decoder) -> None:
        """Raises NotOfThisShape: it gives other logits than the modules."""
        model, expected = decoder.exact.model, self._expected
        cap, model.logit_softcap = model.logit_softcap, 0.0
        try:
            got = decoder.forward(self._tokens, self._rows, self._step, None, None)
        finally:
            model.logit_softcap = cap
        _demand(torch.tanh(got / cap) * cap if cap else got, expected)  # PyTorch's own tanh is the modules' last word
        first = _TRIAL[0]  # once more without the longest; of rows without logits the last layer computes less
        step = replace(
            self._step,
            sequence=self._step.sequence[first:],
            position=self._step.position[first:],
            runs=tuple((index, row - first, count, start) for index, row, count, start in self._step.runs[1:]),
        )
        some = [1, 3]
        _demand(decoder.forward(self._tokens[first:], some, step, None, None), expected[first:][some], cap * _LAST_BITS)
        self._far.compare(decoder.description)


class _FarOut:
    """What a model's attention is given for one token at positions up to the last that it knows.

    Some models change their queries with the position, but only far out, where no trial can go: here attention adds
    nothing, so a layer's input does not depend on the position, and queries and keys may only turn.
    """

    def __init__(self, model: Any, step: AttentionStep) -> None:
        longest = min(getattr(model.config, "max_position_embeddings", None) or _TRIAL[0], _FARTHEST)
        self._positions = torch.tensor([0, longest // 3, longest // 2, longest - 1])
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

        def record(q: Any, k: Any, v: Any, layer: int, step: AttentionStep, params: AttentionParams) -> torch.Tensor:
            self._seen[layer] = q.clone(), k.clone(), v.clone()
            return torch.zeros_like(q)

        position = self._positions[None]
        model(
            input_ids=torch.ones_like(position),
            position_ids=position,
            logits_to_keep=torch.tensor([0]),
            use_cache=False,
            loramux_step=replace(step, attend=record),
        )

    def compare(self, description: Description) -> None:
        for index, (q, k, v) in self._seen.items():
            number = description.layers[index].rotary
            for x, table in ((q, number), (k, number), (v, -1)):
                expected = x[:1].expand_as(x).clone()  # at position 0 nothing turns
                if table >= 0:
                    angles = description.angles[table]
                    factor, _ = angles.at(self._positions[:1])
                    cos, sin = (part[:, None] / factor for part in angles.at(self._positions))
                    low, high = x[:1, :, : angles.pairs], x[:1, :, angles.pairs : 2 * angles.pairs]
                    turned = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
                    expected[..., : 2 * angles.pairs] = turned
                if not (x - expected).abs().max() <= _ROUNDED * x.abs().max():
                    raise NotOfThisShape(f"queries or keys of layer {index} do more than turn with their position")


def _demand(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.0) -> None:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise NotOfThisShape(f"its modules give logits {tuple(expected.shape)} of {expected.dtype}")
    difference = float((got - expected).abs().max())
    if not difference <= tolerance:  # a NaN is not
        raise NotOfThisShape(f"its modules compute something else: a logit differs by {difference:.2g}")


@torch.inference_mode()
def compile_decoder(compiled: Compiled, attend: Attend, model: Any, cache: KVCache) -> Decoder | str:
    """The compiled step for a model that runs on our attention already; or why it has to run module by module.

    `attend` and the layers' adapters are those that the step itself runs on (choice.py sees to it).
    """
    try:
        return decoder_for(compiled, attend, model, cache)
    except NotOfThisShape as reason:
        return str(reason)


@torch.inference_mode()
def decoder_for(compiled: Compiled, attend: Attend, model: Any, cache: KVCache) -> Decoder:
    """Raises NotOfThisShape: the model cannot be run in one call."""
    use_angles(model, compiled.library)
    trial = Trial(attend, model, cache)
    decoder = Decoder(compiled, describe(model, cache.shape, trial.asked, KINDS))
    trial.compare(decoder)
    return decoder


def pointers_to(tensors: Iterable[torch.Tensor]) -> Any:
    places = [tensor.data_ptr() for tensor in tensors]
    return (POINTER * len(places))(*places)


def _step_of(cache: KVCache, attend: Attend, blocks: list[int]) -> AttentionStep:
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
