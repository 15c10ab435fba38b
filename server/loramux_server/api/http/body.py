"""Request bodies as they arrive, bounded in bytes and in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request

from loramux_server.api.http.errors import BodyStalled, BodyTooLarge
from loramux_server.api.http.json_object import json_object, parsed_off_loop
from loramux_server.errors import RequestError

BLOCK = 64 * 2**10


async def read_json(request: Request, *, limit: int, stall_seconds: float) -> bytes:
    """The bytes of a JSON body.

    The content type is demanded because a web page may send any other one to this machine without being asked.
    Raises RequestError, BodyTooLarge, BodyStalled, and ClientDisconnect.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise RequestError("the request needs 'Content-Type: application/json'", code="invalid_content_type")
    async with aclosing(blocks(request, limit=limit, too_large=BodyTooLarge(limit), stall_seconds=stall_seconds)) as it:
        return b"".join([block async for block in it])


async def read_object(request: Request, *, limit: int, stall_seconds: float) -> dict[str, Any]:
    """A JSON object; an empty body counts as an empty one. Raises what `read_json` raises."""
    body = await read_json(request, limit=limit, stall_seconds=stall_seconds)
    return await parsed_off_loop(json_object, body) if body else {}


async def blocks(
    request: Request, *, limit: int, too_large: Exception, stall_seconds: float, size: int = BLOCK
) -> AsyncGenerator[bytes, None]:
    """The body in blocks of about `size` bytes.

    `too_large` is raised as soon as more than `limit` bytes are announced or have come; BodyStalled when one block
    takes longer than `stall_seconds`, so that no client keeps a place for ever by sending slowly.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    total = 0
    async with aclosing(request.stream()) as stream:
        while True:
            chunks: list[bytes] = []
            length = 0
            try:
                async with asyncio.timeout(stall_seconds):
                    while length < size and (chunk := await anext(stream, b"")):
                        chunks.append(chunk)
                        length += len(chunk)
            except TimeoutError as error:
                raise BodyStalled from error
            total += length
            if total > limit:
                raise too_large
            if not length:
                return
            yield b"".join(chunks)
