"""Who calls, and who may call what: decided for every route in one place. One without a mark is the operator's.

A key is what the operator set (LORAMUX_API_KEY, LORAMUX_ADMIN_KEY), or one of those that `loramux keys` made. These are
looked up anew for each request, so that one that is revoked is refused from the next request on.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable
from enum import Enum
from typing import TypeVar

from fastapi import Request

from loramux_server.access.caller import Caller, Scope
from loramux_server.api.http.dependencies import Keys
from loramux_server.api.http.errors import NotAllowed, NotAuthenticated

_LOCAL_HOST = re.compile(rb"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]{1,5})?", re.IGNORECASE)
_WRONG = "wrong key"  # whether it never was one, is revoked or has expired


class Access(Enum):
    """What a route asks of its caller: one of these scopes, and whether it must belong to no tenant."""

    PUBLIC = ("public", (), False)  # nothing
    INFER = ("infer", (Scope.INFER,), False)
    LOOK = ("look", (Scope.INFER, Scope.UPLOAD, Scope.TRAIN), False)  # at models and adapters
    PUBLISH = ("publish", (Scope.UPLOAD, Scope.TRAIN), False)
    MANAGE = ("manage", (Scope.UPLOAD,), False)
    METRICS = ("metrics", (Scope.METRICS,), True)
    ADMIN = ("admin", (Scope.ADMIN,), False)
    OPERATOR = ("operator", (Scope.ADMIN,), True)

    def __init__(self, label: str, scopes: tuple[Scope, ...], operator: bool) -> None:
        self.label, self.scopes, self.operator = label, scopes, operator


Endpoint = TypeVar("Endpoint", bound=Callable[..., object])


def access(level: Access) -> Callable[[Endpoint], Endpoint]:
    """Mark an endpoint. One without a mark is `Access.OPERATOR`."""

    def mark(endpoint: Endpoint) -> Endpoint:
        endpoint.__dict__["access"] = level
        return endpoint

    return mark


def access_of(endpoint: object) -> Access:
    """What an endpoint asks for."""
    level: Access = getattr(endpoint, "access", Access.OPERATOR)
    return level


def caller_of(request: Request) -> Caller:
    """Who sent a request that was let in."""
    caller: Caller = request.scope["state"]["caller"]
    return caller


class Authorizer:
    """Refuses callers without the key that a route asks for.

    It looks at the endpoint that the router chose and at raw headers, never at the request's URL, which is partly made
    of the Host header, and that the caller writes.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._hosts = frozenset(name.lower().encode() for name in keys.allowed_hosts)
        self._admin = (keys.admin_key or keys.api_key or "").encode()
        self._api = (keys.api_key or "").encode()

    async def authorize(self, request: Request) -> None:
        """Afterwards `caller_of` says who calls. Raises NotAuthenticated, NotAllowed, AccessUnavailable."""
        level = access_of(request.scope["endpoint"])
        caller = Caller("nobody", None, frozenset()) if level is Access.PUBLIC else self._let_in(request, level)
        request.scope.setdefault("state", {})["caller"] = caller

    def _let_in(self, request: Request, level: Access) -> Caller:
        if level in self._open():
            self._require_local_host(request)
            return Caller("open", None, frozenset(Scope))
        caller = self._caller(_bearer(request))
        if not caller.may(level.scopes):
            raise NotAllowed(
                f"this key does not have the scope {' or '.join(level.scopes)}, which this call needs"
                + ("" if caller.is_operator or Scope.METRICS not in level.scopes else "; no tenant's key has it")
            )
        if level.operator and not caller.is_operator:
            raise NotAllowed("this call is the operator's: it needs a key that belongs to no tenant")
        return caller

    def needs_key(self, level: Access) -> bool:
        """Whether a call of this kind asks for a key here."""
        return level is not Access.PUBLIC and level not in self._open()

    def _open(self) -> frozenset[Access]:
        """What needs no key: all where there is none of any kind, and without an API key all but management."""
        if self._api or (self._keys.file is not None and self._keys.file.has_keys):
            return frozenset()
        if self._admin:
            return frozenset((Access.INFER, Access.LOOK, Access.METRICS))
        return frozenset(Access)

    def _caller(self, given: bytes) -> Caller:
        """Raises NotAuthenticated, AccessUnavailable."""
        is_admin = hmac.compare_digest(given, self._admin) and bool(self._admin)
        is_api = hmac.compare_digest(given, self._api) and bool(self._api)
        if is_admin:
            return Caller("LORAMUX_ADMIN_KEY" if self._keys.admin_key else "LORAMUX_API_KEY", None, frozenset(Scope))
        if is_api:
            return Caller("LORAMUX_API_KEY", None, frozenset((Scope.INFER, Scope.METRICS)))
        caller = None if self._keys.file is None else self._keys.file.caller(given)
        if caller is None:
            raise NotAuthenticated(_WRONG)
        return caller

    def _require_local_host(self, request: Request) -> None:
        """Without keys, a page on the web must not reach this server through a name that points at this machine."""
        if not self._keys.check_host:
            return
        values = _header_values(request, b"host")
        if len(values) == 1 and (_LOCAL_HOST.fullmatch(values[0]) or _name_in(values[0]) in self._hosts):
            return
        host = ascii(values[0][:100].decode("latin-1")) if values else "no host"
        raise NotAllowed(
            f"without a key this server answers requests that address localhost, and not {host}: name that host in "
            "--allowed-hosts (LORAMUX_ALLOWED_HOSTS) when you start the server, or set LORAMUX_API_KEY"
        )


def _bearer(request: Request) -> bytes:
    values = _header_values(request, b"authorization")
    scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
    key = key.strip(b" ")
    if scheme.lower() != b"bearer" or not key:
        raise NotAuthenticated("this server needs a key: send the header 'Authorization: Bearer <key>'")
    return key


def _name_in(host: bytes) -> bytes:
    """A Host header without its port."""
    name, colon, port = host.lower().rpartition(b":")
    return name if colon and port.isdigit() else host.lower()


def _header_values(request: Request, name: bytes) -> list[bytes]:
    return [value for key, value in request.scope["headers"] if key.lower() == name]
