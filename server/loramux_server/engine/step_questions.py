"""Steps that choose their tokens on the device: what they are asked for, and what the answers mean.

The same questions as the sampler's (sampler.py), put before the step runs and without looking at a logit: a reply's
token n is drawn by number n of its sequence's stream whatever the tokens before it are. How logits are changed is said
when the step is under way, since masks of grammars are made meanwhile. What needs the logits themselves, or more of the
likeliest tokens than an answer tells, is the sampler's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from loramux_server.engine.sampler import Sampler, mask_deadline, scored
from loramux_server.engine.scheduling.sequence import (
    NOT_FINITE,
    NOTHING_ALLOWED,
    RowResult,
    ScheduledSequence,
    TokenLogprob,
)
from loramux_server.errors import GrammarFailed, MaskLate
from loramux_server.kernels.compiled.logit_changes import EDIT, RowChange
from loramux_server.kernels.decoder.asks import MOST_LIKELY, NOTHING_LEFT, Answers, Ask, ChangedAsk

_NO_EDITS, _NO_TOKENS = np.empty(0, dtype=EDIT), np.empty(0, dtype=np.int32)


def can_be_asked(row: ScheduledSequence) -> bool:
    """Whether a step can answer all that is wanted of this row."""
    params = row.sequence.params
    wanted = max(params.logprobs or 0, params.prompt_logprobs or 0)
    return not params.digests and wanted <= MOST_LIKELY


@dataclass(slots=True)
class _AskedRow:
    """Places among the asks.

    Attributes:
        row: what was asked for.
        chooses: of its next token; None if none is chosen.
        scores: of the tokens whose log probabilities are told, in the order of `scored_at`, with how many beside each.
        checks: of rows of logits that must be finite and of which nothing else is asked.
        failed: why no token may be chosen; None if one may.
        late: no token is chosen, since the mask of its grammar is not there.
    """

    row: ScheduledSequence
    chooses: int | None = None
    scores: list[tuple[int, int]] = field(default_factory=list)
    checks: list[int] = field(default_factory=list)
    failed: str | None = None
    late: bool = False


class StepQuestions:
    """What one step is asked for.

    Attributes:
        asks: in order, for the step.
        places: sequence id -> the ask that chooses its next token.
        changes: some row's logits may be changed before a token is chosen.
        ahead: the next step may be asked for before anybody knows what this one chose.
    """

    def __init__(self, rows: list[ScheduledSequence], sampler: Sampler, vocabulary: int) -> None:
        """`rows`: those with logits, in order; each `can_be_asked`."""
        self.asks: list[Ask] = []
        self.places: dict[str, int] = {}
        self.changes, self.ahead = False, True
        self._sampler, self._vocabulary = sampler, vocabulary
        self._asked: list[_AskedRow] = []
        first = 0
        for row in rows:
            asked = _AskedRow(row)
            self._asked.append(asked)
            last = first + row.num_logits - 1
            if row.samples:
                ask, params = sampler.ask(last, row), row.sequence.params
                if params.changes_logits:  # drawn when that is done
                    ask = ask._replace(draw=None)
                    self.changes, self.ahead = True, self.ahead and not params.changes_by_tokens
                asked.chooses = self.places[row.sequence.id] = self._ask(ask)
            asked.scores = [
                (self._ask(Ask(one.row, token=one.token, top=one.top)), one.top) for one in scored(row, last)
            ]
            if row.num_scored:
                self._check(asked, first, last)
            first = last + 1

    def _check(self, asked: _AskedRow, first: int, last: int) -> None:
        """Rows of logits of which nothing is asked must be finite all the same."""
        known = {self.asks[place].row for place, _ in asked.scores}
        known |= set() if asked.chooses is None else {last}
        asked.checks = [self._ask(Ask(at)) for at in range(first, last + 1) if at not in known]

    def _ask(self, ask: Ask) -> int:
        self.asks.append(ask)
        return len(self.asks) - 1

    def changed(self) -> list[ChangedAsk]:
        """What tokens are chosen from, where that is not the model's own logits. Called once.

        Masks of all rows together are waited for a few milliseconds; whose is not there then is late.
        """
        found, deadline = [], mask_deadline()
        for asked in self._asked:
            row, place = asked.row, asked.chooses
            if place is None or not row.sequence.params.changes_logits:
                continue
            at = self.asks[place].row
            try:
                change = self._sampler.change(at, row, self._vocabulary, deadline)
            except GrammarFailed as failure:
                asked.failed = str(failure)
                continue
            except MaskLate:
                asked.late = True
                continue
            draw = self._sampler.ask(at, row).draw
            if change is not None or draw is not None:
                found.append(ChangedAsk(place, draw, change or RowChange(at, _NO_EDITS, _NO_TOKENS)))
        return found

    def results(self, answers: Answers) -> list[RowResult]:
        """Waits for the step; one for each row. One with logits that are not finite has an error and nothing else."""
        found = answers.read()
        return [_result(asked, found) for asked in self._asked]


def _result(asked: _AskedRow, found: npt.NDArray[np.void]) -> RowResult:
    places = [*asked.checks, *(place for place, _ in asked.scores)]
    if asked.chooses is not None:
        places.append(asked.chooses)
    if not all(found[place]["finite"] for place in places):
        return RowResult(error=NOT_FINITE)
    if asked.failed is not None:
        return RowResult(error=asked.failed, is_impossible=True)
    if asked.chooses is not None and found[asked.chooses]["finite"] == NOTHING_LEFT:
        return RowResult(error=NOTHING_ALLOWED, is_impossible=True)
    scores = [_told(found[place], top) for place, top in asked.scores]
    if asked.chooses is None or asked.late:
        return RowResult(is_late=asked.late, scores=scores)
    answer, top = found[asked.chooses], asked.row.sequence.params.logprobs
    return RowResult(int(answer["chosen"]), None if top is None else _told(answer, top), scores=scores)


def _told(answer: np.void, top: int) -> TokenLogprob:
    token = int(answer["chosen"])
    beside = tuple(
        (int(one), float(logprob))
        for one, logprob in zip(answer["likeliest"][:top], answer["logprobs"][:top], strict=True)
        if one >= 0
    )
    return TokenLogprob(token, float(answer["logprob"]), beside, token == int(answer["greedy"]))
