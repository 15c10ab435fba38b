"""Errors of the HTTP surface, and the one table exception -> status, type and code.

LoramuxError
├── Refusal                 the request is turned away before anything is done with it
│   ├── NotAuthenticated    no key, or a wrong one
│   ├── NotAllowed          the key is right but does not allow this; or the Host is not this machine
│   ├── BodyTooLarge        a JSON body over its limit
│   ├── BodyNotDecodable    a body in an encoding that is not taken
│   ├── HeadersTooLarge     the header over its limit
│   └── BodyStalled         the client does not send what it announced, or too slowly
└── RequestTimedOut         the reply took longer than the operator allows
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from fastapi import Response

from loramux_adapters.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterNotFound,
    AdapterRejected,
    AdapterTooLarge,
    BaseMismatch,
    DeviceFull,
    IndexLost,
    InvalidAdapterName,
    PinRefused,
    RollbackImpossible,
    StoreUnavailable,
    TemplateFailed,
    TemplateRefuses,
)
from loramux_server.errors import (
    AccessUnavailable,
    EngineDead,
    LoramuxError,
    NoSuchKey,
    QuotaExceeded,
    RateLimited,
    ReplyImpossible,
    RequestError,
    SequenceFailed,
    ServerBusy,
    ServerDraining,
)

MODEL_NOT_FOUND = "model_not_found"
INVALID = "invalid_request_error"
SERVER = "server_error"
STORE_RETRY_SECONDS = 10


class Refusal(LoramuxError):
    """Turned away before anything was done."""


class NotAuthenticated(Refusal):
    """No key, or a wrong one."""


class NotAllowed(Refusal):
    """The caller is known, or needs no key, but may not do this."""


class BodyTooLarge(Refusal):
    """`limit` is in bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request body is larger than the limit of {limit} bytes")


class BodyNotDecodable(Refusal):
    """`accepted` are the content encodings that are, where this body goes."""

    def __init__(self, encoding: str, accepted: str) -> None:
        super().__init__(f"the body's Content-Encoding {ascii(encoding[:64])} is not taken here; what is: {accepted}")
        self.accepted = accepted


class HeadersTooLarge(Refusal):
    """`limit` is in bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request header is larger than the limit of {limit} bytes")


class BodyStalled(Refusal):
    """The next part of the body did not come in time."""

    def __init__(self, message: str = "the request body came too slowly") -> None:
        super().__init__(message)


class RequestTimedOut(LoramuxError):
    """The reply took longer than the operator allows."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the request took longer than the limit of {seconds:g} seconds")


@dataclass(frozen=True, slots=True)
class Answer:
    """How an error is told to the client: `error` is the object under that name, in OpenAI's shape and more."""

    status: int
    error: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error}

    def response(self) -> Response:
        content = json.dumps(self.body).encode()
        return Response(content, self.status, self.headers, media_type="application/json")


# The first row whose class fits decides.
_TABLE: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (NotAuthenticated, 401, "authentication_error", "invalid_api_key"),
    (NotAllowed, 403, "permission_error", "not_allowed"),
    (BodyStalled, 408, INVALID, "body_too_slow"),
    (BodyTooLarge, 413, INVALID, "body_too_large"),
    (BodyNotDecodable, 415, INVALID, "encoding_not_accepted"),
    (HeadersTooLarge, 431, INVALID, "header_too_large"),
    (RequestTimedOut, 504, SERVER, "request_timeout"),
    (RequestError, 400, INVALID, None),
    (QuotaExceeded, 409, INVALID, "quota_exceeded"),
    (RateLimited, 429, "requests", "rate_limit_exceeded"),
    (ServerDraining, 503, SERVER, "server_draining"),
    (ServerBusy, 503, SERVER, "server_busy"),
    (EngineDead, 503, SERVER, "engine_dead"),
    (AccessUnavailable, 503, SERVER, "keys_unavailable"),
    (NoSuchKey, 404, INVALID, "key_not_found"),
    (ReplyImpossible, 400, INVALID, "reply_impossible"),
    (SequenceFailed, 500, SERVER, "engine_error"),
    (InvalidAdapterName, 400, INVALID, "invalid_adapter_name"),
    (AdapterNotFound, 404, INVALID, MODEL_NOT_FOUND),
    (RollbackImpossible, 409, INVALID, "rollback_impossible"),
    (PinRefused, 409, INVALID, "pin_refused"),
    (BaseMismatch, 409, INVALID, "base_mismatch"),
    (AdapterTooLarge, 413, INVALID, "adapter_too_large"),
    (AdapterRejected, 422, INVALID, "adapter_rejected"),
    (TemplateRefuses, 400, INVALID, "chat_template"),
    (TemplateFailed, 400, INVALID, "chat_template"),
    (AdapterCorrupt, 500, SERVER, "adapter_corrupt"),
    (StoreUnavailable, 503, SERVER, "store_unavailable"),
    (DeviceFull, 503, SERVER, "device_full"),
)

# Their own text may name files of the server; it is logged instead.
_FIXED_MESSAGE: dict[type[Exception], str] = {
    AdapterCorrupt: "the stored files of this adapter cannot be read; upload it again",
    AccessUnavailable: "keys cannot be checked now; try again later",
    StoreUnavailable: "the adapter store cannot be used now; try again later",
    IndexLost: "the adapter store cannot be used until its index is made anew; the server's log says how",
}


def answer_to(error: Exception) -> Answer:
    """Status, body and headers for an error. The client is told nothing about one that is not ours."""
    if isinstance(error, LoramuxError | AdapterError):
        for kind, status, type_, code in _TABLE:
            if isinstance(error, kind):
                return _answer(error, status, type_, code)
    return Answer(500, _error("the server failed on this request; its log says why", SERVER, None, "internal_error"))


def http_answer(status: int, headers: dict[str, str]) -> Answer:
    """For what the router itself refuses: unknown paths and methods."""
    message, code = {
        404: ("there is nothing at this path", "not_found"),
        405: ("this path does not take this method", "method_not_allowed"),
    }.get(status, ("the request cannot be served", "bad_request"))
    return Answer(status, _error(message, INVALID, None, code), headers)


def _answer(error: LoramuxError | AdapterError, status: int, type_: str, code: str | None) -> Answer:
    body = _error(_FIXED_MESSAGE.get(type(error), str(error)), type_, None, code)
    headers: dict[str, str] = {}
    if isinstance(error, RequestError):
        body |= {"param": error.param, "code": error.code}
        status = 404 if error.code == MODEL_NOT_FOUND else status
    elif isinstance(error, RateLimited):
        body["type"] = error.kind
        if error.retry_after is not None:
            headers["retry-after"] = str(error.retry_after)
    elif isinstance(error, ServerBusy):
        headers["retry-after"] = str(error.retry_after)
    elif isinstance(error, StoreUnavailable | AccessUnavailable):
        headers["retry-after"] = str(STORE_RETRY_SECONDS)
    elif isinstance(error, BodyNotDecodable):
        headers["accept-encoding"] = error.accepted
    elif isinstance(error, NotAuthenticated):
        headers["www-authenticate"] = "Bearer"
    elif isinstance(error, AdapterRejected):
        body["reasons"] = error.reasons
    elif isinstance(error, BaseMismatch):
        body |= {"adapter_base_id": error.adapter_base_id, "served_base_id": error.served_base_id}
    return Answer(status, body, headers)


def _error(message: str, type_: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"message": message, "type": type_, "param": param, "code": code}
