"""What an adapter's version says of generation, where a request says nothing: request, then adapter, then server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loramux_adapters.artifact.format import most_rows
from loramux_adapters.artifact.generation_defaults import (
    NOTHING_SAID,
    GenerationDefaults,
    read_generation_defaults,
)
from loramux_adapters.artifact.own_tokens import OwnTokens, read_own_tokens
from loramux_adapters.errors import AdapterCorrupt, AdapterRejected
from loramux_server.api.completions.request.generation import GenerationRequest
from loramux_server.errors import RequestError

if TYPE_CHECKING:
    from loramux_adapters.store.store import Lease
    from loramux_server.api.http.visible_store import VisibleStore

Body = TypeVar("Body", bound=GenerationRequest)
Value = TypeVar("Value")
_FILLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop")
_LENGTHS = frozenset({"max_tokens", "max_completion_tokens"})


@dataclass(frozen=True, slots=True)
class RequestDefaults:
    """Of all adapters of one request: what every one of them says, and the shortest of their contexts.

    Attributes:
        limited_by: the adapter whose context that is; None if none limits it.
    """

    said: GenerationDefaults = NOTHING_SAID
    limited_by: str | None = None

    @classmethod
    def of(cls, store: VisibleStore, leases: Sequence[Lease]) -> RequestDefaults:
        """Reads files of leased versions. Raises AdapterCorrupt."""
        own = [(store.shown(lease.name), _stored(store, lease, read_generation_defaults)) for lease in leases]
        if not own:
            return cls()
        limits = [(said.context, name) for name, said in own if said.context is not None]
        said = reduce(GenerationDefaults.agreed, (said for _, said in own))
        return cls(said, min(limits)[1] if limits else None)

    def filled(self, body: Body) -> Body:
        """The body, with what it leaves unsaid as the adapters say it. A null says nothing; -1 or an empty list do."""
        unsaid = {
            name: self.said.said[name]
            for name in _FILLED
            if name in self.said.said and name in type(body).model_fields and name not in body.model_fields_set
        }
        return body.model_copy(update=unsaid) if unsaid else body

    def longest_reply(self, body: GenerationRequest, room: int) -> int | None:
        """Tokens of a reply whose length the body leaves unsaid, as far as there is `room`; None if nobody says it."""
        longest = self.said.max_tokens
        return None if longest is None or _LENGTHS & body.model_fields_set else min(longest, room)

    def context(self, base: int) -> int:
        """Longest prompt and reply together, in tokens, where the base takes `base` of them."""
        return base if self.said.context is None else min(self.said.context, base)

    def whose_context(self, base: int) -> str:
        """For messages: what is too short for a request."""
        is_own = self.said.context is not None and self.said.context < base
        return f"the context of the adapter {self.limited_by}" if is_own else "the context"


def _stored(store: VisibleStore, lease: Lease, read: Callable[[Path], Value]) -> Value:
    """Of a leased version's files. Raises AdapterCorrupt."""
    try:
        return read(store.directory(lease.version))
    except AdapterRejected as error:
        raise AdapterCorrupt(f"the stored files of version {lease.version[:12]} cannot be read as published") from error


def own_tokens_of(store: VisibleStore, leases: Sequence[Lease], known: int) -> OwnTokens | None:
    """Tokens that leased versions add to the base's tokenizer, whose base has embeddings of `known` tokens.

    All of one request that add some have to add the same: an id stands for one token. Of rows without a tokenizer's
    files nobody knows what they stand for, so two versions that have some cannot be summed.

    Raises RequestError, AdapterCorrupt.
    """
    found = [
        (store.shown(lease.name), own)
        for lease in leases
        if (own := _stored(store, lease, read_own_tokens)) is not None
    ]
    agreed = same_of_all(
        found,
        "add different tokens to the base's tokenizer under the same ids, so they cannot answer together; use one of "
        "them, or train both with the same tokens",
    )
    versions = {lease.version: lease for lease in leases}
    if len(versions) < 2:
        return agreed
    named = {name for name, _ in found}
    adding = [
        name
        for lease in versions.values()
        if (name := store.shown(lease.name)) in named or _rows(store.directory(lease.version)) > known
    ]
    nameless = next((name for name in adding if name not in named), None)
    if nameless is not None and len(adding) > 1:
        first, second = sorted((nameless, next(name for name in adding if name != nameless)), key=adding.index)
        raise RequestError(
            f"the adapters {first} and {second} both have rows for tokens that the base does not know, and {nameless} "
            "came without the files of its tokenizer, so nobody knows whether these are the same tokens; use one of "
            "them, or publish both again with their tokenizers' files",
            param="adapters",
            code="invalid_value",
        )
    return agreed


def _rows(directory: Path) -> int:
    """Of a damaged version none are known: that it is, its loading will find."""
    try:
        return most_rows(directory)
    except AdapterRejected:
        return 0


def same_of_all(found: Sequence[tuple[str, Value]], differing: str) -> Value | None:
    """What adapters, by name, have in common; None of none. Raises RequestError, which says of two: `differing`."""
    for name, own in found[1:]:
        if own != found[0][1]:
            raise RequestError(
                f"the adapters {found[0][0]} and {name} {differing}", param="adapters", code="invalid_value"
            )
    return found[0][1] if found else None


def stored_defaults(directory: Path) -> GenerationDefaults:
    """Of a stored version, to be told of it. Of a damaged one nothing is: that it is, its loading will find."""
    try:
        return read_generation_defaults(directory)
    except AdapterRejected:
        return NOTHING_SAID


def shown(said: GenerationDefaults) -> dict[str, Any]:
    """What replies tell of an adapter: its defaults by the names that requests have for them, and its context."""
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in said.said.items()}
    return {"context": defaults.pop("context", None), "generation_defaults": defaults}
