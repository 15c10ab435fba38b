"""Replies of /v1/completions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from loramux_server.api.completions.reply.reply_format import Json, ReplyFormat, WholeChoice, finite
from loramux_server.api.completions.running.choice import Piece, TokenEntry


class CompletionFormat(ReplyFormat):
    id_prefix = "cmpl"
    chunk_object = "text_completion"
    whole_object = "text_completion"
    prompt_in_choice = True

    def _parts(self, piece: Piece) -> Iterator[Json]:
        if piece.text or self._has_beside(piece):
            yield {"text": piece.text}

    def _finish_part(self) -> Json:
        return {"text": ""}

    def _whole_part(self, choice: WholeChoice) -> Json:
        return {"text": choice.text}

    def _logprobs_of(self, entries: Sequence[TokenEntry]) -> Json:
        """Offsets count from the beginning of the text. The token itself is always among the top ones.

        Nothing is known of a prompt's first token, which is null.
        """
        told = [None if math.isnan(entry.logprob.logprob) else entry.logprob for entry in entries]
        tops = [None if one is None else [*one.top, (one.token_id, one.logprob)] for one in told]
        return {
            "tokens": [self._name(entry.logprob.token_id) for entry in entries],
            "token_logprobs": [None if one is None else finite(one.logprob) for one in told],
            "top_logprobs": [
                None if pairs is None else {self._name(token_id): finite(logprob) for token_id, logprob in pairs}
                for pairs in tops
            ],
            "text_offset": [entry.offset for entry in entries],
        }
