"""Shapes -> grammars that sequences follow: checked, compiled within bounds, kept for who asks for the same."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from loramux_server.errors import RequestError, ServerBusy
from loramux_server.grammar.followed_grammar import FollowedGrammar, Lanes, Used, shortened
from loramux_server.grammar.limits import GrammarLimits
from loramux_server.grammar.shape import Shape
from loramux_server.grammar.shared_masks import PatternMasks
from loramux_server.grammar.source import GrammarSource, source_of
from loramux_server.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    import llguidance

    from loramux_adapters.artifact.own_tokens import OwnTokens
    from loramux_server.base.tokenizer import BaseTokenizer
    from loramux_server.engine.scheduling.grammar import Grammar

_COMPILERS = 2  # threads; a grammar that takes long holds one of them, and no mask
_MOST_WORKERS = 8
_SLOW_WORKERS = 1  # threads for the masks of grammars that take long, however many there are
_TRIED = 4  # tokens, of each new grammar
_SMALLEST = 1024  # bytes that count for each kept grammar, however short
_OF_ADAPTERS = 4  # vocabularies of adapters with tokens of their own; one takes some 10 MB

_Digest: TypeAlias = tuple[int, bytes]  # of a grammar: the number of its vocabulary, and what its source digests to


class _Spoken(NamedTuple):
    """What replies are made of.

    Attributes:
        number: no other vocabulary has it, also none that is gone.
        patterns: masks of its tokens.
    """

    number: int
    vocabulary: Vocabulary
    patterns: PatternMasks


class Grammars:
    """Any number of threads may call its methods.

    A grammar's automaton grows with what replies have said, and llguidance lets one thread at a time use it. So each
    running sequence has one of its own; when the sequence is gone, the next one of the same grammar takes it as it is.
    """

    def __init__(
        self, tokenizer: BaseTokenizer, limits: GrammarLimits | None = None, *, num_workers: int | None = None
    ) -> None:
        """
        Args:
            num_workers: threads that make masks, beside one for those that take long; None: half as many as this
                process has processors, at most 8.
        """
        self._tokenizer = tokenizer
        self._limits = limits or GrammarLimits()
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = num_workers or max(1, min(_MOST_WORKERS, processors // 2))
        self._lanes = Lanes(
            quick=ThreadPoolExecutor(workers, thread_name_prefix="grammar-mask"),
            slow=ThreadPoolExecutor(_SLOW_WORKERS, thread_name_prefix="grammar-slow-mask"),
        )
        self._compilers = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="grammar-compile")
        self._lock = threading.RLock()  # a grammar may be found to be gone at any time, also inside
        self._building = threading.Lock()
        self._spoken: OrderedDict[OwnTokens | None, _Spoken] = OrderedDict()  # last used last; None: the base's
        self._read = 0  # vocabularies so far
        self._idle: OrderedDict[_Digest, list[tuple[llguidance.LLMatcher, Used]]] = OrderedDict()  # last used last
        self._sizes: dict[_Digest, int] = {}  # of their sources

    def of(self, shape: Shape, param: str, own: OwnTokens | None = None) -> Grammar:
        """A grammar for one sequence; its first mask is on the way. In a worker thread: it may take seconds.

        Args:
            param: the request's field that asks for this shape.
            own: tokens that the sequence's adapters add to the base's, and its end token.
        Raises:
            RequestError: it cannot be parsed, is not supported, or is too large.
            ServerBusy: others' grammars are compiled.
        """
        source = source_of(shape, param, self._limits)
        number, vocabulary, patterns = self._spoken_with(own)
        digest = number, sha256(source.text.encode(errors="surrogatepass")).digest()
        matcher, used = self._taken(digest) or (self._compiled(source, vocabulary, param), Used())
        shared = patterns.of(shape.value, vocabulary.texts) if shape.kind == "regex" else None
        grammar = FollowedGrammar(matcher, vocabulary, source.schema, self._lanes, self._limits, used, shared)
        weakref.finalize(grammar, self._give_back, digest, len(source.text), matcher, used).atexit = False
        return grammar

    def prepare(self) -> Vocabulary:
        """Reads the base's tokens, once. The first `of` does it otherwise. Raises RequestError: see `Vocabulary`."""
        return self._spoken_with(None).vocabulary

    def _spoken_with(self, own: OwnTokens | None) -> _Spoken:
        """The first time for some tokens takes a second; those of the last few adapters are kept."""
        with self._lock:
            known = self._used(own)
        if known is not None:
            return known
        with self._building:
            with self._lock:
                known = self._used(own)
            if known is None:
                vocabulary = Vocabulary(self._tokenizer.with_tokens(own))
                with self._lock:
                    known = self._spoken[own] = _Spoken(self._read, vocabulary, PatternMasks())
                    self._read += 1
                    self._forget_the_oldest()
            return known

    def _used(self, own: OwnTokens | None) -> _Spoken | None:
        if own in self._spoken:
            self._spoken.move_to_end(own)
        return self._spoken.get(own)

    def _forget_the_oldest(self) -> None:
        """Adapters' vocabularies that are too many, and the grammars that are kept of their tokens."""
        of_adapters = [own for own in self._spoken if own is not None]
        for own in of_adapters[:-_OF_ADAPTERS]:
            gone = self._spoken.pop(own).number
            for digest in [digest for digest in self._idle if digest[0] == gone]:
                del self._idle[digest], self._sizes[digest]

    def close(self) -> None:
        """No grammar is made or goes on after this."""
        self._compilers.shutdown(wait=False, cancel_futures=True)
        for lane in self._lanes:
            lane.shutdown(wait=False, cancel_futures=True)

    def _compiled(self, source: GrammarSource, vocabulary: Vocabulary, param: str) -> llguidance.LLMatcher:
        begun = threading.Event()
        compiling = self._compilers.submit(self._compile, source.text, vocabulary, begun)
        if not begun.wait(self._limits.queue_seconds) and compiling.cancel():
            raise ServerBusy("the server compiles the grammars of other requests; try again")
        matcher = self._waited_for(compiling, param)
        if matcher.is_error():
            raise RequestError(
                f"'{param}' cannot be compiled: {shortened(matcher.get_error())}", param=param, code="invalid_value"
            )
        return matcher

    def _waited_for(self, compiling: Future[llguidance.LLMatcher], param: str) -> llguidance.LLMatcher:
        try:
            return compiling.result(self._limits.compile_seconds)
        except TimeoutError as error:
            raise RequestError(
                f"'{param}' takes longer than {self._limits.compile_seconds:g} s to compile; make it simpler",
                param=param,
                code="invalid_value",
            ) from error
        except ValueError as error:
            raise RequestError(
                f"'{param}' cannot be compiled: {shortened(str(error))}", param=param, code="invalid_value"
            ) from error

    def _compile(self, text: str, vocabulary: Vocabulary, begun: threading.Event) -> llguidance.LLMatcher:
        """On a compiler's thread, without the interpreter's lock but for the parsing of JSON."""
        from llguidance import LLMatcher, LLParserLimits

        begun.set()
        limits = self._limits
        matcher = LLMatcher(
            vocabulary.tokenizer,
            text,
            log_level=0,
            limits=LLParserLimits(
                max_items_in_row=limits.row_items,
                initial_lexer_fuel=limits.compile_fuel,
                step_lexer_fuel=limits.mask_fuel,
                step_max_items=limits.mask_items,
                max_lexer_states=limits.states,
                max_grammar_size=limits.grammar_size,
                verbose_errors=False,
            ),
        )
        self._try(matcher, vocabulary)
        return matcher

    def _try(self, matcher: llguidance.LLMatcher, vocabulary: Vocabulary) -> None:
        """A few tokens, so that a grammar that is beyond its bounds at once, or leads nowhere, is refused now.

        The matcher is in its error state then. Raises ValueError: no reply can begin.
        """
        mask = vocabulary.empty_mask()
        for place in range(_TRIED):
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            others = vocabulary.without_ends(vocabulary.choosable(mask))
            if not place and not (matcher.is_error() or matcher.is_accepting() or others.any()):
                raise ValueError("no token of the base may come first")
            if matcher.is_error() or matcher.is_stopped() or not others.any():
                break
            word = int(np.flatnonzero(others)[0])
            lowest = int(others[word]) & -int(others[word])
            matcher.consume_token(32 * word + lowest.bit_length() - 1)
        if not matcher.is_error():
            matcher.reset()

    def _taken(self, digest: _Digest) -> tuple[llguidance.LLMatcher, Used] | None:
        with self._lock:
            idle = self._idle.get(digest)
            return idle.pop() if idle else None

    def _give_back(self, digest: _Digest, size: int, matcher: llguidance.LLMatcher, used: Used) -> None:
        if used.seconds > self._limits.kept_spent_seconds or matcher.is_error() or not matcher.reset():
            return
        with self._lock:
            if all(spoken.number != digest[0] for spoken in self._spoken.values()):
                return
            idle = self._idle.setdefault(digest, [])
            self._idle.move_to_end(digest)
            self._sizes[digest] = size
            if len(idle) < self._limits.kept_copies:
                idle.append((matcher, used))
            while self._idle and self._is_too_much():
                oldest, _ = self._idle.popitem(last=False)
                del self._sizes[oldest]

    def _is_too_much(self) -> bool:
        kept = sum(map(len, self._idle.values()))
        return kept > self._limits.kept_matchers or self._kept_bytes() > self._limits.kept_bytes

    def _kept_bytes(self) -> int:
        return sum(self._sizes[digest] * len(idle) + _SMALLEST for digest, idle in self._idle.items())
