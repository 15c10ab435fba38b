"""Every call of the API: what it takes, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from loramux_adapters.artifact.format import UPLOAD_PARTS
from loramux_server.access.audit_file import MOST_ENTRIES
from loramux_server.api.adapters.upload import ARCHIVE
from loramux_server.api.completions.request.chat import MESSAGE, PART, ChatRequest
from loramux_server.api.completions.request.completion import CompletionRequest
from loramux_server.api.completions.request.fields import RequestPart
from loramux_server.api.completions.request.generation import STREAM
from loramux_server.api.completions.request.options import Option, unserved
from loramux_server.api.completions.request.tokens import (
    TOKENIZE_CHAT,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizePromptRequest,
)
from loramux_server.api.description import replies, responses
from loramux_server.api.embeddings.request import OPTIONS as EMBEDDINGS
from loramux_server.api.embeddings.request import EmbeddingRequest
from loramux_server.api.keys.request import LimitsRequest, NewKey, Rotation
from loramux_server.api.responses.options import (
    BESIDE,
    ITEM_OPTIONS,
    PART_OPTIONS,
    REASONING_OPTIONS,
    STREAM_OPTIONS,
    TEXT_OPTIONS,
    TOOL_OPTIONS,
)
from loramux_server.api.responses.request import ResponsesRequest

JSON, TEXT, HTML, GZIP = "application/json", "text/plain", "text/html", "application/gzip"
EVENTS, FORM = "text/event-stream", "multipart/form-data"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path.

    Attributes:
        requests: bodies that it takes, any one of them.
        options: of a body, by its name: taken or refused beside its fields.
        body_needed: False where a request may have none.
        reply: JSON that it answers with; None is another media type.
        event: of a stream, which it answers with where `stream` is true.
        done: whether such a stream ends with the data `[DONE]`.
        statuses: that its reply may have.
        missing: whether what it is asked for may not be there.
        query: names of parameters, with what they may be.
    """

    summary: str
    requests: tuple[type[BaseModel], ...] = ()
    options: Mapping[str, Mapping[str, Option]] = field(default_factory=dict)
    body_needed: bool = True
    takes: str = JSON
    reply: type[BaseModel] | None = None
    event: type[BaseModel] | None = None
    done: bool = False
    media: str = JSON
    statuses: tuple[int, ...] = (200,)
    missing: bool = False
    query: Mapping[str, type[BaseModel] | Mapping[str, object]] = field(default_factory=dict)


_PARTS: dict[str, Any] = {
    **{part: (bytes, Field(default_factory=bytes, description=file)) for part, file in UPLOAD_PARTS.items()},
    ARCHIVE: (bytes, Field(default_factory=bytes, description="a PEFT directory as an archive")),
}
AdapterUpload: type[BaseModel] = create_model(
    "AdapterUpload",
    __doc__="The files of an adapter, `config` and `weights` at least; or `archive` alone.",
    __config__=ConfigDict(
        extra="forbid",
        json_schema_extra={
            "oneOf": [
                {"required": ["config", "weights"], "properties": {ARCHIVE: False}},
                {"required": [ARCHIVE], "maxProperties": 1},
            ]
        },
    ),
    **_PARTS,
)


class RollbackRequest(RequestPart):
    """To which version; without one, to the version before."""

    version: Annotated[str | None, Field(description="the beginning of a kept version's digest")] = None


class NoFields(RequestPart):
    """An object without fields."""


class LoadRequest(BaseModel):
    """vLLM's call: a PEFT directory of this machine, below the directory that the operator allows."""

    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool = False


class UnloadRequest(BaseModel):
    """vLLM's call."""

    lora_name: Annotated[str, Field(min_length=1)]
    lora_int_id: int | None = None


_FLAG: Mapping[str, object] = {"enum": ["true", "false", "1", "0"]}
_ADAPTER = "/v1/adapters/{name}"

OPERATIONS: Mapping[tuple[Literal["GET", "POST", "PUT", "DELETE"], str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation(
        "A reply to a conversation, whole or streamed",
        requests=(ChatRequest,),
        options={"ChatRequest": unserved("chat"), "ChatMessage": MESSAGE, "TextPart": PART, "StreamOptions": STREAM},
        reply=replies.ChatReply,
        event=replies.ChatChunk,
        done=True,
        missing=True,
    ),
    ("POST", "/v1/completions"): Operation(
        "How a text goes on, whole or streamed",
        requests=(CompletionRequest,),
        options={"CompletionRequest": unserved("completions")},
        reply=replies.CompletionReply,
        event=replies.CompletionReply,
        done=True,
        missing=True,
    ),
    ("POST", "/v1/responses"): Operation(
        "A response to a conversation that the client holds, whole or streamed",
        requests=(ResponsesRequest,),
        options={
            "ResponsesRequest": BESIDE,
            "InputMessage": ITEM_OPTIONS,
            "InputCall": ITEM_OPTIONS,
            "CallOutput": ITEM_OPTIONS,
            "InputReasoning": ITEM_OPTIONS,
            "InputText": PART_OPTIONS,
            "SaidRefusal": PART_OPTIONS,
            "FunctionTool": TOOL_OPTIONS,
            "TextConfig": TEXT_OPTIONS,
            "ReasoningConfig": REASONING_OPTIONS,
            "NoStreamOptions": STREAM_OPTIONS,
        },
        reply=responses.ResponseReply,
        event=responses.ResponseEvent,
        missing=True,
    ),
    ("POST", "/v1/embeddings"): Operation(
        "Vectors of texts: what the base with an adapter reads of them",
        requests=(EmbeddingRequest,),
        options={"EmbeddingRequest": EMBEDDINGS},
        reply=replies.EmbeddingReply,
        missing=True,
    ),
    ("POST", "/tokenize"): Operation(
        "The tokens of a text or a conversation",
        requests=(TokenizePromptRequest, TokenizeChatRequest),
        options={"TokenizeChatRequest": TOKENIZE_CHAT},
        reply=replies.TokenizeReply,
        missing=True,
    ),
    ("POST", "/detokenize"): Operation(
        "The text of tokens", requests=(DetokenizeRequest,), reply=replies.DetokenizeReply, missing=True
    ),
    ("GET", "/v1/models"): Operation("The base and every adapter", reply=replies.ModelList),
    ("GET", "/v1/models/{model}"): Operation("The base or an adapter", reply=replies.Model, missing=True),
    ("GET", "/v1/adapters"): Operation("Every adapter with its versions", reply=replies.AdapterList),
    ("GET", _ADAPTER): Operation("An adapter with its versions", reply=replies.Adapter, missing=True),
    ("PUT", _ADAPTER): Operation(
        "Uploads an adapter, or a new version of one",
        requests=(AdapterUpload,),
        takes=FORM,
        reply=replies.Adapter,
        statuses=(200, 201),
        query={"validate_only": _FLAG, "force": _FLAG, "allow_no_effect": _FLAG, "skip_replay": _FLAG},
    ),
    ("DELETE", _ADAPTER): Operation("Unregisters an adapter", reply=replies.AdapterDeleted, missing=True),
    ("GET", _ADAPTER + "/archive"): Operation("An adapter's files as tar.gz", media=GZIP, missing=True),
    ("POST", _ADAPTER + "/rollback"): Operation(
        "Back to the version before, or to another one that is kept",
        requests=(RollbackRequest,),
        body_needed=False,
        reply=replies.Adapter,
        missing=True,
        query={"version": {"type": "string"}},
    ),
    ("POST", _ADAPTER + "/pin"): Operation(
        "Keeps an adapter in memory", requests=(NoFields,), body_needed=False, reply=replies.Adapter, missing=True
    ),
    ("DELETE", _ADAPTER + "/pin"): Operation("Lets an adapter go again", reply=replies.Adapter, missing=True),
    ("GET", "/v1/keys"): Operation("Every key, without what opens anything", reply=replies.KeyList),
    ("POST", "/v1/keys"): Operation("Makes a key", requests=(NewKey,), reply=replies.NewKeyReply, statuses=(201,)),
    ("DELETE", "/v1/keys/{key}"): Operation("Refuses a key from now on", reply=replies.Key, missing=True),
    ("POST", "/v1/keys/{key}/rotate"): Operation(
        "Makes a key in the place of another",
        requests=(Rotation,),
        reply=replies.NewKeyReply,
        statuses=(201,),
        missing=True,
    ),
    ("GET", "/v1/tenants"): Operation("Every tenant and its limits", reply=replies.TenantList),
    ("PUT", "/v1/tenants/{tenant}"): Operation(
        "Changes limits of a tenant", requests=(LimitsRequest,), reply=replies.TenantReply
    ),
    ("GET", "/v1/audit"): Operation(
        "Who changed what, newest first",
        reply=replies.AuditList,
        query={
            "tenant": {"type": "string"},
            "subject": {"type": "string"},
            "since": {"type": "number", "minimum": 0},
            "before": {"type": "integer", "minimum": 1},
            "limit": {"type": "integer", "minimum": 1, "maximum": MOST_ENTRIES},
        },
    ),
    ("POST", "/v1/load_lora_adapter"): Operation(
        "vLLM's call: an adapter from this machine's disk", requests=(LoadRequest,), media=TEXT, missing=True
    ),
    ("POST", "/v1/unload_lora_adapter"): Operation(
        "vLLM's call: unregisters an adapter", requests=(UnloadRequest,), media=TEXT, missing=True
    ),
    ("GET", "/health"): Operation("503: restart me", reply=replies.Status, statuses=(200, 503)),
    ("GET", "/ready"): Operation("503: send no requests now", reply=replies.Status, statuses=(200, 503)),
    ("GET", "/version"): Operation("What runs here", reply=replies.VersionReply),
    ("GET", "/metrics"): Operation("For Prometheus", media=TEXT),
    ("GET", "/metrics/vllm"): Operation("For Prometheus, under vLLM's names", media=TEXT),
    ("GET", "/"): Operation("What this is, to read", media=HTML),
    ("GET", "/docs"): Operation("This document, to read", media=HTML),
    ("GET", "/openapi.json"): Operation("This document", media=JSON),
}
