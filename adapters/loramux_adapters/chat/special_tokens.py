"""Text that never becomes a special token, whatever it says: by a second tokenizer with other names for those tokens.

In the second tokenizer each protected token is called by a mark, a string that nobody can guess, instead of by its own
text. So the text "<|im_end|>" is ordinary there, to the vocabulary and the merges too, whatever is normalized; and
whoever knows the mark (a template's own text, see `own_text`) still gets the token. All else is the first tokenizer's.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer

# A mark is made of private characters, so that no word that is searched for in a text is found inside one.
_SECRET, _NUMBER, _PLANE = 0x100000, 0xF0000, 0xFFFE
_MARKER = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)
_TAG = re.compile(r"</?([^<>/|\s]+)>")


class SpecialTokens:
    """Any number of threads may call its methods.

    Protected is every added token that the tokenizer marks special or that ends a reply, and every other one in
    brackets, since some tokenizers do not mark their roles (`<｜User｜>`). Not protected are tags that come in pairs
    and are not marked special (`<think>`, `</tool_call>`, `<h1>`): answers are made of them; and words and white space.

    Attributes:
        marks: text of a protected token -> its mark.
        description: the tokenizer as tokenizer.json would hold it.
    """

    def __init__(self, backend: Tokenizer, end_ids: Iterable[int]) -> None:
        """`end_ids` end a reply."""
        self.description = backend.to_str()
        self._real = _unbounded(self.description)
        spec = json.loads(self.description)
        added = {int(token["id"]): token for token in spec["added_tokens"]}
        nonce = "".join(chr(_SECRET + secrets.randbelow(_PLANE)) for _ in range(8))
        ends = frozenset(end_ids)
        texts = {str(token["content"]) for token in added.values()}
        self.marks: Mapping[str, str] = {
            str(token["content"]): nonce + chr(_NUMBER + place)
            for place, (number, token) in enumerate(sorted(added.items()))
            if token["special"] or number in ends or _is_marker(str(token["content"]), texts)
        }
        self._texts = {mark: text for text, mark in self.marks.items()}
        self._mark = re.compile(f"{nonce}.")
        self._own = re.compile("|".join(map(re.escape, sorted(self.marks, key=len, reverse=True))) or r"(?!)")
        self._guarded = _unbounded(json.dumps(_renamed(spec, self.marks, self._survives)))
        self._number_of: dict[int, int] = {}  # id there -> id here, where they differ
        for number, token in added.items():
            name = self.marks.get(str(token["content"]), str(token["content"]))
            there = self._guarded.token_to_id(name)
            assert there is not None and self._guarded.id_to_token(there) == name
            if there != number:
                self._number_of[there] = number

    def marked(self, text: str) -> str:
        """This text, which is no user's, with marks in place of protected tokens."""
        return self._own.sub(lambda found: self.marks[found[0]], text)

    def plain(self, marked: str) -> str:
        """The text as people read it."""
        return self._mark.sub(lambda found: self._texts.get(found[0], found[0]), marked)

    def may_read_as_token(self, text: str) -> bool:
        """Whether a protected token could begin or end in this text, or in what the tokenizer makes of it."""
        normalizer = self._real.normalizer
        forms = (text,) if normalizer is None else (text, normalizer.normalize_str(text))
        return any(part[:2] in form or part[-2:] in form for part in self.marks for form in forms)

    def encode(self, text: str, *, around: bool) -> list[int]:
        """Text as it is, special tokens included. `around`: with those that the base expects around a prompt."""
        # in a batch of one: `encode` would hold the interpreter's lock for seconds on a long text, and stop all streams
        ids: list[int] = self._real.encode_batch([text], add_special_tokens=around)[0].ids
        return ids

    def encode_marked(self, text: str, *, around: bool) -> list[int]:
        """Text in which only marks are protected tokens."""
        return self._here(self._guarded.encode_batch([text], add_special_tokens=around)[0].ids)

    def offsets(self, text: str, *, marked: bool, around: bool) -> Sequence[tuple[int, int]]:
        """Where in the text each token of `encode_marked` or `encode` stands."""
        tokenizer = self._guarded if marked else self._real
        encoding: Encoding = tokenizer.encode_batch([text], add_special_tokens=around)[0]
        return encoding.offsets

    def _survives(self, mark: str) -> bool:
        """Whether a mark is still itself when the tokenizer has normalized it."""
        normalizer = self._real.normalizer
        return normalizer is None or mark in normalizer.normalize_str(mark)

    def _here(self, ids: list[int]) -> list[int]:
        return [self._number_of.get(token, token) for token in ids] if self._number_of else ids

    @property
    def tokenizer(self) -> Tokenizer:
        """The first one, to decode with."""
        return self._real


def fast_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """The Rust tokenizer inside transformers'; None if there is none."""
    return getattr(tokenizer, "backend_tokenizer", None)


def _unbounded(description: str) -> Tokenizer:
    """Without truncation and padding, which checkpoints saved after training often carry."""
    copy = Tokenizer.from_str(description)
    copy.no_truncation()
    copy.no_padding()
    return copy


def _is_marker(text: str, texts: set[str]) -> bool:
    tag = _TAG.fullmatch(text)
    if tag is not None and {f"<{tag[1]}>", f"</{tag[1]}>"} <= texts:
        return False
    return _MARKER.fullmatch(text) is not None


def _renamed(spec: dict[str, Any], marks: Mapping[str, str], survives: Callable[[str], bool]) -> dict[str, Any]:
    """The tokenizer's description with marks for names.

    A mark that does not survive normalization is looked for before it.
    """
    model = dict(spec["model"])
    vocab = model["vocab"]
    if isinstance(vocab, list):  # a unigram model: pieces with scores, their ids are their places
        model["vocab"] = [[marks.get(piece, piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {marks.get(piece, piece): number for piece, number in vocab.items()}
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, marks)]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = marks.get(model["unk_token"], model["unk_token"])
    added = []
    for token in spec["added_tokens"]:
        mark = marks.get(token["content"])
        normalized = token["normalized"] and (mark is None or survives(mark))
        single = token["single_word"] and mark is None  # a mark is never a part of a word
        added.append(token | {"content": mark or token["content"], "normalized": normalized, "single_word": single})
    return spec | {"model": model, "added_tokens": added}


def _makes(merge: Sequence[str] | str, marks: Mapping[str, str]) -> bool:
    """Whether a merge makes, or is made of, a protected token."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in marks or right in marks or left + right in marks
