"""Answers of an adapter in process: examples in, labels, replies and token scores out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from loramux_adapters.errors import DataError
from loramux_adapters.evaluation.scores import TokenScore
from loramux_adapters.training.data.conversation import Example, Message
from loramux_adapters.training.data.render import Renderer
from loramux_server.base.tokenizer import BaseTokenizer
from loramux_server.engine.local_engine import LocalAdapter, LocalEngine, LocalReply
from loramux_server.evaluation.contenders import Said

ROOM_FOR_REPLY = 64  # tokens of the context that prompts leave free, and most tokens of a reply to a labelled example
LONGER = 2  # tokens that a reply may have beyond the longest label before it is cut


class LocalScorer:
    """One adapter of a `LocalEngine`, or its bare base, as `contenders.Scorer`."""

    def __init__(self, engine: LocalEngine, adapter: LocalAdapter | None) -> None:
        """Raises DataError: the base has no fast tokenizer, or no token that ends a reply."""
        config = getattr(engine.base.model, "generation_config", None)
        self._engine = engine
        self._adapter = adapter
        self._tokenizer = BaseTokenizer(engine.base.tokenizer, config, engine.base.vocabulary).with_tokens(
            None if adapter is None else adapter.own_tokens
        )
        self._renderer = Renderer(
            self._tokenizer.source,
            engine.context - ROOM_FOR_REPLY,
            stop_ids=self._tokenizer.stop_ids,
            encoder=self._tokenizer.encoder,
            chat_template=None if adapter is None else adapter.chat_template,
        )

    def ask(self, examples: Sequence[Example], labels: Sequence[str], *, reply: bool) -> Said:
        """Log probability of each label as the beginning of the last answer, and of all tokens of the answers.

        Where one label's tokens begin with all of another's ("not", "not spam"), the end token counts as well for all
        of them; elsewhere it does not, since a base that goes on after the right label has chosen it. With labels the
        tokens of the last answer of a conversation count, without labels those of all; their end tokens count too.
        A reply that goes on behind the longest label ends in "…".
        """
        rows: list[tuple[list[int], list[int]]] = []
        owners: list[tuple[int, bool]] = []  # example; whether the row is one of its labels
        prompts: list[tuple[int, ...]] = []
        longest = 0
        for index, example in enumerate(examples):
            row = self._renderer.render(example)
            runs = _runs(row.learn)
            prompts.append(row.ids[: runs[-1][0]])
            for start, end in runs[-1:] if labels else runs:
                rows.append((list(row.ids[:start]), list(row.ids[start:end])))
                owners.append((index, False))
            if labels:
                tokens = [self._answer(example, label) for label in labels]
                bare = [self._without_end(each) for each in tokens]
                rows += [(list(prompts[-1]), each) for each in (tokens if _overlap(bare) else bare)]
                owners += [(index, True)] * len(labels)
                longest = max(longest, *map(len, tokens))
        max_tokens = min(ROOM_FOR_REPLY, longest + LONGER) if reply and labels else 0
        asked = self._engine.ask(rows, self._adapter, max_tokens=max_tokens, stop_ids=self._renderer.end_ids)
        of_labels: list[list[float]] = [[] for _ in examples]
        answers: list[list[TokenScore]] = [[] for _ in examples]
        for (index, is_label), found in zip(owners, asked.scores, strict=True):
            if is_label:
                of_labels[index].append(sum(token.logprob for token in found))
            else:
                answers[index] += found
        replies = [self._text(asked.replies[prompt]) for prompt in prompts] if max_tokens else None
        return Said(of_labels if labels else None, answers, replies)

    def _text(self, reply: LocalReply) -> str:
        return self._tokenizer.decode(reply.tokens) + ("" if reply.ended else "…")

    def _answer(self, example: Example, label: str) -> list[int]:
        """The tokens of a label where the last answer stands, end token included."""
        row = self._renderer.render(replace(example, messages=(*example.prompt, Message("assistant", label))))
        return list(row.ids[_runs(row.learn)[-1][0] :])

    def _without_end(self, tokens: list[int]) -> list[int]:
        kept = len(tokens)
        while kept and tokens[kept - 1] in self._renderer.end_ids:
            kept -= 1
        if not kept:
            raise DataError("a label has no tokens of its own in this base; name another")
        return tokens[:kept]


def _runs(learn: Sequence[bool]) -> list[tuple[int, int]]:
    """[start, end) of every run of tokens to learn."""
    edges = [0, *(index for index in range(1, len(learn)) if learn[index] != learn[index - 1]), len(learn)]
    return [(start, end) for start, end in pairwise(edges) if learn[start]]


def _overlap(answers: Sequence[list[int]]) -> bool:
    """Whether one of them begins with all of another."""
    return any(a != b and b[: len(a)] == a for a in answers for b in answers)
