"""What goes out over a connection: how much of it the other side has, and waiting until it takes more."""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from typing import Any, cast

from uvicorn.protocols.http.flow_control import FlowControl


class CountedTransport:
    """A transport that knows how many bytes it was given, and how many of them the other side does not have yet."""

    __slots__ = ("_transport", "written")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.written = 0

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self._transport.write(data)

    def left(self) -> int:
        """Bytes here, and on Linux those in the kernel that the other side has not acknowledged.

        The kernel says that it takes more only when a large part of its buffer, of megabytes, is free again; a slow
        reader would look as one that has stopped.
        """
        here = self._transport.get_write_buffer_size()
        if sys.platform != "linux":
            return here
        try:
            queued = fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        except OSError:  # it is closed
            return here
        return here + int.from_bytes(queued, sys.byteorder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class OneWaiter:
    """As `asyncio.Event`, for one task that waits, in a tenth of the memory."""

    __slots__ = ("_is_set", "_waiting")

    def __init__(self, is_set: bool) -> None:
        self._is_set = is_set
        self._waiting: asyncio.Future[None] | None = None

    def set(self) -> None:
        self._is_set = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def clear(self) -> None:
        self._is_set = False

    async def wait(self) -> None:
        while not self._is_set:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting


class LeanFlowControl(FlowControl):
    """uvicorn's, with such an event."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.read_paused = self.write_paused = False
        self._is_writable_event = cast(asyncio.Event, OneWaiter(True))
