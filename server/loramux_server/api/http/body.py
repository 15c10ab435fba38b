"""Request bodies as they arrive, bounded in bytes and in time."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request

from loramux_server.api.http.errors import BodyNotDecodable, BodyStalled, BodyTooLarge
from loramux_server.api.http.json_object import json_object, parsed_off_loop
from loramux_server.api.http.worker_threads import run_in_thread
from loramux_server.errors import RequestError
from loramux_server.wire.pace import Pace

BLOCK = 64 * 2**10
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some clients begin JSON with it
_ACCEPTED = "gzip, deflate"
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


async def read_json(request: Request, *, limit: int, pace: Pace) -> bytes:
    """The bytes of a JSON body, unpacked and without a byte order mark; `limit` holds before and after.

    The content type is demanded because a web page may send any other one to this machine without being asked.
    Raises RequestError, BodyTooLarge, BodyNotDecodable, BodyStalled, and ClientDisconnect.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise RequestError("the request needs 'Content-Type: application/json'", code="invalid_content_type")
    encoding = _encoding_of(request)
    if encoding and encoding not in _WINDOW_BITS:
        raise BodyNotDecodable(encoding, _ACCEPTED)
    async with aclosing(blocks(request, limit=limit, too_large=BodyTooLarge(limit), pace=pace)) as it:
        if not encoding:
            return b"".join([block async for block in it]).removeprefix(BYTE_ORDER_MARK)
        unpacked = _Unpacked(encoding, limit)
        async for block in it:
            await run_in_thread(unpacked.add, block)  # a block can become 1,000 times as many bytes
        return unpacked.whole().removeprefix(BYTE_ORDER_MARK)


async def read_object(request: Request, *, limit: int, pace: Pace) -> dict[str, Any]:
    """A JSON object; an empty body counts as an empty one. Raises what `read_json` raises."""
    body = await read_json(request, limit=limit, pace=pace)
    return await parsed_off_loop(json_object, body) if body else {}


def refuse_encoded(request: Request) -> None:
    """For bodies that are taken as they are. Raises BodyNotDecodable."""
    if encoding := _encoding_of(request):
        raise BodyNotDecodable(encoding, "identity")


def _encoding_of(request: Request) -> str:
    """Empty if the body is sent as it is."""
    encoding = ",".join(request.headers.getlist("content-encoding")).strip().lower()
    return "" if encoding == "identity" else encoding


class _Unpacked:
    """A compressed body. Used by one thread at a time."""

    def __init__(self, encoding: str, limit: int) -> None:
        self._encoding = encoding
        self._limit = limit
        self._decompressor = zlib.decompressobj(wbits=_WINDOW_BITS[encoding])
        self._data = bytearray()

    def add(self, block: bytes) -> None:
        """Raises RequestError, and BodyTooLarge without unpacking more than the limit."""
        try:
            self._data += self._decompressor.decompress(block, self._limit + 1 - len(self._data))
        except zlib.error as error:
            raise self._broken() from error
        if len(self._data) > self._limit:
            raise BodyTooLarge(self._limit)
        if self._decompressor.unused_data:
            raise self._broken()

    def whole(self) -> bytes:
        """Raises RequestError if the end is missing."""
        if not self._decompressor.eof:
            raise self._broken()
        return bytes(self._data)

    def _broken(self) -> RequestError:
        return RequestError(
            f"the body is not what its 'Content-Encoding: {self._encoding}' says", code="invalid_encoding"
        )


async def blocks(
    request: Request, *, limit: int, too_large: Exception, pace: Pace, size: int = BLOCK
) -> AsyncGenerator[bytes, None]:
    """The body in blocks of about `size` bytes.

    `too_large` is raised as soon as more than `limit` bytes are announced or have come; BodyStalled when the body falls
    behind its pace, so that no client keeps a place for ever by sending slowly. Time that the server takes for a block
    does not count.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    total = 0
    credit = pace.seconds
    async with aclosing(request.stream()) as stream:
        while True:
            chunks: list[bytes] = []
            length = 0
            while length < size:
                began = time.monotonic()
                try:
                    async with asyncio.timeout(credit):
                        chunk = await anext(stream, b"")
                except TimeoutError as error:
                    raise BodyStalled from error
                if not chunk:
                    break
                credit = pace.credit(credit, time.monotonic() - began, len(chunk))
                chunks.append(chunk)
                length += len(chunk)
            total += length
            if total > limit:
                raise too_large
            if not length:
                return
            yield b"".join(chunks)
