"""A fingerprint as a file: what it holds, and a strict reader, since anyone may have written it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from loramux_adapters.artifact.config import check_base_id
from loramux_adapters.artifact.reading.strict_json import StrictJSONError, is_int, is_number, parse_object
from loramux_adapters.errors import AdapterRejected

FORMAT = 1
MAX_BYTES = 4 * 2**20
MAX_PROMPTS = 64
MAX_PROMPT_TOKENS = 4096
MAX_TOKENS = 256
_MAX_TEXT = 65_536
_MAX_NUMERICS = 1024

_FIELDS = {"format", "numerics_id", "base_id", "version", "prompts"}
_PROMPT_FIELDS = {"text", "ids", "reply", "tokens", "logprobs"}


@dataclass(frozen=True, slots=True)
class Witness:
    """One prompt and what the adapter said.

    Attributes:
        text, reply: the prompt and the reply as text, for people; nothing is computed from them.
        ids: the prompt's tokens.
        tokens: the greedy reply, all of one length: the end token counts as any other and ends nothing.
        logprobs: log probability (natural) of each of them.
    """

    text: str
    ids: tuple[int, ...]
    reply: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What fingerprint.json holds.

    Attributes:
        numerics_id: of the path that made it.
        base_id: of the base that it was made on.
        version: content digest of the adapter.
    """

    numerics_id: str
    base_id: str
    version: str
    prompts: tuple[Witness, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data; `parse` reads it back."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def parse(raw: bytes) -> Fingerprint:
    """A fingerprint file from anyone; raises AdapterRejected if it is not one, or is larger than one may be."""
    try:
        return _parse(raw)
    except (StrictJSONError, ValueError) as error:
        raise AdapterRejected([f"fingerprint.json {error}"]) from error


def _parse(raw: bytes) -> Fingerprint:
    fields = parse_object(raw, limit=MAX_BYTES)
    if fields.get("format") != FORMAT or not is_int(fields["format"]):
        raise ValueError(f"is not of format {FORMAT}, the one known here")
    if set(fields) != _FIELDS:
        raise ValueError(f"must have the fields {', '.join(sorted(_FIELDS))} and no others")
    prompts = fields["prompts"]
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_PROMPTS:
        raise ValueError(f"must have 1 to {MAX_PROMPTS} prompts")
    return Fingerprint(
        numerics_id=_text(fields["numerics_id"], "numerics_id", _MAX_NUMERICS),
        base_id=_digest(fields["base_id"], "base_id"),
        version=_digest(fields["version"], "version"),
        prompts=tuple(_witness(prompt) for prompt in prompts),
    )


def _witness(value: object) -> Witness:
    if not isinstance(value, dict) or set(value) != _PROMPT_FIELDS:
        raise ValueError(f"has a prompt without exactly the fields {', '.join(sorted(_PROMPT_FIELDS))}")
    logprobs = value["logprobs"]
    if not isinstance(logprobs, list) or not all(is_number(number) and number <= 0 for number in logprobs):
        raise ValueError("has logprobs that are not a list of numbers up to 0")
    tokens = _tokens(value["tokens"], "tokens", MAX_TOKENS)
    if len(tokens) != len(logprobs):
        raise ValueError("has a prompt with another number of tokens than of logprobs")
    return Witness(
        text=_text(value["text"], "text", _MAX_TEXT),
        ids=_tokens(value["ids"], "ids", MAX_PROMPT_TOKENS),
        reply=_text(value["reply"], "reply", _MAX_TEXT),
        tokens=tokens,
        logprobs=tuple(float(number) for number in logprobs),
    )


def _tokens(value: object, name: str, most: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= most:
        raise ValueError(f"has {name} that are not a list of 1 to {most} tokens")
    if not all(is_int(token) and 0 <= token < 2**31 for token in value):
        raise ValueError(f"has {name} that are not token ids")
    return tuple(value)


def _text(value: object, name: str, most: int) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise ValueError(f"has a {name} that is not text of at most {most} characters")
    return value


def _digest(value: object, name: str) -> str:
    try:
        digest = check_base_id(value)
    except ValueError as error:
        raise ValueError(f"has a {name} that {error}") from error
    if digest is None:
        raise ValueError(f"has no {name}")
    return digest
