"""Answers of a running server, over OpenAI's wire: greedy replies, and of the labels what their first tokens tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from loramux_adapters.training.data.conversation import Example
from loramux_server.client.connection import ServerConnection
from loramux_server.client.upload_check import base_of
from loramux_server.errors import CommandFailed
from loramux_server.evaluation.contenders import Said
from loramux_server.plain_text import masked

AT_ONCE = 16  # requests
ALTERNATIVES = 20  # the most that the wire gives beside each token


@dataclass(frozen=True, slots=True)
class Server:
    """A server's routes. Each method raises CommandFailed with the server's reason.

    Attributes:
        url: such as http://127.0.0.1:8000.
        key: sent as a bearer token; None sends none.
    """

    url: str
    key: str | None = field(default=None, repr=False)

    def model(self, name: str) -> dict[str, Any]:
        """What the server says of the base or of an adapter."""
        return self._call(("v1", "models", name))

    def base(self) -> dict[str, Any]:
        """What it says of its base."""
        return base_of(self._connection)

    def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The first choice of a chat completion."""
        choices = self._call(("v1", "chat", "completions"), body).get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise CommandFailed(f"{masked(self.url)} sent a chat completion without choices")
        choice: dict[str, Any] = choices[0]
        return choice

    def _call(self, path: Sequence[str], body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._connection.call("GET" if body is None else "POST", path, body=body).body

    @property
    def _connection(self) -> ServerConnection:
        return ServerConnection(self.url, self.key, through_proxy=True)


class HttpScorer:
    """One model of a server as `evaluation.Scorer`. Token scores of given answers are not on the wire."""

    def __init__(self, server: Server, model: str) -> None:
        self._server = server
        self._model = model

    def ask(self, examples: Sequence[Example], labels: Sequence[str], *, reply: bool) -> Said:
        """Replies, and log probabilities of the labels by the first token of each.

        The wire gives the likeliest tokens at each place. A label counts with the likeliest of them that begins it and
        no other label; one with no such token is less likely than all that have one. Where none has one, the labels of
        that example, and so of all, cannot be told.
        """
        if not labels:
            return Said(None, None, None)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            choices = list(pool.map(lambda example: self._server.chat(self._body(example, labels)), examples))
        scores = [label_scores(choice, labels) for choice in choices]
        known = [row for row in scores if row is not None]
        return Said(known if len(known) == len(scores) else None, None, [_text(choice) for choice in choices])

    def _body(self, example: Example, labels: Sequence[str]) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": [{"role": message.role, "content": message.content} for message in example.prompt],
            "temperature": 0,
            "max_tokens": max(len(label.encode()) for label in labels) + 1,  # a token has at least a byte
            "logprobs": True,
            "top_logprobs": ALTERNATIVES,
        }


def label_scores(choice: Mapping[str, Any], labels: Sequence[str]) -> list[float] | None:
    """Log probability of each label by the first token of a reply; None where no likely token begins one."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = content[0] if isinstance(content, list) and content else {}
    alternatives = first.get("top_logprobs") if isinstance(first, dict) else None
    scores = [float("-inf")] * len(labels)
    for each in alternatives if isinstance(alternatives, list) else []:
        if not isinstance(each, dict) or not isinstance(each.get("logprob"), int | float):
            continue  # from a server that is not ours
        text = str(each.get("token", "")).strip()
        begun = [index for index, label in enumerate(labels) if text and label.startswith(text)]
        if len(begun) == 1:
            scores[begun[0]] = max(scores[begun[0]], float(each["logprob"]))
    return scores if max(scores) > float("-inf") else None


def _text(choice: Mapping[str, Any]) -> str:
    message = choice.get("message")
    text = str(message.get("content") or "") if isinstance(message, dict) else ""
    return text if choice.get("finish_reason") == "stop" else text + "…"
