"""The adapter routes of a running server, from the client's side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux_adapters.names import check_name
from loramux_server.client.retry import Patience
from loramux_server.client.transfer import ArchiveStream, check_target, extract, files_to_send, open_to_send
from loramux_server.errors import CommandFailed
from loramux_server.plain_text import masked, shortened

if TYPE_CHECKING:
    from loramux_server.client.connection import ServerConnection, ServerReply


_ALL = ("v1", "adapters")
_PATIENT = Patience()
TRIAL_SECONDS = 3600.0  # longest silence of a server that tries an adapter out
_TYPES: dict[str, type] = {
    "name": str,
    "version": str,
    "rank": int,
    "bytes": int,
    "tier": str,
    "base": str,
    "fingerprint": str,
    "created": int,
    "updated": int,
    "requests": int,
    "target_modules": list,
    "layers": dict,
    "notes": list,
    "versions": list,
}


@dataclass(frozen=True, slots=True)
class AdaptersClient:
    """One server's adapters. Each method opens its own connection.

    They raise CommandFailed with the server's reasons, and InvalidAdapterName before anything is sent.

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
        data = self._call("GET", _ALL).body.get("data")
        if not isinstance(data, list) or not all(isinstance(adapter, dict) for adapter in data):
            raise CommandFailed(f"{masked(self.url)} did not answer with a list of adapters; is it a loramux server?")
        for adapter in data:
            self._require_ours(adapter)
        return data

    def show(self, name: str) -> dict[str, Any]:
        adapter = self._call("GET", _path(name)).body
        self._require_ours(adapter)
        return adapter

    def remove(self, name: str) -> None:
        """Unregisters the adapter; requests that run on it finish."""
        self._call("DELETE", _path(name))

    def rollback(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Points the adapter at the version before, or at the kept one whose digest starts with `version`."""
        params = {"version": version} if version is not None else None
        return self._call("POST", _path(name, "rollback"), params).body

    def pin(self, name: str) -> None:
        """Keeps the adapter in memory."""
        self._call("POST", _path(name, "pin"))

    def unpin(self, name: str) -> None:
        self._call("DELETE", _path(name, "pin"))

    def push(
        self,
        name: str,
        directory: Path,
        *,
        validate_only: bool = False,
        skip_replay: bool = False,
        progress: Callable[[int, int], None] = lambda sent, total: None,
        patience: Patience = _PATIENT,
    ) -> ServerReply:
        """Uploads a PEFT directory: status 201 is a new adapter, 200 a new version of it or one that was there already.

        A server that is busy, or is being started again, is asked again for some time: the same upload twice is one.

        Args:
            validate_only: check it against the server's base and store nothing.
            skip_replay: try the adapter out, but do not replay its fingerprint.
            progress: called with the bytes sent so far and in all.
        """
        where = _path(name)
        flags = {"validate_only": validate_only, "skip_replay": skip_replay}
        params = {flag: "true" for flag, given in flags.items() if given}
        paths = files_to_send(directory)

        def send() -> ServerReply:
            connection = replace(self._connection, timeout=max(self.timeout, TRIAL_SECONDS))
            with ExitStack() as opened:
                files = {part: (path.name, opened.enter_context(open_to_send(path))) for part, path in paths.items()}
                with connection.stream("PUT", where, params=params, files=files, progress=progress) as response:
                    return connection.read(response)

        return patience.call(send)

    def pull(self, name: str, directory: Path) -> list[str]:
        """Downloads an adapter into a new directory and returns the names of its files."""
        where = _path(name, "archive")
        check_target(directory)
        with self._connection.stream("GET", where) as response:
            return extract(BufferedReader(ArchiveStream(response.iter_bytes())), directory)

    def _require_ours(self, adapter: dict[str, Any]) -> None:
        """Raises CommandFailed for what no server of ours says of an adapter, or of its versions."""
        odd = _oddity(adapter) or next(filter(None, map(_oddity, adapter.get("versions") or ())), None)
        if odd is not None:
            raise CommandFailed(f"{masked(self.url)} tells of an adapter with {odd}; is it a loramux server?")

    def _call(self, method: str, path: tuple[str, ...], params: dict[str, str] | None = None) -> ServerReply:
        return self._connection.call(method, path, params=params)

    @property
    def _connection(self) -> ServerConnection:
        from loramux_server.client.connection import ServerConnection  # and with it httpx, which takes 0.1 s

        return ServerConnection(self.url, self.key, self.timeout)


def _oddity(part: object) -> str | None:
    """What is wrong with an adapter or a version of one; None if nothing is."""
    if not isinstance(part, dict):
        return f"the version {shortened(part)}"
    for name, kind in _TYPES.items():
        value = part.get(name)
        if value is not None and not isinstance(value, kind):
            return f"the {name} {shortened(value)}"
    return None


def _path(name: str, *rest: str) -> tuple[str, ...]:
    """Of one adapter. Raises InvalidAdapterName."""
    return (*_ALL, check_name(name), *rest)
