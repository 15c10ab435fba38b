"""Whether the tokenizer files of an adapter mean what the base's mean; run as a process of its own (`tokenizer_files`).

A tokenizer.json may have 20 MB. Parsing it would hold up every thread of a server, and the parser is not ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from loramux_adapters.artifact.own_tokens import (
    ENDS,
    MAX_TOKENS,
    OWN_TOKENS_FILE,
    OwnToken,
    OwnTokens,
    read_own_tokens,
)
from loramux_adapters.chat.special_tokens import SpecialTokens
from loramux_adapters.errors import AdapterRejected

MAX_NAMED = 5  # tokens in one sentence
MEMORY, SECONDS = 4 * 2**30, 60  # that the process may take
_NO_EFFECT = ("trim_offsets",)  # on ids
_SAMPLES = ("a", " Grüße, 世界!\n\n  x", "it's 1234 - <b>")


class _NoTemplate(Exception):
    """What a file calls its chat template is none that could be used."""


@dataclass(slots=True)
class Compared:
    """What was found.

    Attributes:
        reasons: in what they differ, a sentence each; none if they mean the same.
        chat_template: that tokenizer_config.json or chat_template.json hold, as they hold it.
        tokens: that are added to the base's.
    """

    reasons: list[str] = field(default_factory=list)
    chat_template: str | None = None
    tokens: OwnTokens | None = None


@dataclass(slots=True)
class _Base:
    """`names`: every token -> its id; `vocabulary`: those of the model alone; `loaded`: one tokenizer or several that
    count as the base's; `ends`: bos_token and eos_token; `own_ends`: those of the adapter that are tokens of its own;
    `added`: the texts of those."""

    loaded: list[Tokenizer]
    names: Mapping[str, int]
    vocabulary: Mapping[str, int]
    merges: list[str]
    ends: Mapping[str, str | None]
    directory: Path | None
    own_ends: dict[str, str] = field(default_factory=dict)
    added: frozenset[str] = frozenset()

    def extend(self, tokens: list[OwnToken]) -> list[str]:
        """With tokens that an adapter adds. Returns why it cannot be."""
        for tokenizer in self.loaded:
            first = tokenizer.get_vocab_size()
            elsewhere = add_tokens(tokenizer, tokens)
            if elsewhere:
                token = elsewhere[0]
                return [
                    f"its tokenizer adds {token.content!r} as token {token.id}; new ones have to follow the "
                    f"base's, one after the other, from {first} on"
                ]
        self.names = {**self.names, **{token.content: token.id for token in tokens}}
        self.added = frozenset(token.content for token in tokens)
        return []


def compare(directory: Path, base: str, base_directory: Path | None, ends: Mapping[str, str | None]) -> Compared:
    """
    Args:
        directory: of the adapter.
        base: the base's tokenizer as tokenizer.json would hold it.
        base_directory: the base's own files, where there are some.
        ends: the base's bos_token and eos_token.
    """
    found = Compared()
    known = _base_of(base, base_directory, ends)
    try:
        added = _added_by(directory, known)
        if added:
            found.reasons += known.extend(added)
    except AdapterRejected as error:
        return Compared(list(error.reasons))
    readers = {
        "tokenizer.json": _of_tokenizer,
        "tokenizer_config.json": _of_config,
        "special_tokens_map.json": _of_config,
        "added_tokens.json": _of_added,
        "vocab.json": _of_vocabulary,
        "vocab.txt": _of_vocabulary,
        "merges.txt": _of_merges,
        "tokenizer.model": _of_sentencepiece,
        "chat_template.json": _of_config,
        OWN_TOKENS_FILE: _of_own,
    }
    for name, reader in readers.items():
        path = directory / name
        if path.is_file():
            try:
                found.reasons += [f"{name} {reason}" for reason in reader(path.read_bytes(), known, name)]
                template = _template_of(path)
                found.chat_template = found.chat_template if template is None else template
            except _NoTemplate as error:
                found.reasons.append(f"{name} {error}")
            except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
                found.reasons.append(f"{name} is damaged")
    if added and not found.reasons:
        found.tokens = OwnTokens(tuple(added), tuple(sorted(known.own_ends.items())))
        if not _kept_apart(known.loaded[0], found.tokens):
            names = _listed([token.content for token in added])
            found.reasons.append(f"its tokenizer adds tokens that cannot be told from other text: {names}")
    return found


def _kept_apart(tokenizer: Tokenizer, own: OwnTokens) -> bool:
    """Whether each is itself, here and where text of messages is read; tried, since a normalizer may change one."""
    try:
        tokens = SpecialTokens(tokenizer, [] if own.end is None else [own.end])
        for token in own.tokens:
            name = tokens.marked(token.content)
            if token.id not in tokens.encode_marked(f"a {name} b", around=False):
                return False
            if token.id not in tokens.encode(f"a {token.content} b", around=False):
                return False
    except (AssertionError, ValueError, KeyError, RecursionError):
        return False
    return True


def _added_by(directory: Path, base: _Base) -> list[OwnToken]:
    """Tokens that its files describe and the base lacks, in the order of their ids. Raises AdapterRejected."""
    found: dict[str, OwnToken] = {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        try:
            said = _object((directory / name).read_bytes())
            listed = said.get("added_tokens") or [
                {**token, "id": int(number)} for number, token in (said.get("added_tokens_decoder") or {}).items()
            ]
            tokens = [OwnToken.of(token) for token in listed if token["content"] not in base.names]
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            continue  # what is wrong with it is found where it is compared
        for token in tokens:
            found.setdefault(token.content, token)
    for kept in () if (own := read_own_tokens(directory)) is None else own.tokens:
        found.setdefault(kept.content, kept)
    if len(found) > MAX_TOKENS:
        return []
    return sorted(found.values(), key=lambda token: token.id)


def add_tokens(tokenizer: Tokenizer, tokens: Iterable[OwnToken]) -> list[OwnToken]:
    """Returns those that did not get their id there."""
    tokens = list(tokens)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    # all in one call: each makes the search for all of them anew
    tokenizer.add_tokens(
        [AddedToken(token.content, **{name: getattr(token, name) for name in flags}) for token in tokens]
    )
    return [token for token in tokens if tokenizer.token_to_id(token.content) != token.id]


def _base_of(base: str, directory: Path | None, ends: Mapping[str, str | None]) -> _Base:
    loaded = [Tokenizer.from_str(base)]
    if directory is not None and (directory / "tokenizer.json").is_file():
        loaded.append(Tokenizer.from_file(str(directory / "tokenizer.json")))
    model = json.loads(base)["model"]
    vocabulary = _ids(model["vocab"])
    merges = [_merge(pair) for pair in model.get("merges", [])]
    return _Base(loaded, loaded[0].get_vocab(), vocabulary, merges, ends, directory)


def _of_tokenizer(data: bytes, base: _Base, name: str) -> list[str]:
    try:
        theirs = Tokenizer.from_str(data.decode())
    except UnicodeDecodeError:
        raise
    except Exception as error:
        return [f"is no tokenizer: {str(error)[:200]}"]
    return min((_differences(theirs, ours) for ours in base.loaded), key=len)


def _differences(theirs: Tokenizer, ours: Tokenizer) -> list[str]:
    there, here = (json.loads(tokenizer.to_str()) for tokenizer in (theirs, ours))
    reasons = _tokens(theirs.get_vocab(), ours.get_vocab(), all_of=True)
    if reasons:
        return reasons
    added, own = ({token["content"]: token for token in spec["added_tokens"]} for spec in (there, here))
    other = sorted(text for text in added.keys() | own.keys() if added.get(text) != own.get(text))
    if other:
        reasons.append(f"treats {_listed(other)} otherwise than the base does")
    models = (there["model"], here["model"])
    if [_merge(pair) for pair in models[0].get("merges", [])] != [_merge(pair) for pair in models[1].get("merges", [])]:
        reasons.append("has other merges than the base")
    if isinstance(models[0]["vocab"], list) and models[0]["vocab"] != models[1]["vocab"]:
        reasons.append("has other scores than the base")
    settings = sorted(
        key
        for key in models[0].keys() | models[1].keys()
        if key not in ("vocab", "merges") and (models[0].get(key) or None) != (models[1].get(key) or None)
    )
    if settings:
        reasons.append(f"has a model with other settings than the base ({', '.join(settings)})")
    reasons += [
        f"{does} otherwise than the base does ({part})"
        for part, does in (("normalizer", "normalizes text"), ("pre_tokenizer", "splits text"))
        if _effective(there[part]) != _effective(here[part])
    ]
    for tokenizer in (theirs, ours):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    if [theirs.encode(text).ids for text in _SAMPLES] != [ours.encode(text).ids for text in _SAMPLES] and not reasons:
        reasons.append("puts other tokens around a prompt than the base does (post_processor)")
    ids = [ours.encode(text, add_special_tokens=False).ids for text in _SAMPLES]
    if [theirs.decode(each) for each in ids] != [ours.decode(each) for each in ids]:
        reasons.append("turns tokens into other text than the base does (decoder)")
    return reasons


def _of_config(data: bytes, base: _Base, name: str) -> list[str]:
    config = _object(data)
    reasons = []
    added = config.get("added_tokens_decoder") or {}
    reasons += _tokens({_content(token): int(number) for number, token in added.items()}, base.names)
    named = [config.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    for several in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(several) or []
        named += [*(more.values() if isinstance(more, Mapping) else more)]
    texts = [_content(token) for token in named if token]
    new = [text for text in texts if text not in base.names and text not in map(_content, added.values())]
    if new:
        reasons.append(_new(new))
    for key, word in (("bos_token", "first"), ("eos_token", "end")):
        theirs, ours = config.get(key), base.ends.get(key)
        if theirs and _content(theirs) in base.added:
            base.own_ends[key] = _content(theirs)
        elif theirs and _content(theirs) in base.names and _content(theirs) != ours:
            reasons.append(f"names another {word} token ({_content(theirs)!r}) than the base ({ours!r})")
    return reasons


def _of_own(data: bytes, base: _Base, name: str) -> list[str]:
    said = _object(data)
    for key in ENDS:
        if key in said:
            base.own_ends[key] = str(said[key])
    return _tokens({str(token["content"]): int(token["id"]) for token in said["tokens"]}, base.names)


def _of_added(data: bytes, base: _Base, name: str) -> list[str]:
    return _tokens({str(text): int(number) for text, number in _object(data).items()}, base.names)


def _of_vocabulary(data: bytes, base: _Base, name: str) -> list[str]:
    if name == "vocab.txt":
        lines = data.decode().removesuffix("\n").split("\n")
        theirs = {line.removesuffix("\r"): number for number, line in enumerate(lines)}
    else:
        theirs = {str(text): int(number) for text, number in _object(data).items()}
    return _tokens(theirs, base.names) or _gone(theirs, base)


def _of_merges(data: bytes, base: _Base, name: str) -> list[str]:
    lines = [line.removesuffix("\r") for line in data.decode().split("\n")]
    merges = [line for line in lines[lines[0].startswith("#version") :] if line]
    return [] if merges == base.merges else ["has other merges than the base"]


def _of_sentencepiece(data: bytes, base: _Base, name: str) -> list[str]:
    own = base.directory / name if base.directory is not None else None
    if own is not None and own.is_file() and own.read_bytes() == data:
        return []
    theirs = {piece: number for number, piece in enumerate(_pieces(data))}
    return _tokens(theirs, base.names) or _gone(theirs, base)


def _template_of(path: Path) -> str | None:
    """Raises _NoTemplate, ValueError."""
    if path.name not in ("tokenizer_config.json", "chat_template.json"):
        return None
    template = _object(path.read_bytes()).get("chat_template")
    if isinstance(template, list):
        named = {str(each["name"]): each["template"] for each in template}
        template = named.get("default")
        if named and template is None:
            raise _NoTemplate("holds chat templates, and none of them is named default")
    if template is not None and not isinstance(template, str):
        raise _NoTemplate("holds a chat_template that is no text")
    return template


def _tokens(theirs: Mapping[str, int], ours: Mapping[str, int], *, all_of: bool = False) -> list[str]:
    """How tokens differ; `all_of`: theirs should be all there are."""
    reasons = []
    new = sorted((text for text in theirs if text not in ours), key=lambda text: theirs[text])
    if new:
        reasons.append(_new(new))
    moved = sorted(text for text, number in theirs.items() if text in ours and ours[text] != number)
    if moved:
        reasons.append(f"gives {_listed(moved)} other ids than the base does")
    gone = sorted(text for text in ours if text not in theirs) if all_of else []
    if gone:
        reasons.append(f"lacks tokens of the base: {_listed(gone)}")
    return reasons


def _gone(theirs: Mapping[str, int], base: _Base) -> list[str]:
    added = {token.content for token in base.loaded[0].get_added_tokens_decoder().values()}
    gone = sorted(text for text in base.vocabulary if text not in theirs and text not in added)
    return [f"lacks tokens of the base: {_listed(gone)}"] if gone else []


def _new(texts: Iterable[str]) -> str:
    return f"adds tokens, which are not served: {_listed(list(dict.fromkeys(texts)))}"


def _listed(texts: list[str]) -> str:
    shown = ", ".join(repr(text[:64]) for text in texts[:MAX_NAMED])
    return shown if len(texts) <= MAX_NAMED else f"{shown} and {len(texts) - MAX_NAMED} more"


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _ids(vocabulary: Any) -> dict[str, int]:
    if isinstance(vocabulary, list):
        return {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def _merge(pair: Any) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _effective(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _effective(value) for key, value in part.items() if key not in _NO_EFFECT}
    return [_effective(each) for each in part] if isinstance(part, list) else part


def _object(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _pieces(model: bytes) -> Iterable[str]:
    """The pieces of a SentencePiece model, in order: field 1 of the message, and of each the text, field 1 again."""
    for number, value in _fields(memoryview(model)):
        if number == 1 and isinstance(value, memoryview):
            yield next(
                (bytes(text).decode() for at, text in _fields(value) if at == 1 and not isinstance(text, int)), ""
            )


def _fields(message: memoryview) -> Iterable[tuple[int, memoryview | int]]:
    """The fields of a protocol buffer. Raises IndexError, ValueError for what is none."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            number, at = _varint(message, at)
            yield key >> 3, number
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("no message")
        if at + size > len(message):
            raise ValueError("cut short")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = message[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
        if shift > 63:
            raise ValueError("no number")


def main() -> None:
    """Reads a line that says what is compared, then the base's tokenizer; writes what was found."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    asked = json.loads(sys.stdin.buffer.readline())
    files = asked["base_directory"]
    base = sys.stdin.buffer.read().decode()
    found = compare(Path(asked["directory"]), base, None if files is None else Path(files), asked["ends"])
    own = None if found.tokens is None else found.tokens.dump().decode()
    json.dump({"reasons": found.reasons, "chat_template": found.chat_template, "tokens": own}, sys.stdout)


if __name__ == "__main__":
    main()
