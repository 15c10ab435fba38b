"""The adapter routes of a running server, from the client's side. Standard library only."""

from __future__ import annotations

import http.client
import json
import select
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from loramux_server.client.transfer import UploadBody, check_target, extract
from loramux_server.errors import CommandFailed

T = TypeVar("T")
MAX_REPLY_BYTES = 64 << 20  # a list of many thousand adapters


@dataclass(frozen=True, slots=True)
class ServerReply:
    status: int
    body: dict[str, Any]


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
        data = self._call("GET", "/v1/adapters").body.get("data")
        if not isinstance(data, list):
            raise CommandFailed(f"{self.url} did not answer with a list of adapters; is it a loramux server?")
        return data

    def show(self, name: str) -> dict[str, Any]:
        return self._call("GET", _path(name)).body

    def remove(self, name: str) -> None:
        """Unregisters the adapter; requests that run on it finish."""
        self._call("DELETE", _path(name))

    def rollback(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Points the adapter at the version before, or at the kept one whose digest starts with `version`."""
        query = "?" + urlencode({"version": version}) if version is not None else ""
        return self._call("POST", _path(name) + "/rollback" + query).body

    def pin(self, name: str) -> None:
        """Keeps the adapter in memory."""
        self._call("POST", _path(name) + "/pin")

    def unpin(self, name: str) -> None:
        self._call("DELETE", _path(name) + "/pin")

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
        upload = UploadBody.of(directory)
        query = "?" + urlencode({"validate_only": "true"}) if validate_only else ""
        return self._call("PUT", _path(name) + query, upload=upload, progress=progress)

    def pull(self, name: str, directory: Path) -> list[str]:
        """Downloads an adapter into a new directory and returns the names of its files."""
        check_target(directory)
        with _Exchange(self) as exchange:
            response = exchange.send("GET", _path(name) + "/archive")
            return exchange.guard(lambda: extract(response, directory))

    def _call(
        self,
        method: str,
        path: str,
        *,
        upload: UploadBody | None = None,
        progress: Callable[[int, int], None] = lambda sent, total: None,
    ) -> ServerReply:
        with _Exchange(self) as exchange:
            response = exchange.send(method, path, upload, progress)
            text = exchange.guard(lambda: response.read(MAX_REPLY_BYTES))
        body = _parse(text)
        if text and body is None:
            raise CommandFailed(f"{self.url} did not answer in JSON; is it a loramux server?")
        return ServerReply(response.status, body or {})


class _Exchange:
    """One connection, one request, one reply. Network failures become CommandFailed."""

    def __init__(self, client: AdaptersClient) -> None:
        self._client = client
        parts = urlsplit(client.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CommandFailed(f"{client.url!r} is not a URL such as http://127.0.0.1:8000")
        try:
            port = parts.port
        except ValueError as error:
            raise CommandFailed(f"{client.url!r} holds no valid port") from error
        self._prefix = parts.path.rstrip("/")
        connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = connect(parts.hostname, port, timeout=client.timeout)

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()

    def send(
        self,
        method: str,
        path: str,
        upload: UploadBody | None = None,
        progress: Callable[[int, int], None] = lambda sent, total: None,
    ) -> http.client.HTTPResponse:
        """Sends the request and returns a good reply's head; any other raises with the reasons the server gives."""
        headers = {"accept": "application/json, application/gzip"}
        if self._client.key is not None:
            headers["authorization"] = f"Bearer {self._client.key}"
        if upload is not None:
            headers |= {"content-type": upload.content_type, "content-length": str(upload.length)}
        response = self.guard(lambda: self._exchange(method, self._prefix + path, headers, upload, progress))
        if not 200 <= response.status < 300:
            raise CommandFailed(_refusal(response.status, self.guard(lambda: response.read(MAX_REPLY_BYTES))))
        return response

    def _exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        upload: UploadBody | None,
        progress: Callable[[int, int], None],
    ) -> http.client.HTTPResponse:
        self._connection.putrequest(method, path)
        for name, value in headers.items():
            self._connection.putheader(name, value)
        self._connection.endheaders()
        if upload is not None:
            try:
                self._send_body(upload, progress)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the server has read enough: its reply, read next, says why, or fails in its turn
        return self._connection.getresponse()

    def _send_body(self, upload: UploadBody, progress: Callable[[int, int], None]) -> None:
        sent = 0
        for chunk in upload:
            if self._has_answered():
                return
            self._connection.send(chunk)
            sent += len(chunk)
            progress(sent, upload.length)

    def _has_answered(self) -> bool:
        """True if a reply waits although the body is not sent: a refusal. Over TLS readable bytes may mean anything."""
        sock = self._connection.sock
        return type(sock) is socket.socket and bool(select.select([sock], [], [], 0)[0])

    def guard(self, work: Callable[[], T]) -> T:
        """Runs a piece of network work and says in one line what went wrong with it."""
        url = self._client.url
        try:
            return work()
        except ConnectionRefusedError as error:
            raise CommandFailed(f"no server answers at {url}; start one with `loramux serve`, or give --url") from error
        except TimeoutError as error:
            raise CommandFailed(f"{url} did not answer within {self._client.timeout:g} s") from error
        except socket.gaierror as error:
            raise CommandFailed(f"{url}: the host is not known") from error
        except ssl.SSLError as error:
            raise CommandFailed(f"{url}: TLS failed: {error.reason or error}") from error
        except (OSError, http.client.HTTPException) as error:
            raise CommandFailed(f"the connection to {url} broke: {str(error) or type(error).__name__}") from error


def _path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='')}"


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(text)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _refusal(status: int, text: bytes) -> str:
    """What to tell about a reply that is no success: the server's message, then its reasons, one a line."""
    error = (_parse(text) or {}).get("error")
    if not isinstance(error, dict):
        return f"the server answered with status {status}"
    lines = [str(error.get("message", "no reason given"))]
    reasons = error.get("reasons")
    if isinstance(reasons, list) and len(reasons) > 1:
        lines += [f"  - {reason}" for reason in reasons]
    hint = {401: "; set LORAMUX_ADMIN_KEY or LORAMUX_API_KEY", 403: "; set LORAMUX_ADMIN_KEY"}.get(status, "")
    return f"the server refused ({status}): " + "\n".join(lines) + hint
