"""A sequence: one prompt and its reply, as the engine sees it, and the messages around it. No torch here."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from loramux_adapters.lora.slots import ScaledSlot, Slot
    from loramux_server.engine.scheduling.grammar import Grammar


Flow = tuple[str, ...]  # among whom the engine shares fairly: a path, from the outside in
BACKGROUND = "background"  # the outer level of the server's own work: together it is one among the others

NOTHING_ALLOWED = (
    "no token may be chosen: what the request allows and what it forbids (grammar, allowed_token_ids, bad_words, "
    "min_tokens) leave none"
)
NOT_FINITE = "the model's output is not finite; the adapter may be broken"  # the error of a row, and of that row alone


class FinishReason(Enum):
    """Why a reply ended; always the true cause."""

    STOP = "stop"  # the model's end token, or a stop string that the API found
    LENGTH = "length"  # max_tokens or the context is used up
    ABORT = "abort"  # the client left
    ERROR = "error"  # the engine gave it up; `TokenOutput.error` says why


Pooling = Literal["last", "mean"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and what is reported.

    Log probabilities are of the model's own distribution. A token is chosen from another: of a row of logits x, in fp32
    and in this order, x + bias; where the token was there before, divided by `repetition_penalty` if it is positive,
    else multiplied by it; where the reply has it n times, less `frequency_penalty` * n + `presence_penalty`. What is
    forbidden is never chosen; where nothing is left, the sequence ends with an error. `temperature` 0 takes the
    largest; it and the filters below mean nothing then.

    Attributes:
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this; 1.0 keeps all.
        min_p: keep tokens at least this share of the most likely one's probability; 0.0 keeps all.
        seed: of this sequence's own generator; None draws one from the operating system.
        max_tokens: most tokens in the reply, at least 1; or 0 where log probabilities of given text are all that is
            asked for.
        logprobs: how many alternatives to report beside each chosen token; None reports nothing.
        presence_penalty, frequency_penalty: over the reply so far.
        repetition_penalty: over prompt and reply so far; above 0.
        logit_bias: (token, what is added to its logit), each token once.
        allowed_token_ids: no other may be chosen, but for `stop_token_ids`; None allows all.
        bad_words: the reply never ends in one of these sequences of tokens.
        min_tokens: no stop token before the reply has so many.
        grammar: what the reply may be. Of this sequence alone.
        stop_token_ids: the reply ends, with reason "stop", when one of these is chosen; that one is not delivered.
        forced: these tokens are the reply, whatever the model would choose, to hear how likely they are; as many as
            `max_tokens`. Empty: the model's own choice. All that is said above of how one is chosen means nothing then.
        digests: report a digest of all logits beside each token.
        prompt_logprobs: how many alternatives to report beside the log probability of each prompt token; None reports
            nothing. The first token follows nothing, so it has none.
        prompt_logprobs_from: index of the first prompt token that is reported.
        pooling: in place of a reply (`max_tokens` is 0) report what the output head reads: of the prompt's last token,
            or the mean over all of its tokens. The mean needs every token computed, so nothing is found in the cache.
        continuations: texts of at least one token that might follow the prompt, to hear how likely each of their tokens
            is. The reply follows the prompt, not them.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    grammar: Grammar | None = None
    seed: int | None = None
    max_tokens: int = 16
    logprobs: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    forced: tuple[int, ...] = ()
    digests: bool = False
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1
    pooling: Pooling | None = None
    continuations: tuple[tuple[int, ...], ...] = ()

    @property
    def changes_logits(self) -> bool:
        """Whether a token may be chosen from others than the model's own logits. A reply that is `forced` is not."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        limits = self.allowed_token_ids is not None or self.bad_words or self.min_tokens or self.grammar is not None
        return bool(penalties or self.logit_bias or limits) and not self.forced

    @property
    def changes_by_tokens(self) -> bool:
        """Whether what is changed depends on which tokens the reply has: on how many it has alone it may always."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return self.changes_logits and bool(penalties or self.bad_words or self.grammar is not None)

    @property
    def scores_text(self) -> bool:
        """Whether log probabilities of given text are asked for."""
        return self.prompt_logprobs is not None or bool(self.continuations)

    @property
    def least_tokens(self) -> int:
        """What `max_tokens` must be at least."""
        return 0 if self.scores_text or self.pooling else 1


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of a token (before temperature and filters) and of the most likely ones.

    Attributes:
        is_greedy: greedy decoding would choose this token.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    is_greedy: bool = False


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step produced for one sequence: engine thread -> event loop.

    Attributes:
        token_id: the new token; None when the sequence ended without one (abort, error).
        finish_reason: set on the last output of a sequence, and only there.
        error: for the client, with reason ERROR: one sentence, no path, no traceback.
        is_impossible: the error is that the request's own shape and options leave nothing that may come.
        queue_seconds: submit to first scheduled, set on the first token's output.
        first_token_seconds: submit to first token, set on the first token's output.
        cached_tokens: of the prompt, those that did not have to be computed, set on the first token's output.
        stopped_by: the stop token that ended the reply; with reason STOP, where one did.
        stopped_logprob: its log probability, where log probabilities were asked for.
        digest: of the logits that the token was chosen from, where that was asked for.
        prompt_logprobs: of the prompt's tokens, where that was asked for; set on the first token's output, or on the
            last one of a sequence without a reply.
        continuations: the log probabilities of each of `SamplingParams.continuations`, set on the last output.
        pooled: what `SamplingParams.pooling` asks for, [hidden] fp64, on the last output.
    """

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    is_impossible: bool = False
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    cached_tokens: int = 0
    stopped_by: int | None = None
    stopped_logprob: TokenLogprob | None = None
    digest: bytes | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    continuations: tuple[tuple[TokenLogprob, ...], ...] = ()
    pooled: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True, order=True)
class AdapterUse:
    """One adapter of a sequence.

    Attributes:
        version: digest of the adapter version.
        rank: its largest rank: what it needs in the device's slots.
        nbytes: bound of what it takes in host memory.
        scale: factor of its delta.
    """

    version: str
    rank: int
    nbytes: int = 0
    scale: float = 1.0


class SequenceStatus(Enum):
    WAITING = "waiting"  # in the scheduler's queue
    RUNNING = "running"  # holds KV blocks, and a slot for each adapter
    FINISHED = "finished"


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """One prompt and its reply. Built by the API, then owned by the engine thread until it is FINISHED.

    Attributes:
        id: the request id, unique among live sequences.
        prompt: token ids, at least one.
        adapters: the sum of their deltas is added to the base; none runs the bare base. Summed in this order, so that
            who composes them must fix it: `composed` does.
        adapter: the name it was asked for under, for logs and metrics, several joined by "+"; None for the base.
        background: the server's own work. It runs on what ordinary sequences leave over, and metrics do not count it.
        shares_prompt_with: id of a sequence with the same prompt and adapters, handed over with this one and before it:
            its prompt is waited for, so that the complete blocks of it are found. If it ends before, this one reads the
            prompt itself.
        tenant: whose it is; None is the operator's. Tenants share the engine fairly, and each between its adapters.
        weight: of its tenant's share.
        priority: of its tenant: higher ones go first.
        cache_group: keys and values of its tokens are shared with sequences of the same group alone.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    adapters: tuple[AdapterUse, ...] = ()
    adapter: str | None = None
    background: bool = False
    shares_prompt_with: str | None = None
    tenant: str | None = None
    weight: int = 1
    priority: int = 0
    cache_group: str = ""
    arrived: float = field(default_factory=time.monotonic)
    flow: Flow = field(init=False)  # ends with the set of its versions: those of one flow need the same on the device

    # filled by the scheduler
    status: SequenceStatus = SequenceStatus.WAITING
    is_long: bool = False  # the base turns its positions as it does in long texts (kernels/layers/rotary.py)
    waits_for_mask: bool = False  # a step read its newest token, and its mask was not there: it is to be read again
    promoted: bool = False  # a background sequence that has waited so long that it counts as an ordinary one
    slots: tuple[ScaledSlot, ...] = ()  # while it runs: one for each of `adapters`, in their order
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its complete blocks, as far as they were asked for
    num_cached: int = 0  # tokens of the prompt whose keys and values were there before it started
    num_computed: int = 0  # tokens of prompt + reply (or the continuation) whose keys and values are in the cache, or
    # will be when the steps that were scheduled are done
    scheduled_at: float | None = None  # first time in a batch

    # filled by the engine's update
    output: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    continuation_logprobs: list[list[TokenLogprob]] = field(default_factory=list)  # none before the prompt is read
    num_read: int = 0  # continuations that have been read
    pooled: npt.NDArray[np.float64] | None = None  # the sum over what was read, or the last
    last_output: TokenOutput | None = None  # held back until all continuations are read
    first_token_at: float | None = None
    last_token_at: float | None = None

    def __post_init__(self) -> None:
        versions = sorted({use.version for use in self.adapters})
        # A sum of adapters shares with the first of them: else whoever asks for ever new sums would get most turns.
        share = BACKGROUND if self.background else "".join(versions[:1])
        self.flow = (self.tenant or "", share, "+".join(versions))

    @property
    def gives_way(self) -> bool:
        """It runs only where no ordinary sequence wants to."""
        return self.background and not self.promoted

    @property
    def sits_out(self) -> bool:
        """What may come next is not known yet, so that a step could not choose it."""
        grammar = None if self.params.forced else self.params.grammar
        if grammar is None or not (self.waits_for_mask or (grammar.is_slow and not self.in_prefill)):
            return False
        return not grammar.is_ready

    @property
    def num_tokens(self) -> int:
        """Prompt and reply so far."""
        return len(self.prompt) + len(self.output)

    @property
    def max_total(self) -> int:
        """Most tokens that will ever need a place in the cache (the last one chosen is never fed back)."""
        return len(self.prompt) + max(self.params.max_tokens, *map(len, self.params.continuations), 1) - 1

    @property
    def continuation(self) -> tuple[int, ...]:
        """The one that is being read; none before the prompt is, and none when all are.

        Continuations are read one after the other between the prompt and the second token of the reply, each over the
        keys and values of the one before.
        """
        if self.num_read == len(self.continuation_logprobs):
            return ()
        return self.params.continuations[self.num_read]

    @property
    def in_prefill(self) -> bool:
        """True while part of the prompt, or of the continuation that is being read, is not in the cache yet."""
        return self.num_computed < len(self.prompt) or self.num_read < len(self.continuation_logprobs)

    @property
    def num_uncomputed(self) -> int:
        """Tokens of these that are not in the cache yet (a continuation's last token never will be)."""
        return max(0, len(self.prompt) + max(0, len(self.continuation) - 1) - self.num_computed)

    @property
    def logits_from(self) -> int:
        """The first position that is followed to the output head: the prompt's last, the first that scores a prompt
        token, or the first of a mean."""
        last = len(self.prompt) - 1
        if self.params.pooling == "mean":
            return 0
        if self.params.prompt_logprobs is None:
            return last
        return min(last, max(0, self.params.prompt_logprobs_from - 1))

    @property
    def ends_with_prompt(self) -> bool:
        """True once the prompt is read, if there is to be no reply."""
        return not self.params.max_tokens and self.num_computed >= len(self.prompt)

    def tokens_from(self, start: int, count: int) -> list[int]:
        """Token ids at positions [start, start + count) of the prompt and what is read or written behind it."""
        behind = list(self.continuation) or self.output
        if start >= len(self.prompt):
            start -= len(self.prompt)
            return behind[start : start + count]
        return (self.prompt[start : start + count] + behind[: max(0, start + count - len(self.prompt))])[:count]

    def scored_at(self, position: int) -> Iterable[int]:
        """Tokens whose log probabilities the logits at this position shall tell."""
        last = len(self.prompt) - 1
        if position < last:
            return (self.prompt[position + 1],)
        if position > last:
            return self.continuation[position - last : position - last + 1]
        return () if self.continuation_logprobs else (tokens[0] for tokens in self.params.continuations)

    def add_states(self, states: npt.NDArray[np.float32]) -> None:
        """Keeps what a step that was committed tells, [tokens, hidden], for `pooled`.

        Added one token after the other, so that the sum does not depend on where a prompt was cut.
        """
        if self.params.pooling == "last":
            self.pooled = states[-1].astype(np.float64)
            return
        self.pooled = np.zeros(states.shape[1]) if self.pooled is None else self.pooled
        for state in states:
            self.pooled += state
        if self.num_computed >= len(self.prompt):
            self.pooled /= len(self.prompt)

    def add_scores(self, found: list[TokenLogprob]) -> None:
        """Keeps what a step that was committed has found, in the order of `scored_at`, and turns to what is next."""
        if self.continuation:
            self.continuation_logprobs[self.num_read] += found
        elif self.num_computed < len(self.prompt):
            self.prompt_logprobs += found
        else:
            of_prompt = len(found) - len(self.params.continuations)
            self.prompt_logprobs += found[:of_prompt]
            self.continuation_logprobs = [[first] for first in found[of_prompt:]]
        texts, logprobs = self.params.continuations, self.continuation_logprobs
        while self.continuation and len(logprobs[self.num_read]) == len(self.continuation):
            self.num_read += 1
            if self.continuation:  # it goes on from where it parts from the one before
                shared = _shared_length(texts[self.num_read - 1], self.continuation)
                logprobs[self.num_read] = logprobs[self.num_read - 1][:shared] or logprobs[self.num_read]
        if logprobs:
            in_cache = len(logprobs[self.num_read]) - 1 if self.continuation else 0
            self.num_computed = len(self.prompt) + in_cache


def _shared_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens they begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def composed(uses: Iterable[AdapterUse]) -> tuple[AdapterUse, ...]:
    """The adapters of one sequence in the one order that depends on nothing but themselves.

    Floating-point sums depend on their order; so the same adapters and factors give the same bits, however a client
    lists them. An adapter with the factor 0 adds nothing and is left out.
    """
    return tuple(sorted(use for use in uses if use.scale != 0.0))


@dataclass(slots=True)
class ScheduledSequence:
    """A sequence's part of one batch: the scheduler says which tokens run, the runner reads it.

    What it needs of the sequence (tokens, blocks, slots), the runner takes when it starts the step: the sequence may
    have ended before the step is done.

    Attributes:
        num_tokens: tokens fed this step, at positions [first, first + num_tokens).
        samples: the last of them is the newest token, so that this step chooses the next one.
        num_scored: the logits at so many of the last positions score given text.
        num_states: at so many of the last positions is asked what the output head reads, and nothing else.
        follows: its one token is the one that the step before, which is not read yet, chooses for the sequence.
        repeats: its one token was read before, by a step behind which the mask was not there.
        first: the sequence's `num_computed` before this step.
        reply_index: which token of the reply this step chooses.
    """

    sequence: Sequence
    num_tokens: int
    samples: bool
    num_scored: int = 0
    num_states: int = 0
    follows: bool = False
    repeats: bool = False
    first: int = field(init=False)
    reply_index: int = field(init=False)

    def __post_init__(self) -> None:
        self.first = self.sequence.num_computed
        self.reply_index = len(self.sequence.output) + self.follows

    @property
    def num_logits(self) -> int:
        """At so many of the last positions logits are needed."""
        return self.num_scored or int(self.samples)

    @property
    def num_heads(self) -> int:
        """So many of the last positions are followed to the output head."""
        return self.num_logits + self.num_states


@dataclass(slots=True)
class SlotLoad:
    """The runner copies this version into this slot before the step's forward."""

    slot: Slot
    version: str
    in_use: bool = True  # a step that was started may still read what the slot holds: the copy waits for it
    seconds: float = 0.0  # filled by the runner: how long the copy took


@dataclass(slots=True)
class Batch:
    """One engine step. Filled by the scheduler, read by the runner.

    Attributes:
        rows: base rows first, then by slots, so that the tokens of the same adapters are one contiguous run; those
            with `num_states` behind all others, in the same order.
        slot_loads: applied before the forward, in this order.
    """

    rows: list[ScheduledSequence] = field(default_factory=list)
    slot_loads: list[SlotLoad] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class RowResult:
    """Runner -> engine: what came of one row with `num_heads`.

    Attributes:
        token_id: the token chosen for a row with `samples`.
        is_late: none is chosen yet, since the mask of its grammar is not there; `scores` are.
        error: instead of all else, if that row alone failed.
        is_impossible: see `TokenOutput`.
        scores: in order of positions, those that `Sequence.scored_at` asks for.
        states: [num_states, hidden] of a row with `num_states`.
    """

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    is_late: bool = False
    error: str | None = None
    is_impossible: bool = False
    digest: bytes | None = None
    scores: list[TokenLogprob] = field(default_factory=list)
    states: npt.NDArray[np.float32] | None = None
