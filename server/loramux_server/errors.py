"""Errors of the server package. The HTTP status of each is decided in one table in `api/http/errors.py`.

LoramuxError
├── ConfigError               a flag, environment variable or config file entry is wrong (before anything starts)
├── CommandFailed             a command line's work cannot be done (port in use, no server answers, it refuses)
│   ├── ServerRefused         a server answered with a status that is no success
│   ├── ConnectionLost        no server could be reached, or the connection to it broke
│   ├── NotOnHub              a model hub has no such repository or revision, or does not give it to us
│   └── HubUnreachable        a model hub cannot be asked now, or sends what is not whole
├── BaseModelError            the base cannot be loaded, or cannot be served correctly
├── RequestError              the client's request cannot be served as it stands; carries `param` and `code`
├── NoSuchKey                 no key has this id
├── AccessUnavailable         the file of keys cannot be read or written now
├── QuotaExceeded             a tenant keeps as many adapters, or bytes of them, as it may
├── RateLimited               a tenant has taken what it may take for now
├── ServerBusy                the inbox is full; try again later
├── ServerDraining            the server is shutting down and takes no new work
├── EngineDead                the engine thread has stopped; only a restart helps
└── SequenceFailed            the engine gave this sequence up (its step failed, its adapter could not be read)
    └── ReplyImpossible       what the request itself allows and forbids leaves no token
        └── GrammarFailed     its reply cannot go on within its grammar, or not in time

MaskLate (no LoramuxError)    a grammar has not said yet what may come next; never leaves the engine
"""

from __future__ import annotations


class LoramuxError(Exception):
    """Base class: everything this package raises on purpose."""


class ConfigError(LoramuxError):
    """A setting is wrong; the message names it and says what is allowed."""


class CommandFailed(LoramuxError):
    """What a command was asked to do cannot be done; the message says why in one line."""


class ServerRefused(CommandFailed):
    """A server answered with a status that is no success. `after`: seconds that it asks to wait, if it does."""

    def __init__(self, status: int, message: str, *, after: float | None = None) -> None:
        self.status = status
        self.after = after
        super().__init__(message)


class ConnectionLost(CommandFailed):
    """No server could be `reached`, or it was, and then the connection broke."""

    def __init__(self, message: str, *, reached: bool) -> None:
        self.reached = reached
        super().__init__(message)


class NotOnHub(CommandFailed):
    """A model hub has no such repository or revision, or it is gated or private; asking again does not help."""


class HubUnreachable(CommandFailed):
    """A model hub cannot be asked now, is too slow, or sends what is not whole; asking again later may help."""


class BaseModelError(LoramuxError):
    """The base model cannot be loaded or cannot be served correctly; the message says why."""


class RequestError(LoramuxError):
    """The request is malformed or out of range (HTTP 400, or 404 for `code="model_not_found"`)."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.param = param
        self.code = code
        super().__init__(message)


class NoSuchKey(LoramuxError):
    """No key has this id, or none that the caller may see."""


class AccessUnavailable(LoramuxError):
    """The file of keys cannot be read or written; nobody is let in on a guess."""


class QuotaExceeded(LoramuxError):
    """A tenant keeps as many adapters, or as many bytes of them, as it may; the message says what to do."""


class RateLimited(LoramuxError):
    """A tenant has taken what it may; `kind` says of what. `retry_after`: seconds until it may again, if known."""

    def __init__(self, message: str, *, kind: str, retry_after: int | None = None) -> None:
        self.kind = kind
        self.retry_after = retry_after
        super().__init__(message)


class ServerBusy(LoramuxError):
    """The bounded inbox is full. `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class ServerDraining(ServerBusy):
    """The server finishes what runs and takes no new work."""


class EngineDead(LoramuxError):
    """The engine thread has ended."""


class SequenceFailed(LoramuxError):
    """This sequence ended with an error on the engine's side; others go on."""


class ReplyImpossible(SequenceFailed):
    """What a request allows and what it forbids leave no token; the same request again would end alike."""


class GrammarFailed(ReplyImpossible):
    """A reply cannot go on within the grammar that it was asked for; the message is for the client."""


class MaskLate(Exception):
    """A grammar has not said yet what may come next. Nothing is wrong: ask again later."""
