"""What the API needs from the rest of the server, as protocols: tests pass fakes, `cli` passes the real things."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from loramux_server.engine.sequence import Sequence as EngineSequence
    from loramux_server.engine.sequence import TokenOutput

Message = dict[str, str]  # {"role": ..., "content": ...}


class EnginePort(Protocol):
    """The engine, seen from the event loop."""

    def generate(self, sequence: EngineSequence) -> AsyncIterator[TokenOutput]:
        """Outputs of one sequence; the last has a finish reason. Closing the iterator aborts the sequence.

        Raises, when called or when first advanced: ServerBusy, ServerDraining, EngineDead, RequestError.
        """
        ...

    def abort(self, sequence_id: str) -> None:
        """Take a sequence out within one step; nothing happens if it is unknown or over. Never blocks."""
        ...

    def residency(self, version: str) -> str:
        """Fastest tier that holds this version: "device", "host" or "disk"."""
        ...

    @property
    def alive(self) -> bool: ...

    @property
    def ready(self) -> bool: ...


class LeasePort(Protocol):
    """A reference on one adapter version. While it is held, the version stays usable."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Of the version's files, and so at least what it takes in host memory."""
        ...

    def release(self) -> None:
        """Called once, in a worker thread."""
        ...


class VersionPort(Protocol):
    """One stored version of an adapter. `corrupt`: its files were found damaged."""

    @property
    def version(self) -> str: ...

    @property
    def created(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def base_verified(self) -> bool: ...

    @property
    def fingerprint(self) -> str:
        """How the fingerprint it came with was replayed: exact, within_tolerance, mismatch or none."""
        ...

    @property
    def corrupt(self) -> bool: ...


class RecordPort(Protocol):
    """One registered adapter. Times are unix seconds."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def target_modules(self) -> Sequence[str]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def created(self) -> int: ...

    @property
    def updated(self) -> int: ...

    @property
    def base_verified(self) -> bool: ...

    @property
    def fingerprint(self) -> str:
        """How the fingerprint it came with was replayed: exact, within_tolerance, mismatch or none."""
        ...

    @property
    def corrupt(self) -> bool: ...

    @property
    def pinned(self) -> bool: ...

    @property
    def versions(self) -> Sequence[VersionPort]: ...

    @property
    def references(self) -> int: ...


class StagingPort(Protocol):
    """A private directory of an upload, removed when its context ends unless it was published."""

    @property
    def directory(self) -> Path: ...


class PublishedPort(Protocol):
    @property
    def version(self) -> str: ...

    @property
    def outcome(self) -> str:
        """ "created", "updated", "unchanged", "repaired" or "rolled_back"."""
        ...


class StorePort(Protocol):
    """The adapter store. Every method may be called from any thread, and may wait for the disk.

    Raises: AdapterNotFound, InvalidAdapterName, AdapterCorrupt, RollbackImpossible, StoreUnavailable.
    """

    def acquire(self, name: str, version_prefix: str | None = None) -> LeasePort: ...

    def records(self) -> Sequence[RecordPort]: ...

    def record(self, name: str) -> RecordPort: ...

    def delete(self, name: str) -> None: ...

    def rollback(self, name: str, version_prefix: str | None = None) -> PublishedPort: ...

    def directory(self, version: str) -> Path:
        """Where a version's files are, for reading while it is leased."""
        ...

    # The staging is the one that `PublishPort` takes; its own type is the store's affair.
    def stage(self) -> AbstractContextManager[Any]: ...


class PinsPort(Protocol):
    """Names whose adapters stay in memory. Raises: AdapterNotFound, PinRefused, StoreUnavailable."""

    def pin(self, name: str) -> None: ...

    def unpin(self, name: str) -> None: ...


class LocalPort(Protocol):
    """Adapters in a directory of the server's machine, in a worker thread."""

    def load(self, name: str, path: str) -> None:
        """Publish what is at this path. Raises RequestError, AdapterNotFound, and what publishing raises."""
        ...


class CheckedPort(Protocol):
    """What the check of an upload found out. `base_id` is the one that the adapter names, if it names one."""

    @property
    def version(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def target_modules(self) -> Sequence[str]: ...

    @property
    def base_verified(self) -> bool: ...

    @property
    def base_id(self) -> str | None: ...


class CheckPort(Protocol):
    """Checks the files of an upload against the base, in a worker thread; `force` accepts another base id.

    Raises: AdapterRejected, BaseMismatch.
    """

    def __call__(self, directory: Path, *, force: bool) -> CheckedPort: ...


class ProvePort(Protocol):
    """Tries the files of an upload out on the engine, once they are checked; says how their fingerprint replays.

    Raises: AdapterRejected (no effect, or a fingerprint that does not replay), ServerBusy, EngineDead, SequenceFailed.
    """

    async def __call__(
        self, directory: Path, checked: Any, *, force: bool, allow_no_effect: bool
    ) -> Literal["exact", "within_tolerance", "mismatch", "none"]: ...


class PublishPort(Protocol):
    """Makes the files of an upload, checked and tried out, the current version of a name, in a worker thread.

    Raises: InvalidAdapterName, AdapterRejected, StoreUnavailable.
    """

    def __call__(self, name: str, staging: Any, checked: Any, proof: Any) -> PublishedPort: ...


class TokenizerPort(Protocol):
    """The base's tokenizer. Every method may be called from several threads at once."""

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

    def encode(self, text: str) -> list[int]:
        """A prompt's ids, with the special tokens that the base expects around it."""
        ...

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """The base's own chat template over the messages, ready for the assistant's turn.

        Raises RequestError if the base has no template, or its template refuses these messages.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of these ids, without clean-up of spaces."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this id stands for; part of a character for some."""
        ...
