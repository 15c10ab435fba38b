"""One request to a running server and its reply. Whatever goes wrong is said in one line, with what to do about it."""

from __future__ import annotations

import json
import re
import select
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any
from urllib.parse import quote
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx

from loramux_server.errors import CommandFailed, ConnectionLost, ServerRefused
from loramux_server.plain_text import masked, shortened

MAX_REPLY_BYTES = 64 << 20  # a list of many thousand adapters
MAX_MESSAGE = 2000  # characters of what a server says about a refusal, for each of its reasons
MAX_REASONS = 50
CONNECT_SECONDS = 30.0
HEADERS = {b"accept": b"application/json, application/gzip", b"accept-encoding": b"identity"}
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ServerReply:
    status: int
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServerConnection:
    """How a server is reached. Each request opens a connection of its own, follows no redirect, raises CommandFailed.

    Attributes:
        url: where the server is, such as http://127.0.0.1:8000; may hold a path prefix.
        key: sent as a bearer token; None sends none.
        timeout: longest silence of the server, in seconds.
        through_proxy: go through the proxy that HTTP_PROXY or HTTPS_PROXY names, unless the server is on this machine
            or NO_PROXY names it.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    through_proxy: bool = False

    @property
    def shown_url(self) -> str:
        """The URL as it may be shown."""
        return masked(self.url)

    def call(
        self,
        method: str,
        path: Sequence[str],
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> ServerReply:
        """Sends a request and returns the reply to it.

        Args:
            path: its segments, names as they are.
            body: sent as JSON.
        """
        with self.stream(method, path, params=params, body=body) as response:
            return self.read(response)

    def read(self, response: httpx.Response) -> ServerReply:
        """The reply to a request: an object in JSON, or nothing."""
        text = _read(response)
        reply = _parse(text)
        if text and reply is None:
            raise CommandFailed(f"{self.shown_url} did not answer in JSON; is it a loramux server?")
        return ServerReply(response.status_code, reply or {})

    @contextmanager
    def stream(
        self,
        method: str,
        path: Sequence[str],
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        files: Mapping[str, tuple[str, IO[bytes]]] | None = None,
        progress: Progress = lambda sent, total: None,
    ) -> Iterator[httpx.Response]:
        """As `call`, but gives a good reply before its body is read. Errors of reading it are told in the same way.

        Args:
            files: parts of a form: their names, file names, and open files, which are read while they are sent.
            progress: called with the bytes of the form sent so far and in all.
        """
        url = _http_url(self.url)
        if url is None:
            raise CommandFailed(f"{shortened(self.shown_url)!r} is not a URL such as http://127.0.0.1:8000")
        proxy = _proxy_for(url) if self.through_proxy else None
        with self._failures_told(proxy), self._open(url, proxy) as client:
            request = client.build_request(method, _quoted(path), params=params, json=body, files=files)
            if files is not None:
                request = _watched(client, request, progress)
            response = client.send(request, stream=True)
            try:
                if not response.is_success:
                    raise _refusal(response)
                yield response
            finally:
                response.close()

    def _open(self, url: httpx.URL, proxy: httpx.Proxy | None) -> httpx.Client:
        headers = dict(HEADERS)
        if self.key is not None:
            if not self.key or not self.key.isprintable() or self.key != self.key.strip():
                raise CommandFailed("the key is empty, or holds a space at an end or a character that cannot be sent")
            headers[b"authorization"] = b"Bearer " + self.key.encode()
        trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if url.scheme == "https":
            trusted.load_default_certs()  # the system's, which may hold a company's own; takes 30 ms
        return httpx.Client(
            base_url=url.copy_with(userinfo=b""),  # which would take the key's place
            headers=headers,
            timeout=httpx.Timeout(self.timeout, connect=min(self.timeout, CONNECT_SECONDS)),
            verify=trusted,
            proxy=proxy,
            trust_env=False,
        )

    @contextmanager
    def _failures_told(self, proxy: httpx.Proxy | None) -> Iterator[None]:
        """Turns a failure of the network into CommandFailed."""
        where = self.shown_url if proxy is None else f"{self.shown_url} through the proxy {proxy.url.host}"
        try:
            yield
        except httpx.TimeoutException as error:
            seconds = self.timeout if not isinstance(error, httpx.ConnectTimeout) else CONNECT_SECONDS
            raise CommandFailed(f"{where} did not answer within {min(self.timeout, seconds):g} s") from error
        except httpx.RequestError as error:
            match _system_error(error):
                case ConnectionRefusedError():
                    told = f"no server answers at {where}; start one with `loramux serve`, or give another URL"
                    raise ConnectionLost(told, reached=False) from error
                case socket.gaierror():
                    raise CommandFailed(f"{where}: the host is not known") from error
                case ssl.SSLError() as cause:
                    raise CommandFailed(f"{where}: TLS failed: {cause.reason or cause}") from error
                case _:
                    told = f"the connection to {where} broke: {str(error) or type(error).__name__}"
                    raise ConnectionLost(told, reached=not isinstance(error, httpx.ConnectError)) from error


def _http_url(text: str) -> httpx.URL | None:
    try:
        url = httpx.URL(text)
        url.raw_host.decode("ascii").encode("idna")  # as the resolver does, which raises for some that httpx takes
        return url if url.scheme in ("http", "https") and url.host and (url.port or 0) <= 65535 else None
    except (httpx.InvalidURL, UnicodeError):
        return None


def _quoted(path: Sequence[str]) -> str:
    """Slashes in a name stay: %2F is refused by many a proxy, and means the same to our server.

    Dots alone would lead to another path: `quote` leaves them as they are. A name may be any bytes of a shell's.
    """
    return "/".join(
        quote(part, safe="", errors="surrogateescape") if part.strip(".") else part.replace(".", "%2E")
        for name in path
        for part in name.split("/")
    )


def _watched(client: httpx.Client, form: httpx.Request, progress: Progress) -> httpx.Request:
    """The same request, with its progress told; stops where the server answers before it has all, that is, refuses."""
    total = int(form.headers["content-length"])
    sockets: list[socket.socket] = []

    def on_event(event: str, info: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.complete" and form.url.scheme == "http":  # TLS bytes may mean anything
            sockets.append(info["return_value"].get_extra_info("socket"))

    def pieces() -> Iterator[bytes]:
        assert isinstance(form.stream, httpx.SyncByteStream)
        sent = 0
        for piece in form.stream:
            if select.select(sockets, [], [], 0)[0]:
                raise httpcore.WriteError("the server has answered")  # after which httpcore reads the reply
            sent += len(piece)
            if sent > total:
                break
            yield piece
            progress(sent, total)
        if sent != total:
            raise CommandFailed("a file became shorter or longer while it was sent; try again")

    return client.build_request(
        form.method, form.url, headers=form.headers, content=pieces(), extensions={"trace": on_event}
    )


def _proxy_for(url: httpx.URL) -> httpx.Proxy | None:
    """The proxy that the environment names for this server, which is read as urllib does."""
    from loramux_server.config.serve import is_loopback  # and with it all settings, which `adapters` does without

    named = getproxies().get(url.scheme)
    if not named or is_loopback(url.host) or proxy_bypass(url.netloc.decode("ascii")):
        return None
    proxy = _http_url(named if "://" in named else f"http://{named}")
    if proxy is None:
        variable = f"{url.scheme.upper()}_PROXY"
        raise CommandFailed(f"{variable} is not the URL of a proxy such as http://proxy:3128; NO_PROXY leaves it out")
    return httpx.Proxy(proxy)


def _system_error(error: BaseException | None) -> BaseException | None:
    """What the system said, of which httpx's error tells the text alone."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _read(response: httpx.Response) -> bytes:
    """The body; of one that is too long the beginning, which is no JSON."""
    text = bytearray()
    for piece in response.iter_bytes():
        text += piece
        if len(text) > MAX_REPLY_BYTES:
            break
    return bytes(text[:MAX_REPLY_BYTES])


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _refusal(response: httpx.Response) -> ServerRefused:
    """What a reply that is no success means: the server's message, then its reasons, one a line."""
    status = response.status_code
    error = (_parse(_read(response)) or {}).get("error")
    if isinstance(error, dict):
        lines = [_said(error.get("message", "no reason given"))]
        reasons = error.get("reasons")
        if isinstance(reasons, list) and len(reasons) > 1:
            lines += [f"  - {_said(reason)}" for reason in reasons[:MAX_REASONS]]
            lines += [f"  and {len(reasons) - MAX_REASONS:,} more"] if len(reasons) > MAX_REASONS else []
        hint = {401: "; set LORAMUX_ADMIN_KEY or LORAMUX_API_KEY", 403: "; set LORAMUX_ADMIN_KEY"}.get(status, "")
        told = f"the server refused ({status}): " + "\n".join(lines) + hint
    else:
        told = f"the server answered with status {status}"
    after = response.headers.get("retry-after", "")
    return ServerRefused(status, told, after=max(1.0, float(after)) if re.fullmatch("[0-9]{1,6}", after) else None)


def _said(text: object) -> str:
    """A server's words, as they may be shown."""
    return shortened(str(text), MAX_MESSAGE)
