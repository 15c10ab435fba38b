"""One sequence's reply, token by token, as pieces of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loramux_server.base.detokenizer import Detokenizer
from loramux_server.engine.scheduling.sequence import FinishReason, TokenLogprob, TokenOutput
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from loramux_server.errors import ReplyImpossible, SequenceFailed
from loramux_server.tools.calls import CallPart, ReplyReader

UNKNOWN = math.nan  # the log probability of a prompt's first token, which follows nothing


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """Log probabilities of one token of the reply. `offset` is where its text begins, in characters of the reply."""

    offset: int
    logprob: TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """What became certain of one choice.

    Attributes:
        token_ids: those that were chosen for it, the one that ended the reply among them.
        completion_tokens: of the choice, this piece's among them.
        finish: set on a choice's last piece, and only there.
        stop_reason: there too: the stop string, or the stop token that the request named, that ended the reply.
        reasoning: what it thought before it spoke.
        calls: pieces of the calls that it makes.
    """

    index: int
    text: str
    entries: Sequence[TokenEntry] = ()
    finish: FinishReason | None = None
    token_ids: Sequence[int] = ()
    stop_reason: str | int | None = None
    completion_tokens: int = 0
    reasoning: str = ""
    calls: Sequence[CallPart] = ()


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt in front of its reply.

    Attributes:
        text: of the prompt, as it was sent.
        offsets: where in it each token of the prompt begins.
        alternatives: so many are told beside each token; None tells no log probabilities.
    """

    text: str
    offsets: Sequence[int]
    alternatives: int | None

    def entries(self, prompt: Sequence[int], found: Sequence[TokenLogprob]) -> list[TokenEntry]:
        """`found`: of each token of the prompt but the first."""
        if self.alternatives is None:
            return []
        told = [TokenLogprob(one.token_id, one.logprob, one.top[: self.alternatives]) for one in found]
        first = TokenLogprob(prompt[0], UNKNOWN)
        return [TokenEntry(*each) for each in zip(self.offsets, [first, *told], strict=True)]


class Choice:
    """One sequence's reply, token by token, turned into pieces of text.

    A piece has the log probabilities (`entries`) of the tokens whose text it carries; with a reader, which tells what
    is said from thoughts and calls, of the tokens whose text was read with it.

    Attributes:
        reasoning_tokens: of `completion_tokens`, those that were thought; None without a reader.
    """

    def __init__(
        self,
        index: int,
        sequence: EngineSequence,
        detokenizer: Detokenizer,
        *,
        named_stops: frozenset[int] = frozenset(),
        shows_stop: bool = False,
        echo: Echo | None = None,
        reader: ReplyReader | None = None,
    ) -> None:
        """
        Args:
            named_stops: stop tokens that the request named; one of these is a reason to be told.
            shows_stop: the text ends with the token that ended the reply, unless the detokenizer skips it.
            echo: the prompt comes first.
            reader: tells what the reply says from what it thinks and calls; None takes all for what it says.
        """
        self.index = index
        self.sequence = sequence
        self.completion_tokens = 0
        self.finish: FinishReason | None = None
        self.over = False  # the engine has let go of the sequence, or was told to
        self.queue_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.cached_tokens = 0
        self.prompt_logprobs: Sequence[TokenLogprob] = ()
        self.reasoning_tokens = None if reader is None else 0
        self._reader = reader
        self._unread_tokens = 0  # since the reader last told anything
        self._detokenizer = detokenizer
        self._entries: list[TokenEntry] = []
        self._named_stops = named_stops
        self._shows_stop = shows_stop
        self._echo = echo
        self._begins = 0 if echo is None else len(echo.text)  # the reply, in the text
        self._begun = False
        self._sum, self._count = 0.0, 0  # of log probabilities of chosen tokens

    @property
    def score(self) -> float:
        """The mean log probability of its tokens, the one that ended it among them."""
        return self._sum / self._count if self._count else -math.inf

    def feed(self, output: TokenOutput) -> Piece:
        """Raises SequenceFailed: the engine gave the sequence up."""
        self.over = output.finish_reason is not None
        if output.finish_reason is FinishReason.ERROR:
            failure = ReplyImpossible if output.is_impossible else SequenceFailed
            raise failure(output.error or "the engine failed on this request")
        if output.finish_reason is FinishReason.ABORT:
            raise SequenceFailed("the server ended this request before its reply was complete")
        if output.first_token_seconds is not None:
            self.queue_seconds, self.first_token_seconds = output.queue_seconds, output.first_token_seconds
            self.cached_tokens = output.cached_tokens
            self.prompt_logprobs = output.prompt_logprobs
        front, front_entries = self._front()
        tokens: list[int] = []
        text = ""
        if output.token_id is not None:
            tokens.append(output.token_id)
            self.completion_tokens += 1
            self._note(output.logprob)
            text = self._detokenizer.add(output.token_id)
        if output.stopped_by is not None:
            tokens.append(output.stopped_by)
            self._note(output.stopped_logprob, shown=self._shows_stop or self._echo is not None)
            text = self._detokenizer.add(output.stopped_by) if self._shows_stop else ""
        if output.finish_reason is not None:
            text += self._detokenizer.flush()
        self.finish = FinishReason.STOP if self._detokenizer.stopped else output.finish_reason
        entries = front_entries + self._ready_entries()
        reason = self._stop_reason(output.stopped_by)
        piece = Piece(self.index, front + text, entries, self.finish, tokens, reason, self.completion_tokens)
        return piece if self._reader is None else self._read(piece, self._reader)

    def _read(self, piece: Piece, reader: ReplyReader) -> Piece:
        """The piece with its text told apart."""
        parts = [reader.add(piece.text)] if piece.text else []
        if piece.finish is not None:
            parts.append(reader.end())
        said, thought = "".join(part.content for part in parts), "".join(part.reasoning for part in parts)
        calls = [call for part in parts for call in part.calls]
        self._unread_tokens += len(piece.token_ids)
        if said or thought or calls:
            if thought and not (said or calls):
                self.reasoning_tokens = (self.reasoning_tokens or 0) + self._unread_tokens
            self._unread_tokens = 0
        return replace(piece, text=said, reasoning=thought, calls=calls)

    def _front(self) -> tuple[str, list[TokenEntry]]:
        """The prompt, where it is to be repeated, before the first text."""
        begun, self._begun = self._begun, True
        if begun or self._echo is None:
            return "", []
        return self._echo.text, self._echo.entries(self.sequence.prompt, self.prompt_logprobs)

    def _note(self, logprob: TokenLogprob | None, *, shown: bool = True) -> None:
        """Of a token that was chosen, before its text is added.

        The token that ended the reply is shown behind a prompt, too: clients that score texts leave out the last entry,
        whichever token it is of.
        """
        if logprob is None:
            return
        self._sum += logprob.logprob
        self._count += 1
        if shown:
            self._entries.append(TokenEntry(self._begins + self._detokenizer.position, logprob))

    def _stop_reason(self, stopped_by: int | None) -> str | int | None:
        if self._detokenizer.stopped_by is not None:
            return self._detokenizer.stopped_by
        return stopped_by if stopped_by in self._named_stops else None

    def _ready_entries(self) -> list[TokenEntry]:
        if self.finish is not None and not self._detokenizer.stopped:
            ready, self._entries = self._entries, []
            return ready
        out = self._begins + self._detokenizer.position - self._detokenizer.held
        count = next((i for i, entry in enumerate(self._entries) if entry.offset >= out), len(self._entries))
        ready, self._entries = self._entries[:count], self._entries[count:]
        return ready
