"""Takes the bytes of an HTTP/1.1 reply apart after the fact, with the time at which each event was complete."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered.

    Attributes:
        headers: in lower case, names and values.
        events: SSE data, each with the time at which its last byte arrived.
    """

    status: int
    headers: dict[str, str]
    events: list[tuple[float, bytes]]


def split_reply(received: Sequence[tuple[float, bytes]]) -> Reply:
    """What came, taken apart.

    Raises ValueError where the reply is no HTTP/1.1 reply, or ends before its head does.
    """
    whole = b"".join(data for _, data in received)
    head, found, rest = whole.partition(b"\r\n\r\n")
    if not found:
        raise ValueError("the connection closed before the reply began")
    status_line, *fields = head.split(b"\r\n")
    protocol, _, status = status_line.partition(b" ")
    if not protocol.startswith(b"HTTP/1.") or not status[:3].isdigit():
        raise ValueError("the reply is not HTTP/1.1")
    lines = [line.decode("latin-1").lower().partition(":") for line in fields]
    headers = {name.strip(): value.strip() for name, _, value in lines}
    body_start = len(whole) - len(rest)
    chunked = headers.get("transfer-encoding") == "chunked"
    pieces = list(_chunks(whole, body_start) if chunked else _parts(received, body_start))
    arrivals = _Arrivals(received)
    return Reply(int(status[:3]), headers, [(arrivals.at(end), data) for end, data in _events(pieces)])


def _chunks(whole: bytes, place: int) -> Iterator[tuple[int, bytes]]:
    """(offset behind it in `whole`, data) of each complete chunk from `place` on."""
    while (line_end := whole.find(b"\r\n", place)) >= 0:
        size = int(whole[place:line_end].partition(b";")[0], 16)
        start = line_end + 2
        if size == 0 or start + size > len(whole):
            return
        yield start + size, whole[start : start + size]
        place = start + size + 2


def _parts(received: Sequence[tuple[float, bytes]], body_start: int) -> Iterator[tuple[int, bytes]]:
    """(offset behind it, data) of each part of a body without chunks, as it arrived."""
    end = 0
    for _, data in received:
        start, end = end, end + len(data)
        if end > body_start:
            yield end, data[max(0, body_start - start) :]


def _events(pieces: Sequence[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """(offset, data) of each complete SSE event; comments and other fields are passed over."""
    pending = b""
    for end, piece in pieces:
        *complete, pending = (pending + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in complete:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield end, b"\n".join(lines)


class _Arrivals:
    """Looks up when the byte before an offset arrived; offsets must be asked in rising order."""

    def __init__(self, received: Sequence[tuple[float, bytes]]) -> None:
        self._left = iter(received)
        self._time, self._end = 0.0, 0

    def at(self, offset: int) -> float:
        while self._end < offset:
            self._time, data = next(self._left)
            self._end += len(data)
        return self._time
