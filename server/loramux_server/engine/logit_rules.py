"""What a sequence's options make of its logits before a token is chosen: penalties, biases, and what is forbidden.

`SamplingParams` says what they mean. All of it is kept up to date token by token: a step looks at the tokens that are
new, never at the whole reply.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from loramux_server.engine.scheduling.sequence import Sequence
from loramux_server.kernels.compiled.logit_changes import EDIT, RowChange, bits_of, within, words_for

_NO_TOKENS = np.empty(0, dtype=np.int32)


class LogitRules:
    """Of one sequence whose params say `changes_logits`. Owner: the engine thread.

    Tokens outside the vocabulary, which can never be chosen, are passed over.
    """

    def __init__(self, sequence: Sequence, vocabulary: int) -> None:
        params = sequence.params
        self._output = sequence.output
        self._read = 0  # tokens of it that are known here
        self._vocabulary = vocabulary
        self._edits = _Edits(sequence, vocabulary)
        self._bad_words = BadWords(params.bad_words, vocabulary)
        self._node = 0
        self._stop = within(params.stop_token_ids, vocabulary) if params.min_tokens else _NO_TOKENS
        self._min_tokens = params.min_tokens
        self._grammar = params.grammar
        self._allowed: npt.NDArray[np.uint32] | None = None
        if params.allowed_token_ids is not None:
            self._allowed = bits_of((*params.allowed_token_ids, *params.stop_token_ids), vocabulary)

    def change(self, at: int, unknown: int = 0, patience: float | None = None) -> RowChange | None:
        """What is to be done to row `at` of the logits before the next token is chosen from it; None: nothing.

        Args:
            unknown: how many tokens the reply has that are not known yet; none where `changes_by_tokens`.
            patience: seconds to wait for the grammar's mask at most; None: as long as it may take.
        Raises:
            GrammarFailed: no token may follow within the grammar, or it takes too long to say which.
            MaskLate: the grammar has not said yet; this may be asked again.
        """
        for token in self._output[self._read :]:
            self._edits.count(token)
            self._node = self._bad_words.after(self._node, token)
        self._read = len(self._output)
        forbidden = self._bad_words.forbidden(self._node)
        if self._read + unknown < self._min_tokens:
            forbidden = np.concatenate([forbidden, self._stop])
        allowed, edits = self._mask(patience), self._edits.known
        if allowed is None and not len(edits) and not len(forbidden):
            return None
        return RowChange(at, edits, forbidden, allowed, self._edits.repetition)

    def _mask(self, patience: float | None) -> npt.NDArray[np.uint32] | None:
        if self._grammar is None:
            return self._allowed
        mask, words = np.ascontiguousarray(self._grammar.mask(patience), dtype=np.uint32), words_for(self._vocabulary)
        if len(mask) < words:  # logits of a base may be more than its tokens
            mask = np.concatenate([mask, np.zeros(words - len(mask), dtype=np.uint32)])
        mask = mask[:words]  # an adapter may name tokens that its head has no row for
        return mask if self._allowed is None else mask & self._allowed


class _Edits:
    """Of each token that was there before, or has a bias: what becomes of its logit.

    Attributes:
        repetition: the factor of tokens that were there before.
    """

    def __init__(self, sequence: Sequence, vocabulary: int) -> None:
        params = sequence.params
        self.repetition = params.repetition_penalty
        self._frequency, self._presence = params.frequency_penalty, params.presence_penalty
        self._subtracts = bool(self._frequency or self._presence)
        self._repeats = self.repetition != 1.0
        bias = {token: add for token, add in params.logit_bias if 0 <= token < vocabulary}
        before = within(sequence.prompt, vocabulary) if self._repeats else _NO_TOKENS
        tokens = np.union1d(before, np.array([*bias], dtype=np.int32))
        self._table = np.zeros(max(16, 2 * len(tokens)), dtype=EDIT)
        self._table["token"][: len(tokens)] = tokens
        self._places = {token: place for place, token in enumerate(tokens.tolist())}
        self._counts: dict[int, int] = {}
        self._table["repeated"][np.searchsorted(tokens, before)] = 1
        for token, add in bias.items():
            self._table["add"][self._places[token]] = add

    @property
    def known(self) -> npt.NDArray[np.void]:
        """[n] of EDIT; a view, which the next `count` may change."""
        return self._table[: len(self._places)]

    def count(self, token: int) -> None:
        """The reply has this token once more."""
        if not (self._subtracts or self._repeats):
            return
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._table):
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
        edit = self._table[place]
        edit["token"], edit["repeated"] = token, self._repeats
        if self._subtracts:
            count = self._counts[token] = self._counts.get(token, 0) + 1
            edit["less"] = self._frequency * count + self._presence


class BadWords:
    """Which tokens would end a text in one of some sequences of tokens, after Aho and Corasick (CACM, 1975).

    A node stands for the longest end of a text that one of the sequences begins with; 0 is that of no tokens.
    """

    def __init__(self, words: Iterable[tuple[int, ...]], vocabulary: int) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._shorter = [0]  # the next longest such end
        self._last: list[set[int]] = [set()]  # tokens that end a sequence behind this node
        for word in words:
            if not word or not all(0 <= token < vocabulary for token in word):
                continue
            node = 0
            for token in word[:-1]:
                if token not in self._next[node]:
                    self._next[node][token] = len(self._next)
                    self._next.append({})
                    self._shorter.append(0)
                    self._last.append(set())
                node = self._next[node][token]
            self._last[node].add(word[-1])
        self._forbidden: dict[int, npt.NDArray[np.int32]] = {}  # of nodes that were asked for
        waiting = deque(self._next[0].values())
        while waiting:
            node = waiting.popleft()
            for token, child in self._next[node].items():
                self._shorter[child] = self.after(self._shorter[node], token)
                waiting.append(child)

    def after(self, node: int, token: int) -> int:
        """The node of the text with one more token."""
        while node and token not in self._next[node]:
            node = self._shorter[node]
        return self._next[node].get(token, 0)

    def forbidden(self, node: int) -> npt.NDArray[np.int32]:
        """Tokens that must not follow."""
        found = self._forbidden.get(node)
        if found is None:
            tokens = set(self._last[node])
            shorter = node
            while shorter:
                shorter = self._shorter[shorter]
                tokens |= self._last[shorter]
            found = self._forbidden[node] = np.array(sorted(tokens), dtype=np.int32)
        return found
