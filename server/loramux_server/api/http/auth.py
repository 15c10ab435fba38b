"""Who may call what. One dependency of the whole app decides for every route; a route without a mark needs a key."""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable
from enum import Enum
from typing import TypeVar

from fastapi import Request

from loramux_server.api.http.dependencies import Keys
from loramux_server.api.http.errors import NotAllowed, NotAuthenticated

_LOCAL_HOST = re.compile(rb"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]{1,5})?", re.IGNORECASE)


class Access(Enum):
    """What a route asks of its caller."""

    PUBLIC = "public"  # nothing
    API = "api"  # the API key, if there is one
    ADMIN = "admin"  # the admin key, else the API key, if there is one


Endpoint = TypeVar("Endpoint", bound=Callable[..., object])


def access(level: Access) -> Callable[[Endpoint], Endpoint]:
    """Mark an endpoint. One without a mark is `Access.API`."""

    def mark(endpoint: Endpoint) -> Endpoint:
        endpoint.__dict__["access"] = level
        return endpoint

    return mark


class Authorizer:
    """Refuses callers without the key that a route asks for.

    It looks at the endpoint that the router chose and at raw headers, never at the request's URL, which is partly made
    of the Host header, and that the caller writes.
    """

    def __init__(self, keys: Keys) -> None:
        self._check_host = keys.check_host
        self._hosts = frozenset(name.lower().encode() for name in keys.allowed_hosts)
        self._admin = (keys.admin_key or keys.api_key or "").encode()
        self._api = (keys.api_key or "").encode()

    async def authorize(self, request: Request) -> None:
        """Raises NotAuthenticated or NotAllowed."""
        level: Access = getattr(request.scope["endpoint"], "access", Access.API)
        if level is Access.PUBLIC:
            return
        needed = self._admin if level is Access.ADMIN else self._api
        if not needed:
            self._require_local_host(request)
            return
        given = self._bearer(request)
        is_admin = hmac.compare_digest(given, self._admin)
        is_api = bool(self._api) and hmac.compare_digest(given, self._api)
        if is_admin or (is_api and level is Access.API):
            return
        if is_api:
            raise NotAllowed("this key does not reach adapter management")
        raise NotAuthenticated("wrong key")

    def _bearer(self, request: Request) -> bytes:
        values = _header_values(request, b"authorization")
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        key = key.strip(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise NotAuthenticated("this server needs a key: send the header 'Authorization: Bearer <key>'")
        return key

    def _require_local_host(self, request: Request) -> None:
        """Without keys, a page on the web must not reach this server through a name that points at this machine."""
        if not self._check_host:
            return
        values = _header_values(request, b"host")
        if len(values) == 1 and (_LOCAL_HOST.fullmatch(values[0]) or _name_in(values[0]) in self._hosts):
            return
        host = ascii(values[0][:100].decode("latin-1")) if values else "no host"
        raise NotAllowed(
            f"without a key this server answers requests that address localhost, and not {host}: name that host in "
            "--allowed-hosts (LORAMUX_ALLOWED_HOSTS) when you start the server, or set LORAMUX_API_KEY"
        )


def _name_in(host: bytes) -> bytes:
    """A Host header without its port."""
    name, colon, port = host.lower().rpartition(b":")
    return name if colon and port.isdigit() else host.lower()


def _header_values(request: Request, name: bytes) -> list[bytes]:
    return [value for key, value in request.scope["headers"] if key.lower() == name]
