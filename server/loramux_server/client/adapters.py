"""The adapter routes of a running server, from the client's side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux_server.client.transfer import ArchiveStream, check_target, extract, files_to_send, open_to_send
from loramux_server.errors import CommandFailed

if TYPE_CHECKING:
    from loramux_server.client.connection import ServerConnection, ServerReply


@dataclass(frozen=True, slots=True)
class AdaptersClient:
    """One server's adapters. Each method opens its own connection and raises CommandFailed with the server's reasons.

    Attributes:
        url: where the server is, such as http://127.0.0.1:8000; may hold a path prefix.
        key: sent as a bearer token; None sends none.
        timeout: longest silence of the server, in seconds.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 600.0

    def all(self) -> list[dict[str, Any]]:
        """Every registered adapter."""
        data = self._connection.call("GET", _path()).body.get("data")
        if not isinstance(data, list) or not all(isinstance(adapter, dict) for adapter in data):
            raise CommandFailed(f"{self.url} did not answer with a list of adapters; is it a loramux server?")
        return data

    def show(self, name: str) -> dict[str, Any]:
        return self._connection.call("GET", _path(name)).body

    def remove(self, name: str) -> None:
        """Unregisters the adapter; requests that run on it finish."""
        self._connection.call("DELETE", _path(name))

    def rollback(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Points the adapter at the version before, or at the kept one whose digest starts with `version`."""
        params = {"version": version} if version is not None else None
        return self._connection.call("POST", _path(name, "rollback"), params=params).body

    def pin(self, name: str) -> None:
        """Keeps the adapter in memory."""
        self._connection.call("POST", _path(name, "pin"))

    def unpin(self, name: str) -> None:
        self._connection.call("DELETE", _path(name, "pin"))

    def push(
        self,
        name: str,
        directory: Path,
        *,
        validate_only: bool = False,
        progress: Callable[[int, int], None] = lambda sent, total: None,
    ) -> ServerReply:
        """Uploads a PEFT directory: status 201 is a new adapter, 200 a new version of it or one that was there already.

        Args:
            validate_only: check it against the server's base and store nothing.
            progress: called with the bytes sent so far and in all.
        """
        params = {"validate_only": "true"} if validate_only else None
        paths = files_to_send(directory)
        with ExitStack() as opened:
            files = {part: (path.name, opened.enter_context(open_to_send(path))) for part, path in paths.items()}
            connection = self._connection
            with connection.stream("PUT", _path(name), params=params, files=files, progress=progress) as response:
                return connection.read(response)

    def pull(self, name: str, directory: Path) -> list[str]:
        """Downloads an adapter into a new directory and returns the names of its files."""
        check_target(directory)
        with self._connection.stream("GET", _path(name, "archive")) as response:
            return extract(BufferedReader(ArchiveStream(response.iter_bytes())), directory)

    @property
    def _connection(self) -> ServerConnection:
        from loramux_server.client.connection import ServerConnection  # and with it httpx, which takes 0.1 s

        return ServerConnection(self.url, self.key, self.timeout)


def _path(*names: str) -> tuple[str, ...]:
    return ("v1", "adapters", *names)
