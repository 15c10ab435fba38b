"""Errors of the adapter package.

AdapterError
├── InvalidAdapterName        the name breaks the naming rule
├── AdapterNotFound           no adapter of that name, or no version with that digest prefix
├── AdapterRejected           the files cannot be served on this base; carries every reason
│   └── VectorsNotServed      they can, but not with the room that there is here
├── AdapterTooLarge           more bytes than the operator allows
├── BaseMismatch              made for another base model
├── RollbackImpossible        there is no version to go back to, or it cannot be served
├── PinRefused                what is pinned already leaves no room for it in host memory
├── AdapterCorrupt            a stored version no longer matches its digest, or cannot be read
├── TemplateFailed            a chat template is wrong, refuses the messages, or would not end; names its line
│   └── TemplateRefuses       on purpose: by its own raise_exception
├── TokenizerMissing          the base has no fast tokenizer
├── TrainingError             a training or evaluation cannot be done as asked
│   ├── RecipeError           the recipe contradicts itself, the base or the machine
│   ├── DataError             the examples cannot be used; names file and line (training/: LineError, OverlapError)
│   ├── CheckpointError       a checkpoint cannot be written, read or continued from
│   └── MemoryShort           it does not fit into memory; says what to lower
│       └── DeviceFull        a device has no room for a tensor; says how much is free
├── DeviceMissing             this machine has no such device
├── CannotCapture             work cannot be written down as a graph: it waits, reads, allocates or changes streams
└── StoreUnavailable          the store's directory or index cannot be used (disk full, locked, permission)
    └── IndexLost             the index is gone, damaged or lacks changes, beside versions that it should know
"""

from __future__ import annotations

from collections.abc import Sequence


class AdapterError(Exception):
    """Base class: everything this package raises on purpose."""


class InvalidAdapterName(AdapterError):
    """The name breaks the rule of `names.py`, or it is reserved."""


class AdapterNotFound(AdapterError):
    """No adapter is registered under this name, or no version of it has this digest prefix."""


class AdapterRejected(AdapterError):
    """The upload cannot be served on this base. `reasons` lists every one that was found, most basic first."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = list(reasons)
        super().__init__("; ".join(self.reasons))


class VectorsNotServed(AdapterRejected):
    """It has magnitudes, biases or output scales, for which slots have no room here."""

    def __init__(self) -> None:
        super().__init__(
            [
                "the adapter has magnitudes (use_dora), biases or output scales, for which a server on a card keeps "
                "no room unless it is told to: start it with --adapter-vectors"
            ]
        )


class AdapterTooLarge(AdapterError):
    """The upload has more bytes than the operator allows. `limit` is in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"the upload is larger than the limit of {limit} bytes")


class BaseMismatch(AdapterError):
    """The adapter names another base model than the one that is served."""

    def __init__(self, adapter_base_id: str, served_base_id: str) -> None:
        self.adapter_base_id = adapter_base_id
        self.served_base_id = served_base_id
        super().__init__(f"the adapter was made for base {adapter_base_id}, this server holds base {served_base_id}")


class RollbackImpossible(AdapterError):
    """The name keeps no older version than the one it points at, or that one cannot be served any more."""


class PinRefused(AdapterError):
    """Pinned adapters never leave host memory, so together they must fit the part of it that is set apart for them."""

    def __init__(self, name: str, nbytes: int, *, pinned: int, limit: int) -> None:
        """`pinned`: bytes of those that are pinned already, of `limit`."""
        super().__init__(
            f"the adapter {name} has {nbytes} bytes, and pinned ones have {pinned} of the {limit} bytes of host memory "
            "that they may have: unpin others, or start the server with a larger --host-cache-mib"
        )


class AdapterCorrupt(AdapterError):
    """A stored version cannot be read back as it was published."""


class StoreUnavailable(AdapterError):
    """The store cannot be read or written now; what it already holds is untouched."""


class IndexLost(StoreUnavailable):
    """The store cannot be opened; nothing of it was changed. Its index has to be made anew, by whoever runs it."""

    def __init__(self, fault: str, versions: int, directory: str) -> None:
        """`fault`: what is wrong with it. `versions`: how many lie beside it. `directory`: as a shell reads it."""
        self.versions = versions
        super().__init__(
            f"the adapter store's index.sqlite cannot be used: {fault}. Beside it are {versions} versions' files; "
            "nothing was changed. Make it anew from what each version's directory says of itself: "
            f"loramux adapters rebuild-index --adapter-dir {directory}"
        )


class TemplateFailed(AdapterError):
    """A chat template cannot be used, or not for these messages. `line` of it is to blame; None if that is unknown."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        self.reason = reason
        self.line = line
        super().__init__(reason if line is None else f"{reason} (line {line} of the template)")


class TemplateRefuses(TemplateFailed):
    """The template itself says that it does not take such messages."""


class TokenizerMissing(AdapterError):
    """The base has no fast tokenizer (tokenizer.json)."""


class TrainingError(AdapterError):
    """A training, an evaluation or a merge cannot be done as asked."""


class RecipeError(TrainingError):
    """The recipe contradicts itself, or asks for what this base or machine cannot do."""


class DataError(TrainingError):
    """The examples cannot be used; the message names the file and, where there is one, the line."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be written, read, or continued from with this recipe, data and base."""


class MemoryShort(TrainingError):
    """It does not fit into memory; the message says what to lower."""


class DeviceFull(MemoryShort, MemoryError):
    """A device has no room for a tensor; the message says for which, and how much is free."""


class DeviceMissing(AdapterError):
    """This machine has no device of the kind that is asked for."""


class CannotCapture(AdapterError):
    """Work cannot be written down as a graph: it waits, reads a result, allocates or changes streams, or the device
    has no graphs."""
