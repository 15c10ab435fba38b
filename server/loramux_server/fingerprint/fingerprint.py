"""Fingerprints: what an adapter says to a few prompts, to the last bit, so that any server can tell if it still does.

A fingerprint is made by the engine that serves. A server of the same numerics id computes with the same kernels on the
same kind of device, and replies are equal bit for bit there, alone or in company. Elsewhere rounding differs: then the
fingerprint's own tokens are scored one after the other (teacher-forced), and replay.py says what may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loramux_adapters.evaluation.scores import TokenScore
from loramux_server.engine.local_engine import LocalAdapter, LocalEngine
from loramux_server.fingerprint.file import MAX_PROMPTS, MAX_TOKENS, Fingerprint, Witness


@dataclass(frozen=True, slots=True)
class Flip:
    """A place where another token is likeliest here; `gap` is by how much log probability it beats the expected one."""

    prompt: int
    position: int
    gap: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """What was said before against what is said now.

    Attributes:
        tokens: how many were compared.
        mean, max: absolute difference of the log probabilities.
        flips: every place where the greedy choice differs, given the expected tokens before it.
        equal: tokens and log probabilities are the same bits.
    """

    tokens: int = 0
    mean: float = 0.0
    max: float = 0.0
    flips: tuple[Flip, ...] = ()
    equal: bool = False

    @property
    def widest(self) -> float:
        """The largest gap of a flip."""
        return max((flip.gap for flip in self.flips), default=0.0)

    def words(self) -> str:
        """One line for a report."""
        if self.equal:
            return f"{self.tokens} tokens and their log probabilities are equal bit for bit"
        flips = f"{len(self.flips)} of {self.tokens} greedy tokens differ"
        if self.flips:
            flips += f", at gaps up to {self.widest:.3f}"
        return f"log probabilities differ by {self.mean:.5f} on average and {self.max:.5f} at most; {flips}"


def make(
    engine: LocalEngine, prompts: Sequence[Sequence[int]], adapter: LocalAdapter, *, max_tokens: int = 16
) -> dict[str, Any]:
    """The fingerprint of an adapter, as fingerprint.json holds it.

    Args:
        engine: opened in a process that has trained nothing.
        prompts: token ids, from 1 to 64 prompts. Their text is stored too, so let it be text that may be shown.
        max_tokens: length of each reply.
    Raises:
        DataError: a prompt and its reply do not fit into the context.
    """
    if not 1 <= len(prompts) <= MAX_PROMPTS or not 1 <= max_tokens <= MAX_TOKENS:
        raise ValueError(f"a fingerprint has 1 to {MAX_PROMPTS} prompts and replies of 1 to {MAX_TOKENS} tokens")
    return Fingerprint(
        numerics_id=engine.numerics_id,
        base_id=engine.base.base_id,
        version=adapter.version,
        prompts=witness(engine, prompts, adapter, max_tokens=max_tokens),
    ).as_json()


def witness(
    engine: LocalEngine, prompts: Sequence[Sequence[int]], adapter: LocalAdapter | None, *, max_tokens: int
) -> tuple[Witness, ...]:
    """What the adapter (or the bare base) says to each prompt, in `max_tokens` tokens."""
    decode = engine.base.tokenizer.decode
    replies = engine.generate(prompts, adapter, max_tokens=max_tokens, stop_ids=frozenset())
    return tuple(
        Witness(decode(list(ids)), tuple(ids), decode(reply.tokens), tuple(reply.tokens), tuple(reply.logprobs))
        for ids, reply in zip(prompts, replies, strict=True)
    )


def as_far_as(witnesses: Sequence[Witness], vocabulary: int) -> tuple[Witness, ...]:
    """What a model of so many tokens can be asked about: of each reply what is before the first further token."""
    found = []
    for said in witnesses:
        known = next((place for place, token in enumerate(said.tokens) if token >= vocabulary), len(said.tokens))
        if known and max(said.ids) < vocabulary:
            found.append(replace(said, tokens=said.tokens[:known], logprobs=said.logprobs[:known]))
    return tuple(found)


def compare(engine: LocalEngine, witnesses: Sequence[Witness], adapter: LocalAdapter | None) -> Agreement:
    """What witnesses say against what the adapter (or the bare base) says here, token by token.

    Each token is scored after the witness's own tokens before it, all of them in one go; replies are made only to tell
    whether they are the same bits, and where another token is likelier.
    """
    count = sum(len(said.tokens) for said in witnesses)
    found = engine.ask([(said.ids, said.tokens) for said in witnesses], adapter).scores
    differences = [
        abs(here.logprob - there)
        for said, scores in zip(witnesses, found, strict=True)
        for here, there in zip(scores, said.logprobs, strict=True)
    ]
    if not any(differences) and _equal(engine, witnesses, adapter):
        return Agreement(count, equal=True)
    return Agreement(count, sum(differences) / count, max(differences), _flips(engine, witnesses, found, adapter))


def _equal(engine: LocalEngine, witnesses: Sequence[Witness], adapter: LocalAdapter | None) -> bool:
    """Whether the replies themselves are what the witnesses say."""
    longest = max(len(said.tokens) for said in witnesses)
    replies = engine.generate([said.ids for said in witnesses], adapter, max_tokens=longest, stop_ids=frozenset())
    return all(
        (tuple(reply.tokens[: len(said.tokens)]), tuple(reply.logprobs[: len(said.tokens)]))
        == (said.tokens, said.logprobs)
        for said, reply in zip(witnesses, replies, strict=True)
    )


def _flips(
    engine: LocalEngine,
    witnesses: Sequence[Witness],
    found: Sequence[Sequence[TokenScore]],
    adapter: LocalAdapter | None,
) -> tuple[Flip, ...]:
    """Every flip, each by itself: behind one the witness's own token is taken as said."""
    places = [
        (index, place) for index, scores in enumerate(found) for place, score in enumerate(scores) if not score.is_best
    ]
    prompts = [(*witnesses[index].ids, *witnesses[index].tokens[:place]) for index, place in places]
    replies = engine.generate(prompts, adapter, max_tokens=1, stop_ids=frozenset())
    return tuple(
        Flip(index, place, reply.logprobs[0] - found[index][place].logprob)
        for (index, place), reply in zip(places, replies, strict=True)
    )
