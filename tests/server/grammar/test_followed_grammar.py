"""A grammar beside its sequence: masks against a slow reference, dead ends, ends, time."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loramux_server.errors import GrammarFailed, MaskLate
from loramux_server.grammar.followed_grammar import FollowedGrammar, Lanes
from loramux_server.grammar.limits import GrammarLimits
from loramux_server.grammar.schema import normal_schema
from loramux_server.grammar.shape import Shape
from loramux_server.grammar.vocabulary import Vocabulary
from support.grammar_walks import bytes_tokenizer, family_tokenizer, grammars_of, tokens_in
from support.tokenizer_families import embedded


class ScriptedMatcher:
    """In the place of llguidance's: every token may come, and it does what a test tells it."""

    def __init__(self, **told: Any) -> None:
        self.told: dict[str, Any] = {
            "error": "",
            "stopped": False,
            "accepting": False,
            "words": 0xFFFFFFFF,
            "seconds": 0.0,
        } | told

    def unsafe_compute_mask_ptr(self, pointer: int, nbytes: int) -> None:
        time.sleep(self.told["seconds"])
        if self.told.get("raises"):
            raise RuntimeError("already borrowed")
        self._fill(pointer, nbytes)

    def _fill(self, pointer: int, nbytes: int) -> None:
        import ctypes

        words = (ctypes.c_uint32 * (nbytes // 4)).from_address(pointer)
        words[:] = [self.told["words"]] * len(words)

    def consume_token(self, token: int) -> bool:
        return token != self.told.get("refuses")

    def is_error(self) -> bool:
        return bool(self.told["error"])

    def get_error(self) -> str:
        return str(self.told["error"])

    def is_stopped(self) -> bool:
        return bool(self.told["stopped"])

    def is_accepting(self) -> bool:
        return bool(self.told["accepting"])


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(bytes_tokenizer())


@pytest.fixture
def workers() -> Any:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def followed(vocabulary: Vocabulary, workers: Any, *, schema: Any = None, limits: Any = None, **told: Any) -> Any:
    matcher: Any = ScriptedMatcher(**told)
    return FollowedGrammar(matcher, vocabulary, schema, Lanes(workers, workers), limits or GrammarLimits())


TEXTS = ["no", "not", "north", "yes", "yes!", "é"]


@pytest.mark.parametrize("name", ["", "Llama 2", "byte-level BPE"])
def test_a_token_may_come_where_some_choice_goes_on_with_its_bytes(name: str) -> None:
    """Against a slow reference: all texts, all tokens."""
    tokenizer = family_tokenizer(name) if name else bytes_tokenizer()
    choices = [text.encode() for text in TEXTS]
    for seed in range(12):
        rng = random.Random(seed)
        grammar = grammars_of(name).of(Shape("choice", TEXTS), "p")
        reply = b""
        while not grammar.ended:
            allowed = set(tokens_in(grammar.mask()).tolist())
            expected = {
                token
                for token in range(tokenizer.vocab_size)
                if tokenizer.decode([token]) and (text := tokenizer.token_bytes(token))
                if any(choice.startswith(reply + text) for choice in choices)
            }
            assert allowed - tokenizer.stop_ids == expected
            assert (tokenizer.stop_ids <= allowed) == (reply in choices)
            token = rng.choice(sorted(allowed))
            grammar.advance(token)
            reply += b"" if token in tokenizer.stop_ids else tokenizer.token_bytes(token)
        assert reply in choices
        assert (reply in (b"not", b"north", b"yes!", "é".encode())) or token in tokenizer.stop_ids


def test_an_object_ends_with_its_brace_and_a_number_with_an_end_token() -> None:
    grammar: Any = grammars_of().of(Shape("json_object"), "p")
    for token in bytes_tokenizer().encode("{}", special=False):
        assert not grammar.ended
        assert 257 not in tokens_in(grammar.mask())
        grammar.advance(token)
    assert grammar.ended

    grammar = grammars_of().of(Shape("json_schema", {"type": "integer"}), "p")
    grammar.advance(bytes_tokenizer().encode("7", special=False)[0])
    assert not grammar.ended
    assert 257 in tokens_in(grammar.mask())
    grammar.advance(257)
    assert grammar.ended


def test_a_token_outside_the_mask_fails_and_stays_failed() -> None:
    grammar: Any = grammars_of().of(Shape("json_object"), "p")
    with pytest.raises(GrammarFailed, match="has left its grammar"):
        grammar.advance(bytes_tokenizer().encode("x", special=False)[0])
    with pytest.raises(GrammarFailed, match="has left its grammar"):
        grammar.mask()
    with pytest.raises(GrammarFailed, match="has left its grammar"):
        grammar.advance(0)


def test_an_end_where_none_may_be_fails() -> None:
    grammar: Any = grammars_of().of(Shape("json_object"), "p")
    with pytest.raises(GrammarFailed, match="ends where its grammar does not let it"):
        grammar.advance(257)


def test_nothing_comes_behind_the_end() -> None:
    grammar: Any = grammars_of().of(Shape("choice", ["a"]), "p")
    grammar.advance(bytes_tokenizer().encode("a", special=False)[0])
    with pytest.raises(GrammarFailed, match="behind the end"):
        grammar.advance(0)


def test_a_dead_end_of_the_library_is_no_end(vocabulary: Vocabulary, workers: Any) -> None:
    """llguidance's mask lets the reply end when it is in its error state: a dead end would read as `stop`."""
    with pytest.raises(GrammarFailed, match="cannot go on within its grammar: nothing may come next"):
        followed(vocabulary, workers, error="NoExtensionBias\n<non-verbose/>").mask()


def test_a_stop_before_the_reply_is_complete_fails(vocabulary: Vocabulary, workers: Any) -> None:
    with pytest.raises(GrammarFailed, match="ends before it is complete"):
        followed(vocabulary, workers, stopped=True).advance(3)


def test_a_mask_without_tokens_fails(vocabulary: Vocabulary, workers: Any) -> None:
    with pytest.raises(GrammarFailed, match="no token of the base may come next"):
        followed(vocabulary, workers, words=0).mask()


def test_a_reply_that_the_library_wrongly_takes_for_complete_fails(vocabulary: Vocabulary, workers: Any) -> None:
    zero = bytes_tokenizer().encode("0", special=False)[0]
    grammar = followed(vocabulary, workers, schema={"type": "string"}, stopped=True, accepting=True)
    with pytest.raises(GrammarFailed, match="cannot be completed: # is not of type string"):
        grammar.advance(zero)

    open_end = followed(vocabulary, workers, schema={"type": "string"}, accepting=True)
    open_end.advance(zero)
    assert 257 not in tokens_in(open_end.mask())  # it may go on, but not end


def test_whatever_goes_wrong_while_a_mask_is_made_is_this_rows_error(vocabulary: Vocabulary, workers: Any) -> None:
    with pytest.raises(GrammarFailed, match="cannot be followed \\(RuntimeError\\)"):
        followed(vocabulary, workers, raises=True).mask()


def test_a_mask_that_takes_too_long_fails_in_time(vocabulary: Vocabulary, workers: Any) -> None:
    limits = replace(GrammarLimits(), mask_seconds=0.05)
    grammar = followed(vocabulary, workers, limits=limits, seconds=1.0)
    begun = time.monotonic()
    with pytest.raises(GrammarFailed, match="takes longer than 0.05 s"):
        grammar.mask()
    assert time.monotonic() - begun < 0.8


def test_a_mask_that_is_not_there_is_late_and_nobody_waits_longer_than_asked(
    vocabulary: Vocabulary, workers: Any
) -> None:
    begin = threading.Event()
    workers.submit(begin.wait, 10)
    grammar = followed(vocabulary, workers)
    called: list[int] = []
    grammar.on_ready(lambda: called.append(1))
    begun = time.monotonic()
    for patience in (0.0, 0.02):
        with pytest.raises(MaskLate):
            grammar.mask(patience)
    assert time.monotonic() - begun < 5 and not grammar.is_ready and not called
    begin.set()
    assert len(tokens_in(grammar.mask())) > 250 and grammar.is_ready
    while not called:
        time.sleep(0.001)
    grammar.on_ready(lambda: called.append(2))
    assert called == [1, 2] and grammar.mask_seconds > 0.02


def test_a_mask_that_waits_too_long_for_those_of_others_fails_and_says_so(vocabulary: Vocabulary, workers: Any) -> None:
    begin = threading.Event()
    workers.submit(begin.wait, 10)
    grammar = followed(vocabulary, workers, limits=replace(GrammarLimits(), mask_queue_seconds=0.02))
    try:
        with pytest.raises(GrammarFailed, match="grammars of other replies"):
            grammar.mask()
        assert grammar.is_ready
        with pytest.raises(GrammarFailed, match="grammars of other replies"):
            grammar.mask(0.0)
    finally:
        begin.set()


def test_a_grammar_whose_masks_take_long_has_them_made_apart_until_they_are_quick_again(
    vocabulary: Vocabulary, workers: Any
) -> None:
    class Busy(ScriptedMatcher):
        def unsafe_compute_mask_ptr(self, pointer: int, nbytes: int) -> None:
            names.append(threading.current_thread().name[:4])
            begun = time.thread_time()
            while time.thread_time() - begun < self.told["seconds"]:
                pass
            self._fill(pointer, nbytes)

    names: list[str] = []
    matcher: Any = Busy(seconds=0.02)
    with ThreadPoolExecutor(1, "quick") as quick, ThreadPoolExecutor(1, "slow") as slow:
        grammar = FollowedGrammar(matcher, vocabulary, None, Lanes(quick, slow), GrammarLimits())
        seen = []
        for place in range(20):
            grammar.mask()
            while not grammar.is_ready:
                time.sleep(0.001)
            seen.append(grammar.is_slow)
            matcher.told["seconds"] = 0.02 if place == 7 else 0.0
            grammar.advance(3)
        grammar.mask()
    assert seen == [True] * 4 + [False] * 4 + [True] * 8 + [False] * 4
    assert names[:6] == ["quic", "slow", "slow", "slow", "slow", "quic"]


def test_masks_that_take_long_together_fail() -> None:
    limits = replace(GrammarLimits(), spent_seconds=0.0, spent_seconds_per_token=0.0)
    from loramux_server.grammar.grammars import Grammars

    grammars = Grammars(bytes_tokenizer(), limits)
    try:
        with pytest.raises(GrammarFailed, match="took 0.0 s to say what may come so far"):
            grammars.of(Shape("json_object"), "p").mask()
    finally:
        grammars.close()


def test_after_its_threads_have_been_stopped_a_grammar_fails(vocabulary: Vocabulary) -> None:
    pool = ThreadPoolExecutor(1)
    grammar = followed(vocabulary, pool)
    grammar.mask()
    pool.shutdown()
    with pytest.raises(GrammarFailed, match="it stops"):
        grammar.advance(3)


def test_a_mask_is_made_while_the_caller_does_other_things(vocabulary: Vocabulary, workers: Any) -> None:
    names: list[str] = []

    class Watching(ScriptedMatcher):
        def unsafe_compute_mask_ptr(self, pointer: int, nbytes: int) -> None:
            names.append(threading.current_thread().name)
            self._fill(pointer, nbytes)

    matcher: Any = Watching()
    grammar = FollowedGrammar(matcher, vocabulary, None, Lanes(workers, workers), GrammarLimits())
    grammar.advance(3)
    grammar.mask()
    assert len(names) == 2
    assert threading.current_thread().name not in names


@pytest.mark.skipif(embedded() is None, reason="the embedded base's tokenizer has not been fetched")
def test_masks_have_the_length_of_the_vocabulary() -> None:
    mask = grammars_of("embedded").of(Shape("json_object"), "p").mask()

    assert mask.dtype == np.uint32
    assert mask.shape == (-(-family_tokenizer("embedded").vocab_size // 32),)


def test_whatever_goes_wrong_with_a_token_is_a_failure_of_this_grammar_alone(
    vocabulary: Vocabulary, workers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's thread calls it: another exception there would end every reply."""
    grammar = followed(vocabulary, workers, stopped=True, accepting=True)

    def fail() -> str | None:
        raise RecursionError

    monkeypatch.setattr(grammar, "_problem", fail)
    with pytest.raises(GrammarFailed, match="cannot be followed"):
        grammar.advance(97)


def test_a_deep_reply_of_a_schema_that_refers_to_itself_ends_alone(workers: Any) -> None:
    vocabulary, limits = Vocabulary(bytes_tokenizer()), GrammarLimits()
    schema = normal_schema({"type": "array", "items": {"$ref": "#"}}, "guided_json", limits)
    grammar = followed(vocabulary, workers, schema=schema)
    opening, closing = (next(id for id in range(300) if vocabulary.text(id) == one) for one in (b"[", b"]"))
    for token in [opening] * 450 + [closing] * 449:
        grammar.advance(token)
    grammar._matcher.told.update(stopped=True, accepting=True)
    with pytest.raises(GrammarFailed, match="nested too deeply"):
        grammar.advance(closing)
