"""Tokens that an adapter adds to its base's tokenizer, as they are kept with a version and are part of its digest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.artifact.reading.strict_json import StrictJSONError, parse_object
from loramux_adapters.errors import AdapterRejected

OWN_TOKENS_FILE = "own_tokens.json"  # kept only where there are some
MAX_TOKENS = 4096
MAX_LENGTH = 256  # characters of one
MAX_BYTES = 4 * 2**20
MAX_ID = 2**31 - 1
ENDS = ("bos_token", "eos_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class OwnToken:
    """A token, with the flags that tokenizers have for it (`AddedToken` of the tokenizers library)."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> OwnToken:
        """From what a tokenizer's file says. Raises ValueError: it says something else."""
        token = cls(**{name: given[name] for name in ("id", "content", *_FLAGS) if name in given})
        if type(token.id) is not int or not 0 <= token.id <= MAX_ID:
            raise ValueError("an id is no number of a token")
        if not isinstance(token.content, str) or not 0 < len(token.content) <= MAX_LENGTH:
            raise ValueError(f"a token has no text, or more than {MAX_LENGTH} characters")
        if any(type(getattr(token, name)) is not bool for name in _FLAGS):
            raise ValueError("a flag is neither true nor false")
        return token


@dataclass(frozen=True, slots=True)
class OwnTokens:
    """All of a version.

    Attributes:
        tokens: in the order of their ids, which follow those of the base's tokenizer.
        ends: "bos_token" and "eos_token" -> which of them it names so, where it names one.
    """

    tokens: tuple[OwnToken, ...]
    ends: tuple[tuple[str, str], ...] = ()

    @property
    def end(self) -> int | None:
        """The id of the token that ends a reply, beside the base's."""
        text = dict(self.ends).get("eos_token")
        return next((token.id for token in self.tokens if token.content == text), None)

    @property
    def size(self) -> int:
        """Ids below it may be named."""
        return self.tokens[-1].id + 1

    def dump(self) -> bytes:
        """The same bytes for the same tokens."""
        said = {"tokens": [asdict(token) for token in self.tokens], **dict(self.ends)}
        return json.dumps(said, ensure_ascii=False, indent=1, sort_keys=True).encode() + b"\n"


def parse_own_tokens(raw: bytes) -> OwnTokens:
    """Raises `AdapterRejected`."""
    try:
        given: dict[str, Any] = parse_object(raw, limit=MAX_BYTES)
        tokens = tuple(map(OwnToken.of, given["tokens"]))
        if not 0 < len(tokens) <= MAX_TOKENS:
            raise ValueError(f"it names no token, or more than {MAX_TOKENS}")
        if any(before.id >= behind.id for before, behind in zip(tokens, tokens[1:], strict=False)):
            raise ValueError("its tokens are not in the order of their ids")
        ends = tuple((name, given[name]) for name in ENDS if name in given)
        if any(text not in {token.content for token in tokens} for _, text in ends):
            raise ValueError("it names an end that is none of its tokens")
    except StrictJSONError as error:
        raise AdapterRejected([f"{OWN_TOKENS_FILE} {error}"]) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterRejected([f"{OWN_TOKENS_FILE} is damaged: {str(error)[:200]}"]) from error
    return OwnTokens(tokens, ends)


def read_own_tokens(directory: Path) -> OwnTokens | None:
    """Those kept beside an adapter, None if there are none. Raises `AdapterRejected`."""
    path = directory / OWN_TOKENS_FILE
    if not path.is_symlink() and not path.exists():
        return None
    with open_regular(path) as file:
        return parse_own_tokens(file.read(MAX_BYTES + 1))
