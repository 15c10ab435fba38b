"""Who acts: known to all that is called meanwhile, so that what changes something deep inside can say who wanted it."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Actor:
    """Who wants a change.

    Attributes:
        who: a key's id, a part of the server, or a user of the machine; never a secret.
        tenant: whose change it is; None is the operator's.
        address: that the request came from; None without a request.
        request: its id.
    """

    who: str
    tenant: str | None = None
    address: str | None = None
    request: str | None = None


_ACTOR: ContextVar[Actor | None] = ContextVar("loramux_actor", default=None)
_SERVER = Actor("the server")


def current_actor() -> Actor:
    """Who acts here; the server itself where nobody said."""
    return _ACTOR.get() or _SERVER


@contextmanager
def acting(actor: Actor) -> Iterator[None]:
    """Within it, this is who acts; in tasks and worker threads that are started there too."""
    token = _ACTOR.set(actor)
    try:
        yield
    finally:
        _ACTOR.reset(token)


def at_the_shell() -> Actor:
    """The user who runs a command on this machine."""
    try:
        return Actor(f"{getpass.getuser()} at the shell")
    except (KeyError, OSError):  # a user without a name
        return Actor("a user at the shell")
