"""What the routes are built from: the parts of the server, the base as clients see it, keys and limits.

`serving.build` passes in the real parts. A part is a protocol here only where tests put another one in its place,
and each protocol says why they do.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loramux_server.access.rates import Rates
from loramux_server.api.http.visible_store import VisibleStore
from loramux_server.metrics.metrics import Metrics
from loramux_server.wire.connections import Connections
from loramux_server.wire.pace import Pace

if TYPE_CHECKING:
    from loramux_adapters.artifact.own_tokens import OwnTokens
    from loramux_adapters.lora.verify import Checked
    from loramux_adapters.store.store import AdapterRecord, Lease, Published, Staging
    from loramux_server.access.access_file import AccessFile
    from loramux_server.access.audit_file import AuditFile
    from loramux_server.access.caller import Caller
    from loramux_server.api.http.model_names import RequestedAdapter
    from loramux_server.base.infill import Infill
    from loramux_server.engine.scheduling.grammar import Grammar
    from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
    from loramux_server.engine.scheduling.sequence import TokenOutput
    from loramux_server.fingerprint.replay import ReplayOutcome
    from loramux_server.grammar.shape import Shape
    from loramux_server.publishing.hub_adapters import HubAdapters
    from loramux_server.publishing.lora_path import LoraPathRoot
    from loramux_server.publishing.pins import Pins
    from loramux_server.tools.conventions import Conventions


class EngineLike(Protocol):
    """The engine as the event loop sees it; the server's is `EngineClient`.

    Tests replace it: theirs needs no model, and stalls, fails or crashes at the token they choose.
    """

    def submit(self, *sequences: EngineSequence) -> Sequence[AsyncGenerator[TokenOutput, None]]:
        """Takes all sequences of a request, or none. Outputs of each; the last has a finish reason.

        Closing an iterator that has begun aborts its sequence; one that never begins needs an `abort`.

        Raises: ServerBusy, ServerDraining, EngineDead, RequestError.
        """
        ...

    def abort(self, sequence_id: str) -> None:
        """Take a sequence out within one step; nothing happens if it is unknown or over. Never blocks."""
        ...

    def residency(self, version: str) -> str:
        """The fastest memory that holds this version: "device", "host" or "disk"."""
        ...

    @property
    def alive(self) -> bool: ...

    @property
    def ready(self) -> bool: ...


class StoreLike(Protocol):
    """The adapter store; the server's is `AdapterStore`. Any thread may call any method, and may wait for the disk.

    Tests replace it: theirs takes any bytes for an adapter, fails on demand, and counts the leases that are open.

    Raises: AdapterNotFound, InvalidAdapterName, AdapterCorrupt, BaseMismatch, RollbackImpossible, StoreUnavailable.
    """

    def acquire(self, name: str, version_prefix: str | None = None) -> Lease: ...

    def records(self) -> Sequence[AdapterRecord]: ...

    def record(self, name: str) -> AdapterRecord: ...

    def delete(self, name: str) -> None: ...

    def rollback(self, name: str, version_prefix: str | None = None) -> Published: ...

    def directory(self, version: str) -> Path:
        """Where a version's files are, for reading while it is leased."""
        ...

    def stage(self) -> AbstractContextManager[Staging]: ...


class AdapterCheck(Protocol):
    """Checks the files of an upload against the base, in a worker thread; `force` accepts another base id.

    Tests replace it: theirs needs no base and no valid adapter, and takes as long as they want.

    Raises: AdapterRejected, BaseMismatch.
    """

    def __call__(self, directory: Path, *, force: bool) -> Checked: ...


class AdapterProof(Protocol):
    """Tries a checked upload out on the engine, and says how its fingerprint replays; the server's is `Prover.prove`.

    Tests replace it: the real one needs an engine with a model.

    Raises: AdapterRejected (no effect, or a fingerprint that does not replay), ServerBusy, EngineDead, SequenceFailed.
    """

    async def __call__(
        self,
        directory: Path,
        checked: Checked,
        *,
        force: bool = False,
        allow_no_effect: bool = False,
        skip_replay: bool = False,
        keep: bool = True,
    ) -> ReplayOutcome: ...


class AdapterPublish(Protocol):
    """Makes an upload the current version of a name, in a worker thread; the server's is `Publisher.publish`.

    Tests replace it: theirs publishes to the store that they put in place of the real one.

    Raises: InvalidAdapterName, AdapterRejected, StoreUnavailable.
    """

    def __call__(self, name: str, staging: Staging, checked: Checked, proof: ReplayOutcome) -> Published: ...


class TokenizerLike(Protocol):
    """The base's tokenizer; the server's is `BaseTokenizer`. Any number of threads may call its methods at once.

    Tests replace it: with one token for each byte they can tell every count and every offset of a reply.
    """

    @property
    def vocab_size(self) -> int:
        """Ids in [0, vocab_size) have an embedding."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that never show in a reply's text."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a reply."""
        ...

    @property
    def longest_token(self) -> int:
        """Most characters that one token can stand for."""
        ...

    @property
    def infill(self) -> Infill | None:
        """How the base fills in what stands between two texts; None if it has no tokens for that."""
        ...

    def with_tokens(self, own: OwnTokens | None) -> TokenizerLike:
        """This tokenizer with the tokens that an adapter adds to it; may take a second the first time."""
        ...

    def encode(self, text: str, *, special: bool = True, around: bool = True) -> list[int]:
        """A prompt's ids.

        `special`: text that reads like a special token becomes one. Without it no text does.
        `around`: with the special tokens that the base expects around a prompt.
        """
        ...

    def encode_piece(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text that follows another."""
        ...

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """A chat template over the messages: the base's own, or another that an adapter brings.

        `continue_final_message`: the prompt ends where the text of the last message does.

        Raises RequestError if there is no template, or it refuses these messages.
        """
        ...

    def conventions(self, chat_template: str | None = None) -> Conventions:
        """How a chat template has calls and thoughts written: the base's own, or another that an adapter brings.

        May take long the first time. Raises RequestError if there is no template, or it cannot be used.
        """
        ...

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of these ids, without clean-up of spaces; special tokens are left out unless `special` is true."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this id stands for; part of a character for some."""
        ...


class GrammarsLike(Protocol):
    """Makes what holds a reply to a shape; the server's is `Grammars`. Any thread may call it, and may wait.

    Tests replace it: theirs needs no tokenizer of a base, and refuses on demand.
    """

    def of(self, shape: Shape, param: str, own: OwnTokens | None = None) -> Grammar:
        """For one sequence, whose adapters add `own` to the base's tokens.

        Raises RequestError, of this parameter: it cannot be parsed, or is not supported.
        """
        ...


@dataclass(frozen=True, slots=True)
class ServedBase:
    """The base model, as clients see it.

    Attributes:
        name: the served model name.
        base_id: digest of the base, hex.
        context: longest prompt and reply together, in tokens.
        reply: longest reply of a chat that names no length.
        created: unix seconds, shown in the model list.
    """

    name: str
    base_id: str
    context: int
    reply: int
    created: int


@dataclass(frozen=True, slots=True)
class Keys:
    """Who may call. Without `api_key` generation is open; without any key, adapter management is open too. See `auth`.

    Attributes:
        api_key: for everything but adapter management, and for that too if there is no `admin_key`.
        admin_key: for everything.
        check_host: where a route is open, take only requests whose Host is this machine (against DNS rebinding).
        allowed_hosts: further names of this machine, without a port.
        file: keys that were made for tenants and for the operator. Once there is one, nothing is open. None keeps none.
        audit: where changes are logged.
    """

    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    check_host: bool = True
    allowed_hosts: Sequence[str] = ()
    file: AccessFile | None = None
    audit: AuditFile | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what one client can make the server hold or do. Bytes and seconds.

    Attributes:
        body_bytes: a JSON body.
        upload_bytes: the files of an adapter, before and after they are unpacked.
        header_bytes: all header names and values of a request.
        stall_seconds, body_rate: a body comes with so many bytes a second, and may be behind that by so many seconds.
        uploads: uploads at the same time; others wait up to `upload_wait_seconds` for a place.
        upload_seconds: longest that the files of one may take to arrive.
        request_seconds: longest from arrival to the last token; None is no limit.
    """

    body_bytes: int = 2 * 2**20
    upload_bytes: int = 1024 * 2**20
    header_bytes: int = 32 * 2**10
    stall_seconds: float = 30.0
    body_rate: float = 16 * 2**10
    uploads: int = 4
    upload_wait_seconds: float = 10.0
    upload_seconds: float = 1800.0
    request_seconds: float | None = None

    @property
    def pace(self) -> Pace:
        return Pace(self.stall_seconds, self.body_rate)


@dataclass(frozen=True, slots=True)
class Dependencies:
    """Given to every group of routes.

    Attributes:
        check, prove, publish: the three stations of an upload, in this order.
        grammars: hold replies to shapes.
        lora_path_root: loads adapters from this machine's disk for vLLM's calls; without it those routes do not exist.
        special_in_prompts: text in prompts of /v1/completions may become special tokens.
        connections: those that are open, and what was refused and cut.
        cors_origins: web pages that may call from a browser; "*" is every page.
        hub: fetches adapters when they are first asked for; None fetches none.
        rates: what tenants have taken of the server.
    """

    engine: EngineLike
    store: StoreLike
    pins: Pins
    tokenizer: TokenizerLike
    check: AdapterCheck
    prove: AdapterProof
    publish: AdapterPublish
    metrics: Metrics
    base: ServedBase
    grammars: GrammarsLike
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    lora_path_root: LoraPathRoot | None = None
    special_in_prompts: bool = True
    connections: Connections = field(default_factory=Connections)
    cors_origins: Sequence[str] = ()
    hub: HubAdapters | None = None
    rates: Rates = field(default_factory=Rates)

    def visible(self, caller: Caller) -> VisibleStore:
        """The adapters that this caller may name. Routes look at no others."""
        return VisibleStore(self.store, caller.tenant)

    async def fetched(self, targets: Iterable[RequestedAdapter]) -> None:
        """Returns when those of the adapters that a hub has are in the store, if they may be fetched.

        Raises RequestError, ServerBusy.
        """
        for target in targets:
            if self.hub is not None and target.hub is not None:
                await self.hub.ready(target.hub, self.limits.request_seconds)
