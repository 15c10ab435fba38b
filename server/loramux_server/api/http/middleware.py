"""What every request passes first: the bound on its header, and an id that its response carries."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramux_server.api.http.errors import HeadersTooLarge, answer_to

REQUEST_ID = "x-request-id"
_LEGAL_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def request_id_of(scope: Scope) -> str:
    """The id of the request that this scope belongs to."""
    request_id: str = scope["state"]["request_id"]
    return request_id


class RequestMiddleware:
    """The outermost ASGI application; it hands the request on to the one inside."""

    def __init__(self, app: ASGIApp, header_bytes: int) -> None:
        self._app = app
        self._header_bytes = header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _id_from(scope)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size + len(scope.get("raw_path") or b"") + len(scope["query_string"]) > self._header_bytes:
            await answer_to(HeadersTooLarge(self._header_bytes)).response()(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)


def _id_from(scope: Scope) -> str:
    """The caller's own id if it is harmless in a header and a log, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _LEGAL_ID.fullmatch(value):
            given: str = value.decode("ascii")
            return given
    return f"req-{uuid.uuid4().hex}"
