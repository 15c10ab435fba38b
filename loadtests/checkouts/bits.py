"""The same questions to both servers: is every token and every log probability of every reply the same number?

Base, each adapter and sums of two are asked in turn, so that a batch mixes them, by completions and chat, plain and
streamed, greedy and sampled with a seed. Prompts are of very different lengths. Each is asked twice, first plain and
then streamed, when the prefix cache may know it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..errors import LoadTestError
from ..process import Server
from ..workload import Workload

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_TOKENS = 32
ALTERNATIVES = 5  # log probabilities of the likeliest tokens, beside each chosen one
PROMPT_WORDS = (4, 160)  # the longest are computed in chunks
SAMPLING = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.01}

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """`label` tells it in a line; `body` is the JSON that is sent to `path`."""

    label: str
    path: str
    body: Document


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a reply. `others`: the likeliest tokens in its place with their log probabilities."""

    text: str
    logprob: float
    others: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """What must be the same; left out is what may differ: ids, times, and how much of the prompt was in the cache."""

    text: str
    tokens: tuple[Token, ...]
    finish: str | None
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class Verdict:
    """How much was compared, and one sentence about each reply that differs."""

    replies: int = 0
    tokens: int = 0
    logprobs: int = 0
    different: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return self.tokens > 0 and not self.different

    def __str__(self) -> str:
        found = f"{len(self.different)} replies differ" if self.different else "all equal"
        return f"{self.replies} replies, {self.tokens:,} tokens, {self.logprobs:,} log probabilities: {found}"


def questions(base: str, adapters: Sequence[str]) -> list[Question]:
    """All of them; neighbours ask different voices. `base` is the model that asks the bare base."""
    voices: dict[str, Document] = {"base": {"model": base}}
    voices |= {name: {"model": name} for name in adapters}
    for (first, second), scales in zip(itertools.pairwise(adapters), ((0.7, 0.5), (1.0, -0.3)), strict=False):
        parts = [{"name": name, "scale": scale} for name, scale in zip((first, second), scales, strict=True)]
        voices[f"{first} + {second}"] = {"model": base, "adapters": parts}
    ways = list(itertools.product((COMPLETIONS, CHAT), (False, True)))
    prompts = [it.prompt for it in Workload(prompt_words=PROMPT_WORDS).requests(len(ways) * len(voices))]
    asked = []
    for stream in (False, True):
        for number, ((path, sampled), (voice, model)) in enumerate(itertools.product(ways, voices.items())):
            body = {**model, **_prompt(path, prompts[number]), "max_tokens": MAX_TOKENS, "stream": stream}
            body |= {"stream_options": {"include_usage": True}} if stream else {}
            body |= {**SAMPLING, "seed": number} if sampled else {"temperature": 0}
            manner = ("sampled" if sampled else "greedy", "streamed" if stream else "plain")
            asked.append(Question(f"{voice}, {path}, {', '.join(manner)}, prompt {number + 1}", path, body))
    return asked


def _prompt(path: str, text: str) -> Document:
    """The prompt, and that log probabilities are wanted."""
    if path == CHAT:
        return {"messages": [{"role": "user", "content": text}], "logprobs": True, "top_logprobs": ALTERNATIVES}
    return {"prompt": text, "logprobs": ALTERNATIVES}


def ask(server: Server, asked: Sequence[Question], clients: int) -> list[Reply]:
    """The replies in the order of the questions, so many of which are under way at once.

    Raises LoadTestError for a request that failed.
    """

    def answer(question: Question) -> Reply:
        return read_reply(server.call("POST", question.path, json.dumps(question.body).encode()))

    with ThreadPoolExecutor(clients, "ask") as pool:
        return list(pool.map(answer, asked))


def read_reply(answer: bytes) -> Reply:
    """From the body of an answer, which is JSON or a stream of events. Raises LoadTestError for one that failed."""
    text, tokens, finish, usage = "", list[Token](), None, dict[str, int]()
    for document in _documents(answer):
        if "error" in document:
            raise LoadTestError(f"a reply failed: {document['error']}")
        for choice in document["choices"]:
            message = choice.get("message") or choice.get("delta") or choice
            text += message.get("content") or message.get("text") or ""
            tokens += _tokens(choice.get("logprobs") or {})
            finish = choice["finish_reason"] or finish
        usage = document.get("usage") or usage
    return Reply(text, tuple(tokens), finish, usage["prompt_tokens"], usage["completion_tokens"])


def _documents(answer: bytes) -> Iterator[Document]:
    """The one JSON object of a plain answer, or those of a stream's events."""
    if answer.lstrip().startswith(b"{"):
        yield json.loads(answer)
        return
    *events, last = (line[5:].strip() for line in answer.splitlines() if line.startswith(b"data:"))
    if last != b"[DONE]":
        raise LoadTestError("a stream ended without [DONE]")
    yield from map(json.loads, events)


def _tokens(logprobs: Document) -> Iterator[Token]:
    """Of a choice's `logprobs`: of a chat a list of objects, of a completion lists side by side."""
    for entry in logprobs.get("content") or ():
        others = tuple((other["token"], other["logprob"]) for other in entry["top_logprobs"])
        yield Token(entry["token"], entry["logprob"], others)
    lists = [logprobs.get(name) or () for name in ("tokens", "token_logprobs", "top_logprobs")]
    for text, logprob, others in zip(*lists, strict=True):
        yield Token(text, logprob, tuple(others.items()))


def compare(asked: Sequence[Question], before: Sequence[Reply], after: Sequence[Reply]) -> Verdict:
    """Replies in the order of the questions."""
    verdict = Verdict()
    for question, old, new in zip(asked, before, after, strict=True):
        verdict.replies += 1
        verdict.tokens += len(old.tokens)
        verdict.logprobs += sum(1 + len(token.others) for token in old.tokens)
        if old != new:
            verdict.different.append(f"{question.label}: {difference(old, new)}")
    return verdict


def difference(before: Reply, after: Reply) -> str:
    """The first thing that is not the same in two replies that are not."""
    for number, (old, new) in enumerate(zip(before.tokens, after.tokens, strict=False)):
        if old.text != new.text:
            return f"token {number} is {old.text!r} before and {new.text!r} after"
        if old != new:
            return f"log probabilities of token {number}, {old.text!r}: {_logprobs(old)} before, {_logprobs(new)} after"
    if len(before.tokens) != len(after.tokens):
        return f"{len(before.tokens)} tokens before and {len(after.tokens)} after"
    names = [name for name in Reply.__slots__ if getattr(before, name) != getattr(after, name)]
    return ", ".join(f"{name} is {getattr(before, name)!r} before and {getattr(after, name)!r} after" for name in names)


def _logprobs(token: Token) -> list[float]:
    return [token.logprob, *(logprob for _, logprob in token.others)]
