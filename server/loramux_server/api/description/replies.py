"""The JSON of every reply, for the OpenAPI document.

Replies are built by hand where they are sent; tests hold what is sent against these models, so that neither drifts.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Tier = Literal["device", "host", "disk"]
Finish = Literal["stop", "length"]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _OpenReply(BaseModel):
    """For what grows with what the server knows."""

    model_config = ConfigDict(extra="allow")


class ErrorDetails(_OpenReply):
    """`code` is a number in vLLM's two calls, as it is there."""

    message: str
    type: str
    param: str | None
    code: str | int | None
    reasons: list[str] | None = Field(None, description="Why an adapter is refused, all of it.")


class ErrorReply(_Reply):
    """What every error is answered with."""

    error: ErrorDetails


# generation


class CachedTokens(_Reply):
    """Of a prompt's tokens, those that were computed before."""

    cached_tokens: int


class Usage(_Reply):
    """What a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Times(_Reply):
    """How long a streamed request waited."""

    queue_ms: float | None
    ttft_ms: float | None


class TokenChance(_Reply):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TokenChance):
    """A token of the reply, and the likeliest ones in its place."""

    top_logprobs: list[TokenChance]


class ChatLogprobs(_Reply):
    """One entry for each token of a text."""

    content: list[ChosenToken]
    refusal: None


class CompletionLogprobs(_Reply):
    """Four lists, one item for each token of a text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ReplyMessage(_Reply):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Reply):
    """One reply."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatReply(_Reply):
    """A whole reply to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(_Reply):
    """What is new. The first has the role, the last nothing."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Reply):
    """What is new of one reply."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(_Reply):
    """One event of a streamed conversation; `usage` and `loramux` come in the last one where they were asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    loramux: Times | None = None


class CompletionChoice(_Reply):
    """The reply to one prompt; in a stream, what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class CompletionReply(_Reply):
    """A whole reply, or one event of a stream, which has no `usage` unless it was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    loramux: Times | None = None


class TokenizeReply(_Reply):
    """`token_strs` are null unless they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(_Reply):
    """The text of tokens."""

    prompt: str


# models and adapters


class Model(_Reply):
    """The base, or an adapter, whose `root` is its version and whose `parent` is the base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["loramux"]
    root: str
    parent: str | None
    max_model_len: int


class ModelList(_Reply):
    """The base first."""

    object: Literal["list"]
    data: list[Model]


class AdapterVersion(_OpenReply):
    """One version of an adapter that is kept."""

    version: str
    created: int
    bytes: int
    rank: int
    verified: bool
    fingerprint: str
    corrupt: bool
    current: bool
    tier: Tier


class Adapter(_OpenReply):
    """An adapter; `outcome` and `version` say what came of a call that changed it."""

    id: str
    object: Literal["adapter"]
    name: str
    version: str
    rank: int
    target_modules: list[str]
    bytes: int
    tier: Tier
    pinned: bool
    corrupt: bool
    base: str
    base_verified: bool
    fingerprint: str
    chat_template: Literal["adapter", "base"]
    requests: int
    created: int
    updated: int
    versions: list[AdapterVersion]
    outcome: Literal["created", "updated", "unchanged", "rolled_back"] | None = None


class AdapterList(_Reply):
    """Every adapter, by name."""

    object: Literal["list"]
    data: list[Adapter]


class AdapterDeleted(_Reply):
    """An adapter that is no more."""

    id: str
    object: Literal["adapter"]
    deleted: Literal[True]


class AdapterValidation(_OpenReply):
    """An upload that was checked and not kept."""

    object: Literal["adapter.validation"]
    name: str
    valid: Literal[True]
    rank: int
    target_modules: list[str]
    base_verified: bool
    fingerprint: str
    chat_template: Literal["adapter", "base"]


# operations


class Status(_Reply):
    """In one word."""

    status: Literal["ok", "dead", "ready", "not ready", "loading"]


class VersionReply(_Reply):
    """`version` as in vLLM's call; the rest is ours."""

    version: str
    server: Literal["loramux"]
    base: str
    base_id: str
