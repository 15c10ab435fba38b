"""Ways for a test to call an ASGI application and to read what it streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
from fastapi import FastAPI


def events_of(response: httpx.Response) -> list[Any]:
    """The events of a stream: parsed JSON, and "[DONE]" as it is."""
    blocks = response.text.split("\n\n")
    assert blocks[-1] == "" and all(block.startswith("data: ") for block in blocks[:-1])
    texts = [block.removeprefix("data: ") for block in blocks[:-1]]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def text_of(events: list[Any]) -> str:
    """What the chat or completion chunks say, put together."""
    parts = []
    for event in events:
        for choice in event["choices"] if isinstance(event, dict) and "choices" in event else []:
            parts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
    return "".join(parts)


class RawCall:
    """One ASGI request by hand: the test decides when body and disconnect come, and sees each message sent."""

    def __init__(
        self,
        app: FastAPI,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        host: bytes = b"localhost",
        headers: Sequence[tuple[bytes, bytes]] = ((b"content-type", b"application/json"),),
        more_body: bool = False,
    ) -> None:
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": more_body})
        self.sent: list[dict[str, Any]] = []
        self.arrived = asyncio.Condition()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", host), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._send))

    async def _send(self, message: Any) -> None:
        async with self.arrived:
            self.sent.append(message)
            self.arrived.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5), self.arrived:
            await self.arrived.wait_for(condition)

    async def disconnect(self) -> None:
        """The client leaves; returns when the app is done with the request."""
        self._incoming.put_nowait({"type": "http.disconnect"})
        async with asyncio.timeout(5):
            await self.task
