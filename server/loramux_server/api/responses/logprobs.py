"""Log probabilities of what a message says: which tokens it is made of, and what is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loramux_server.api.completions.reply.reply_format import token_told
from loramux_server.api.completions.running.choice import Piece, TokenEntry
from loramux_server.api.http.dependencies import TokenizerLike

Json = dict[str, Any]


class SaidTokens:
    """Finds the tokens that a message's text is made of; those of thoughts, calls and marks between are left out.

    A piece's tokens may have been read before its text was certain (the beginning of a tag that becomes none), so they
    are kept until text is told that has theirs.
    """

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self._tokenizer = tokenizer
        self._kept: list[tuple[bytes, TokenEntry]] = []

    def of(self, piece: Piece) -> list[Json]:
        """Those of the piece's text, with their bytes; of none if it says nothing."""
        self._kept += [(self._tokenizer.token_bytes(entry.logprob.token_id), entry) for entry in piece.entries]
        if not piece.text:
            if piece.reasoning or piece.calls:
                self._kept = []
            return []
        first, end = self._span(piece.text.encode())
        said, self._kept = self._kept[first:end], self._kept[end:]
        return [self._told(entry) for _, entry in said]

    def _span(self, text: bytes) -> tuple[int, int]:
        """The tokens that have the text; all, where it is not what they say one after the other.

        That is so of half a character at the end of a reply, and where a special token is left out between.
        """
        at = b"".join(raw for raw, _ in self._kept).find(text)
        if at < 0:
            return 0, len(self._kept)
        begin, first, end = 0, len(self._kept), 0
        for index, (raw, _) in enumerate(self._kept):
            if begin < at + len(text) and begin + len(raw) > at:
                first, end = min(first, index), index + 1
            begin += len(raw)
        return first, end

    def _told(self, entry: TokenEntry) -> Json:
        found = entry.logprob
        top = [token_told(self._tokenizer, *pair) for pair in found.top]
        return token_told(self._tokenizer, found.token_id, found.logprob) | {"top_logprobs": top}


def in_events(told: Sequence[Json]) -> list[Json]:
    """The same as events of a stream have it, which is without bytes."""
    return [
        {
            "token": one["token"],
            "logprob": one["logprob"],
            "top_logprobs": [_bare(other) for other in one["top_logprobs"]],
        }
        for one in told
    ]


def _bare(token: Json) -> Json:
    return {"token": token["token"], "logprob": token["logprob"]}
