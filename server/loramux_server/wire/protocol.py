"""One HTTP connection: uvicorn's, with a deadline for every state it can be in, and errors that say what is wrong."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from loramux_server.wire.connections import Connections, Cut
from loramux_server.wire.pace import Pace
from loramux_server.wire.strict_http import StrictConnection
from loramux_server.wire.transport import CountedTransport, LeanFlowControl, OneWaiter

LINGER_SECONDS = 2.0  # in which a client that was refused can read why
LAG_SECONDS = 2.0  # so far behind its pace, a reader makes room where there is none

logger = logging.getLogger(__name__)

_CODES = {400: "invalid_http", 408: "header_too_slow", 431: "header_too_large", 501: "not_implemented"}


class Phase(Enum):
    """What a connection is doing. All but BUSY are idle: it is closed when its place is needed."""

    HEAD = "the header of a request is awaited, or part of it is there"
    BUSY = "a request is served"
    DRAIN = "the request has its answer; the rest of its body is read and dropped"
    KEPT = "open for the next request; uvicorn closes it in time"
    REFUSED = "nothing more is read"


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Attributes:
    header_seconds: from the connection, or the first byte of a later request, to the end of the header.
    pace: of those who read replies; its seconds are also the time for a body that nobody reads.
    """

    header_seconds: float
    pace: Pace


@dataclass(slots=True)
class _Watch:
    """What the deadlines of one connection need.

    Attributes:
        since: when the phase began, on the loop's clock.
        taken: bytes that the client's side had taken at the last check, and that was `checked`.
        due: bytes that it had been given by then.
        credit: seconds for which it may still be slower than its pace.
    """

    sink: CountedTransport
    phase: Phase
    since: float
    checked: float
    credit: float
    taken: int = 0
    due: int = 0


class DeadlineProtocol(H11Protocol):
    """Owner: the event loop. Made when its connection was accepted.

    It has few attributes of its own: with more than 30 in all, Python would keep a table of names for each connection.
    """

    def __init__(self, connections: Connections, deadlines: Deadlines, **uvicorn_state: Any) -> None:
        super().__init__(**uvicorn_state)
        self.conn: StrictConnection = StrictConnection()
        self._open = connections
        self._deadlines = deadlines
        self._watch: _Watch | None = None  # until the connection is made
        connections.entered(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        sink = CountedTransport(transport)
        super().connection_made(cast(asyncio.Transport, sink))
        self.flow = LeanFlowControl(transport)
        now = self.loop.time()
        self._watch = _Watch(sink, Phase.HEAD, now, now, self._deadlines.pace.seconds)
        self._open.is_idle(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._open.left(self)

    def data_received(self, data: bytes) -> None:
        if self._phase is Phase.REFUSED:
            return
        cycle = self.cycle
        super().data_received(data)
        if self.cycle is not cycle:  # its task has not begun, so nobody waits yet
            self.cycle.message_event = cast(asyncio.Event, OneWaiter(self.cycle.message_event.is_set()))
        self._settle()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._settle()

    @property
    def _phase(self) -> Phase:
        assert self._watch is not None
        return self._watch.phase

    def _settle(self) -> None:
        if self.transport.is_closing() or self._phase is Phase.REFUSED:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._enter(Phase.BUSY)
        elif self.conn.their_state is not h11.IDLE:
            self._enter(Phase.DRAIN)
        elif self.cycle is None or self.conn.has_bytes:
            self._enter(Phase.HEAD)
        else:
            self._enter(Phase.KEPT)

    def _enter(self, phase: Phase) -> None:
        """Bytes that change no phase win no time."""
        watch = self._watch
        assert watch is not None
        if phase is watch.phase:
            return
        watch.phase, watch.since = phase, self.loop.time()
        if phase is Phase.BUSY:
            self._open.is_busy(self)
        else:
            self._open.is_idle(self)

    def make_room(self) -> None:
        self.transport.abort()

    def check(self, now: float) -> None:
        watch = self._watch
        if watch is None:
            return
        lasted = now - watch.since
        if watch.phase is Phase.HEAD and lasted > self._deadlines.header_seconds:
            self._open.count(Cut.HEADER_TOO_SLOW)
            if self.conn.has_bytes:
                self._refuse(408, f"the header did not come within {self._deadlines.header_seconds:g} seconds")
            else:
                self.transport.close()
        elif watch.phase is Phase.DRAIN and lasted > self._deadlines.pace.seconds:
            self._open.count(Cut.BODY_UNREAD)
            self.transport.abort()
        elif watch.phase is Phase.REFUSED and lasted > LINGER_SECONDS:
            self.transport.abort()
        self._check_reader(watch, now)

    def _check_reader(self, watch: _Watch, now: float) -> None:
        """Ends the connection of a client that does not take what is ready for it.

        One that has all that was ready at the check before keeps up: a reply may come more slowly than it must be read,
        and the last bytes of a stream are always under way.
        """
        waited, watch.checked = now - watch.checked, now
        pace = self._deadlines.pace
        if watch.taken == watch.sink.written:
            watch.credit = pace.seconds
            self._open.keeps_up(self)
            return
        before, watch.taken = watch.taken, watch.sink.written - watch.sink.left()
        due, watch.due = watch.due, watch.sink.written
        if watch.taken >= due:
            watch.credit = pace.seconds
            self._open.keeps_up(self)
            return
        watch.credit = pace.credit(watch.credit, waited, watch.taken - before)
        if pace.seconds - watch.credit > LAG_SECONDS:
            self._open.lags(self)
        else:
            self._open.keeps_up(self)
        if watch.credit < 0:
            self._open.count(Cut.READER_TOO_SLOW)
            logger.warning(
                "a reply to %s is given up: for %g s its client has taken less than %g bytes a second",
                self.client and self.client[0],
                pace.seconds,
                pace.bytes_per_second,
            )
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for bytes that are no HTTP; `msg` says just that."""
        error = self.conn.refusal
        self._refuse(*((error.error_status_hint, str(error)) if error is not None else (400, msg)))

    def _refuse(self, status: int, message: str) -> None:
        """Answers, where no answer has begun, and closes so that the client can read that."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        code = _CODES.get(status, _CODES[400])
        error = {"message": message[:500], "type": "invalid_request_error", "param": None, "code": code}
        body = json.dumps({"error": error}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        head = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES.get(status, b""))
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._enter(Phase.REFUSED)
        if self.transport.can_write_eof():
            self.transport.write_eof()
