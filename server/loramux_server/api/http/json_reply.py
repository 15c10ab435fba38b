"""Large JSON replies, made in a worker thread and in pieces.

The encoder holds the interpreter's lock while it works on one value, so what is large is handed to it part by part, and
streams go on in between.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator

from fastapi import Response

from loramux_server.api.http.worker_threads import run_in_thread


async def listed(items: Callable[[], Iterable[object]]) -> Response:
    """A list in OpenAI's form, of what `items` returns; it is called in a worker thread."""
    return Response(
        await run_in_thread(lambda: json_in_pieces({"object": "list", "data": list(items())}, depth=2)),
        media_type="application/json",
    )


def json_in_pieces(value: object, *, depth: int) -> bytes:
    """JSON, with lists and objects down to this depth encoded item by item."""
    return "".join(_pieces(value, depth)).encode()


def _pieces(value: object, depth: int) -> Iterator[str]:
    if depth and isinstance(value, dict):
        separator = "{"
        for name, item in value.items():
            yield f"{separator}{json.dumps(name)}: "
            yield from _pieces(item, depth - 1)
            separator = ", "
        yield "}" if value else "{}"
    elif depth and isinstance(value, list):
        separator = "["
        for item in value:
            yield separator
            yield from _pieces(item, depth - 1)
            separator = ", "
        yield "]" if value else "[]"
    else:
        yield json.dumps(value)
