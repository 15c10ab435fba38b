"""Takes connections from the port, as many as there is room for; the rest wait in the kernel's queue.

asyncio's own server accepts whatever comes, and where the process has no descriptor left it logs a traceback for every
place in its backlog, again each second.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from contextlib import suppress

from loramux_server.wire.connections import Connections
from loramux_server.wire.protocol import DeadlineProtocol

BATCH = 16  # accepted in one turn of the event loop
RETRY_SECONDS = 1.0
_TCP_OPTIONS = {
    "TCP_KEEPIDLE": 60,  # seconds without a packet, until a peer is asked whether it is still there
    "TCP_KEEPINTVL": 15,
    "TCP_KEEPCNT": 4,
    "TCP_NOTSENT_LOWAT": 128 * 2**10,  # bytes of a reply that the kernel holds, beside what is on its way
}
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

logger = logging.getLogger(__name__)


class Acceptor:
    """Owner: the event loop."""

    def __init__(
        self, listener: socket.socket, connections: Connections, protocol: Callable[[], DeadlineProtocol]
    ) -> None:
        self._listener = listener
        self._connections = connections
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._starting: set[asyncio.Task[None]] = set()
        self._listens = self._is_closed = False
        listener.setblocking(False)
        connections.when_room = self._listen
        self._listen()

    def close(self) -> None:
        self._is_closed = True
        self._rest()

    async def wait_closed(self) -> None:
        """Nothing is left to do: whoever closes this waits for the connections."""

    def _listen(self) -> None:
        if not self._listens and not self._is_closed:
            self._listens = True
            self._loop.add_reader(self._listener.fileno(), self._accept_some)

    def _rest(self) -> None:
        if self._listens:
            self._listens = False
            self._loop.remove_reader(self._listener.fileno())

    def _accept_some(self) -> None:
        for _ in range(BATCH):
            if not self._connections.can_accept:
                logger.warning("all connections have requests; new ones wait until one ends")
                self._rest()
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error("no connection can be accepted now: %s", error.strerror)
                if error.errno in _SHORT:
                    self._connections.close_one()
                self._rest()
                self._loop.call_later(RETRY_SECONDS, self._listen)
                return
            task = self._loop.create_task(self._start(connection, self._protocol()))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)
            self._connections.make_room()

    async def _start(self, connection: socket.socket, protocol: DeadlineProtocol) -> None:
        try:
            connection.setblocking(False)
            _prepare(connection)
            await self._loop.connect_accepted_socket(lambda: protocol, connection)
        except OSError as error:  # it has gone already, or there is no memory for it
            logger.info("a connection ended before it began: %s", error)
            connection.close()
            self._connections.left(protocol)


def _prepare(connection: socket.socket) -> None:
    """The kernel finds out about peers that vanish, and holds little for one that does not read."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _TCP_OPTIONS.items():
        with suppress(OSError, AttributeError):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
