"""A reader of HTTP/1.1 that refuses whatever two readers could understand in two ways.

A proxy in front that sees another end of a request than this server does would let a client slip a second request
through (request smuggling). h11 refuses most of it; what it would take is refused here.
"""

from __future__ import annotations

import re
from typing import Any

import h11

MAX_HEADER_BYTES = 64 * 1024
MAX_HEADER_LINES = 128
LEAST_CHUNK = 64  # bytes, on average, of a body in chunks: each costs the event loop as much as kilobytes do
_SMALL_CHUNKS = 1000  # that nobody minds
_LOOSE_LINE = re.compile(rb"\n[ \t]|[^\r]\n|\r[^\n]|\x00")
_LOOSE = "a header line must end with CR LF, must not go on in the next line, and must not hold NUL"


class StrictConnection(h11.Connection):
    """The server's side. `refusal` is why `next_event` raised."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self.refusal: h11.RemoteProtocolError | None = None
        self._chunks = self._chunk_bytes = 0

    @property
    def has_bytes(self) -> bool:
        """Something came that is no whole event yet."""
        return bool(self.trailing_data[0])

    def next_event(self) -> Any:
        """Raises RemoteProtocolError."""
        try:
            head = self.trailing_data[0] if self.their_state is h11.IDLE else b""
            self._check_size(head)
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._check_head(event, head[: len(head) - len(self.trailing_data[0])])
            elif isinstance(event, h11.Data):
                self._check_chunks(event)
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise
        return event

    def _check_size(self, head: bytes) -> None:
        end = head.find(b"\r\n\r\n")
        length = end if end >= 0 else len(head)
        if length > MAX_HEADER_BYTES:
            raise h11.RemoteProtocolError(f"a header of more than {MAX_HEADER_BYTES} bytes", error_status_hint=431)
        if head.count(b"\n", 0, length) > MAX_HEADER_LINES:
            raise h11.RemoteProtocolError(f"more than {MAX_HEADER_LINES} header lines", error_status_hint=431)

    def _check_head(self, request: h11.Request, head: bytes) -> None:
        self._chunks = self._chunk_bytes = 0
        if _LOOSE_LINE.search(head):
            raise h11.RemoteProtocolError(_LOOSE)
        names = {name for name, _ in request.headers}
        if b"transfer-encoding" in names and b"content-length" in names:
            raise h11.RemoteProtocolError("a request has Transfer-Encoding or Content-Length, not both")
        if b"transfer-encoding" in names and request.http_version < b"1.1":
            raise h11.RemoteProtocolError("HTTP/1.0 has no Transfer-Encoding")

    def _check_chunks(self, data: h11.Data) -> None:
        self._chunks += data.chunk_start
        self._chunk_bytes += len(data.data)
        if self._chunks > _SMALL_CHUNKS and self._chunk_bytes < self._chunks * LEAST_CHUNK:
            raise h11.RemoteProtocolError(
                f"the body comes in chunks of less than {LEAST_CHUNK} bytes; send larger ones"
            )
