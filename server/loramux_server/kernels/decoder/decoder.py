"""A whole step of a model in one call on the compiled CPU kernels (csrc/exact/decoder.h).

transformers' code around our kernels takes 10 ms of every step on two cores and gives up the interpreter lock 1,500
times; here both are next to nothing, so other threads (uploads, HTTP) and the engine hardly notice each other. A model
is run this way only if, tried at start, every logit has the bits that its modules give; others keep their modules.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loramux_adapters.lora.ops import LoraRows
from loramux_adapters.lora.token_rows import StepTokens
from loramux_server.kernels.attention.kv_cache import KVCache
from loramux_server.kernels.attention.paged_attention import Attend, AttentionStep
from loramux_server.kernels.compiled.abi import POINTER, ExactStep, TokenLogits
from loramux_server.kernels.compiled.adapter_kernels import rows_of
from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.compiled.token_logits import never, token_logits_of
from loramux_server.kernels.decoder.description import Description, NotOfThisShape, describe
from loramux_server.kernels.decoder.exact_model import KINDS, exact_model
from loramux_server.kernels.decoder.trial import BLOCKS, Trial
from loramux_server.kernels.decoder.whole_step import StepLimits
from loramux_server.kernels.layers.rotary import use_angles

_LAST_BITS = 2.0**-22  # of a logit, beside its soft cap: PyTorch's tanh and ours are two


class Decoder:
    """Runs steps of one model. Owner: the engine thread.

    The model's weights and the arenas of its adapters are read where they lie; they must outlive this object.

    Attributes:
        description: the model.
        exact: the description as the compiled code reads it.
        in_words, notes, equal_bits, replaced: as `WholeStep` has them; no notes: the code is the same on every
            processor.
    """

    in_words = "a step is one compiled call"
    notes: tuple[str, ...] = ()
    equal_bits = True
    replaced: tuple[str, ...] = ()

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
        self._states = torch.empty(0, description.hidden)  # of the step that ran last
        self._caches: tuple[KVCache, Any, Any, Any] | None = None

    def forward(
        self,
        tokens: Sequence[int],
        heads: Sequence[int],
        step: AttentionStep,
        lora: LoraRows | None,
        head: LoraRows | None,
        *,
        states: int = 0,
        own: StepTokens | None = None,
    ) -> torch.Tensor:
        """As `WholeStep.forward` says."""
        return self._run(tokens, heads, step, lora, head, None, states, own)

    def states(self, count: int) -> torch.Tensor:
        """As `WholeStep.states` says."""
        assert len(self._states) == count, "asked of another step than the last"
        return self._states

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
        tokens: Sequence[int],
        heads: Sequence[int],
        step: AttentionStep,
        lora: LoraRows | None,
        head: LoraRows | None,
        first: npt.NDArray[np.int64] | None,
        states: int = 0,
        own: StepTokens | None = None,
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
        logits = torch.empty(len(heads) - states, self.exact.padded)
        self._states = torch.empty(states, self.description.hidden)
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
            states=self._states.data_ptr(),
            rows=rows,
            samples=len(heads),
            states_only=states,
            table_width=step.tables.shape[1],
            threads=torch.get_num_threads(),
        )
        known = logits[:, : self.description.vocabulary]
        if own is None:
            self._step(self._at, ctypes.addressof(call), self._isa)
            return known
        ids[own.unknown] = -1
        wide = never(len(logits), own.more)
        token_logits = (TokenLogits * len(own.logits))(*map(token_logits_of, own.logits))
        call.token_logits, call.num_token_logits = ctypes.addressof(token_logits), len(own.logits)
        call.wide, call.num_wide = wide.data_ptr(), wide.shape[1]
        if own.embeddings.size:
            call.own_embeddings, call.own_embedding_of = (
                part.ctypes.data for part in (own.embeddings, own.embedding_of)
            )
        self._step(self._at, ctypes.addressof(call), self._isa)
        return torch.cat([known, wide[:, : own.more]], dim=1) if own.more else known

    def _know_positions(self, count: int) -> None:
        if self._positions < count:
            angles = self.description.angles
            for table in angles:
                table.know(count)
            self._cos, self._sin = (pointers_to(part) for part in zip(*((a.cos, a.sin) for a in angles), strict=True))
            self._tables = [(a.cos, a.sin) for a in angles]  # modules may make a table longer, and elsewhere
            self._positions = min(len(a.cos) for a in angles)


def compare(trial: Trial, decoder: Decoder) -> None:
    """Raises NotOfThisShape: it gives other logits than the modules."""
    model, expected = decoder.exact.model, trial.expected
    cap, model.logit_softcap = model.logit_softcap, 0.0
    try:
        got = trial.all_rows(decoder)
    finally:
        model.logit_softcap = cap
    _demand(torch.tanh(got / cap) * cap if cap else got, expected)  # PyTorch's own tanh is the modules' last word
    _demand(*trial.some_rows(decoder), cap * _LAST_BITS)
    trial.compare_far_out(decoder.description)


def _demand(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.0) -> None:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise NotOfThisShape(f"its modules give logits {tuple(expected.shape)} of {expected.dtype}")
    difference = float((got - expected).abs().max())
    if not difference <= tolerance:  # a NaN is not
        raise NotOfThisShape(f"its modules compute something else: a logit differs by {difference:.2g}")


@torch.inference_mode()
def compile_decoder(
    compiled: Compiled, attend: Attend, model: Any, cache: KVCache, limits: StepLimits, progress: Callable[[str], None]
) -> Decoder | str:
    """The compiled step for a model that runs on our attention already; or why it has to run module by module.

    `attend` and the layers' adapters are those that the step itself runs on (choice.py sees to it). Memory is taken as
    steps need it, so the limits do not matter.
    """
    try:
        return decoder_for(compiled, attend, model, cache)
    except NotOfThisShape as reason:
        return str(reason)


@torch.inference_mode()
def decoder_for(compiled: Compiled, attend: Attend, model: Any, cache: KVCache) -> Decoder:
    """Raises NotOfThisShape: the model cannot be run in one call."""
    use_angles(model, compiled.library)
    own = KVCache(cache.shape, sum(BLOCKS), cache.device)  # what is never written to takes no memory
    trial = Trial(attend, model, own)
    decoder = Decoder(compiled, describe(model, cache.shape, trial.asked, KINDS))
    compare(trial, decoder)
    return decoder


def pointers_to(tensors: Iterable[torch.Tensor]) -> Any:
    places = [tensor.data_ptr() for tensor in tensors]
    return (POINTER * len(places))(*places)
