"""What every request passes before its route: an id, one spelling of its target, CORS, bounds."""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Collection
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramux_server.api.http.errors import INVALID, Answer, HeadersTooLarge, answer_to
from loramux_server.errors import ServerBusy
from loramux_server.wire.connections import Connections, Purpose

REQUEST_ID = "x-request-id"
EXPOSED = (
    *(REQUEST_ID, "x-loramux-adapter-version", "x-loramux-queue-ms", "x-loramux-ttft-ms", "retry-after"),
    *(f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
)
BUSY_SECONDS = 2
_LEGAL_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_ABSOLUTE = re.compile(rb"https?://([^/@]+)(/.*)?", re.IGNORECASE)
_OPERATIONS = ("/health", "/ready", "/metrics", "/metrics/vllm")
_MANAGEMENT = re.compile(r"/v1/(?:(?:adapters|keys|tenants|audit)(?:/.*)?|(?:un)?load_lora_adapter)", re.DOTALL)


def request_id_of(scope: Scope) -> str:
    """The id of the request that this scope belongs to."""
    request_id: str = scope["state"]["request_id"]
    return request_id


class RequestMiddleware:
    """The outermost ASGI application. What it hands on has an id, and its target is spelled as routes are.

    A target in absolute form names the host itself, whatever the Host header says. A slash at the end means nothing.
    HEAD is a GET whose reply ends after its header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] != "http":
            return self._app(scope, receive, send)
        request_id = _id_from(scope)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        sink: Send = send_with_id
        if changed := _changes(scope):
            scope = {**scope, **changed}  # the server's own stays as it is: it knows by it what HEAD was
        if scope["method"] == "HEAD":
            scope, sink = {**scope, "method": "GET"}, _HeaderOnly(send_with_id)
        return self._app(scope, receive, sink)


class _HeaderOnly:
    """Sends a reply's header and none of its body; what would go on is stopped as if its client had left."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        if message.get("more_body"):
            raise OSError("the client asked for the header alone")


class CorsMiddleware(CORSMiddleware):
    """What the browser is told of pages that may read replies. Preflights need no key: browsers send none."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST", "PUT", "DELETE"),
            allow_headers=("*",),
            expose_headers=EXPOSED,
            allow_private_network=True,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        message = bytes(response.body).decode() + "; --cors-origins lists the pages that may use this server"
        error = {"message": message, "type": INVALID, "param": None, "code": "cors_refused"}
        told = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return Answer(response.status_code, error, told).response()


class BoundsMiddleware:
    """Turns away headers that are too large, and requests for which no connection is left."""

    def __init__(self, app: ASGIApp, header_bytes: int, connections: Connections) -> None:
        self._app = app
        self._header_bytes = header_bytes
        self._connections = connections

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        return (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size + len(scope.get("raw_path") or b"") + len(scope["query_string"]) > self._header_bytes:
            return answer_to(HeadersTooLarge(self._header_bytes)).response()
        if self._connections.admit(_purpose_of(scope["path"])):
            return None
        busy = ServerBusy("too many connections have requests now; try again soon", retry_after=BUSY_SECONDS)
        response = answer_to(busy).response()
        response.headers["connection"] = "close"
        return response


def _purpose_of(path: str) -> Purpose:
    if path in _OPERATIONS:
        return Purpose.OPERATION
    return Purpose.MANAGEMENT if _MANAGEMENT.fullmatch(path) else Purpose.USE


def _changes(scope: Scope) -> dict[str, Any]:
    """What must be another where the target is spelled in another way than routes are."""
    path: str = scope["path"]
    changed: dict[str, Any] = {}
    if (absolute := _ABSOLUTE.fullmatch(scope.get("raw_path") or b"")) is not None:
        host, raw_path = absolute[1], absolute[2] or b"/"
        path = unquote(raw_path.decode("ascii"))
        others = [(name, value) for name, value in scope["headers"] if name != b"host"]
        changed = {"raw_path": raw_path, "headers": [(b"host", host), *others]}
    raw = changed.get("raw_path", scope.get("raw_path")) or path.encode()
    if raw.endswith(b"/") and path != "/":  # an escaped slash belongs to a name
        path = path.removesuffix("/")
    return changed if path == scope["path"] else changed | {"path": path}


def _id_from(scope: Scope) -> str:
    """The caller's own id if it is harmless in a header and a log, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _LEGAL_ID.fullmatch(value):
            given: str = value.decode("ascii")
            return given
    return f"req-{uuid.uuid4().hex}"
