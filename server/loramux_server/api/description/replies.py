"""The JSON of every reply, for the OpenAPI document.

Replies are built by hand where they are sent; tests hold what is sent against these models, so that neither drifts.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Tier = Literal["device", "host", "disk"]
Finish = Literal["stop", "length"]
ChatFinish = Literal["stop", "length", "tool_calls", "function_call"]


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


class ReasoningTokens(_Reply):
    """Of a reply's tokens, those that were thought before it spoke."""

    reasoning_tokens: int


class Usage(_Reply):
    """What a request took. The reply's tokens are told apart where the base thinks, or tools were given."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens | None = None


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
    """Four lists, one item for each token of a text; null for the first token of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptToken(_Reply):
    """A token of a prompt, or one that might be in its place. `rank` is null where it is not known."""

    logprob: float
    rank: int | None
    decoded_token: str


StopReason = Annotated[
    str | int | None, Field(description="The stop string, or the token of `stop_token_ids`, that ended the reply.")
]
TokenIds = Annotated[list[int] | None, Field(description="With `return_token_ids`.")]
PromptTokens = Annotated[
    list[dict[str, PromptToken] | None] | None,
    Field(description="With `prompt_logprobs`: by token id, of each token of the prompt; null for the first."),
]


class Called(_Reply):
    """A function and its arguments, JSON in a text: as the model wrote it, so look at it before you use it."""

    name: str
    arguments: str


class Call(_Reply):
    """A call that the client is to make."""

    id: str
    type: Literal["function"]
    function: Called


class ReplyMessage(_Reply):
    """The assistant's turn; its content is null where it only calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = Field(None, description="What it thought before.")
    tool_calls: list[Call] | None = None
    function_call: Called | None = Field(None, description="In place of `tool_calls` for a request with `functions`.")


class ChatChoice(_Reply):
    """One reply."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish
    stop_reason: StopReason
    token_ids: TokenIds = None


class ChatReply(_Reply):
    """A whole reply to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: TokenIds = None
    prompt_logprobs: PromptTokens = None


class CalledPart(_Reply):
    """The name comes first, and then the arguments piece by piece."""

    name: str | None = None
    arguments: str


class CallPiece(_Reply):
    """What is new of one call: `id`, `type` and the name in its first piece alone."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledPart


class Delta(_Reply):
    """What is new. The first has the role, the last nothing."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallPiece] | None = None
    function_call: CalledPart | None = None


class ChatChunkChoice(_Reply):
    """What is new of one reply."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish | None
    stop_reason: StopReason = None
    token_ids: TokenIds = None


class ChatChunk(_Reply):
    """One event of a streamed conversation; `usage` and `loramux` come in the last one where they were asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: TokenIds = None
    loramux: Times | None = None


class CompletionChoice(_Reply):
    """The reply to one prompt; in a stream, what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: StopReason = None
    token_ids: TokenIds = None
    prompt_token_ids: TokenIds = None
    prompt_logprobs: PromptTokens = None


class CompletionReply(_Reply):
    """A whole reply, or one event of a stream, which has no `usage` unless it was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    loramux: Times | None = None


class Embedding(_Reply):
    """One input's vector: numbers, or little-endian fp32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(_Reply):
    """What a request took."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(_Reply):
    """Vectors in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


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


class AdapterDefaults(_OpenReply):
    """What requests that say nothing of it get; absent is what the adapter does not say."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: list[str] | None = None
    max_tokens: int | None = None


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
    context: int | None = Field(
        description="Its own limit on prompt and reply together, in tokens; null is the base's."
    )
    generation_defaults: AdapterDefaults
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
    context: int | None = Field(
        description="Its own limit on prompt and reply together, in tokens; null is the base's."
    )
    generation_defaults: AdapterDefaults


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


# keys


class Key(_Reply):
    """What is known of a key. Times are unix seconds; a `revoked` to come is that of a key that was rotated."""

    id: str
    object: Literal["key"]
    tenant: str | None
    scopes: list[str]
    note: str
    state: Literal["active", "revoked", "expired"]
    created: int
    expires: int | None
    revoked: int | None


class NewKeyReply(Key):
    """The key itself, told this one time."""

    key: str


class KeyList(_Reply):
    object: Literal["list"]
    data: list[Key]


class TenantReply(_Reply):
    """What a tenant may take; null is no limit. `created`: unix seconds."""

    id: str
    object: Literal["tenant"]
    created: int
    requests_per_minute: int | None
    tokens_per_minute: int | None
    requests_at_once: int | None
    adapters: int | None
    adapter_mib: int | None
    weight: int
    priority: int


class AuditEntry(_Reply):
    """A change. `at`: unix seconds, with fractions."""

    id: int
    object: Literal["audit"]
    at: float
    who: str
    tenant: str | None
    address: str | None
    request: str | None
    action: str
    subject: str
    version: str | None
    detail: str


class AuditList(_Reply):
    object: Literal["list"]
    data: list[AuditEntry]


class TenantList(_Reply):
    object: Literal["list"]
    data: list[TenantReply]
