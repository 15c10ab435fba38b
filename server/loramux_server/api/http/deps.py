"""Everything the API is built from; put together in `cli`, or from fakes in tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from loramux_server.api.http.ports import (
    CheckPort,
    EnginePort,
    LocalPort,
    PinsPort,
    ProvePort,
    PublishPort,
    StorePort,
    TokenizerPort,
)
from loramux_server.metrics.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Base:
    """The base model, as clients see it.

    Attributes:
        name: the served model name.
        base_id: digest of the base, hex.
        context: longest prompt and reply together, in tokens.
        created: unix seconds, shown in the model list.
    """

    name: str
    base_id: str
    context: int
    created: int


@dataclass(frozen=True, slots=True)
class Keys:
    """Who may call. Without `api_key` generation is open, without any key management is too; see `auth`.

    Attributes:
        api_key: for everything but adapter management, and for that too if there is no `admin_key`.
        admin_key: for everything.
        check_host: where a route is open, take only requests whose Host is this machine (against DNS rebinding).
    """

    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    check_host: bool = True


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what one client can make the server hold or do. Bytes and seconds.

    Attributes:
        body_bytes: a JSON body.
        upload_bytes: the files of an adapter, before and after they are unpacked.
        header_bytes: all header names and values of a request.
        stall_seconds: longest a body may take for its next 64 KiB.
        uploads: uploads at the same time; others wait up to `upload_wait_seconds` for a place.
        request_seconds: longest from arrival to the last token; None is no limit.
    """

    body_bytes: int = 2 * 2**20
    upload_bytes: int = 1024 * 2**20
    header_bytes: int = 32 * 2**10
    stall_seconds: float = 30.0
    uploads: int = 4
    upload_wait_seconds: float = 10.0
    request_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Deps:
    """`local`: where vLLM's calls load adapters from; without it there are no such calls."""

    engine: EnginePort
    store: StorePort
    pins: PinsPort
    tokenizer: TokenizerPort
    check: CheckPort
    prove: ProvePort
    publish: PublishPort
    metrics: Metrics
    base: Base
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    local: LocalPort | None = None
