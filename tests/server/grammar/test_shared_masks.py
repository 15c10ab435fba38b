"""Masks that replies to one pattern share are llguidance's own, wherever they are used."""

from __future__ import annotations

import random
import threading
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

import numpy as np
import pytest

from loramux_server.grammar import shared_masks
from loramux_server.grammar.followed_grammar import FollowedGrammar, Lanes
from loramux_server.grammar.grammars import Grammars
from loramux_server.grammar.limits import GrammarLimits
from loramux_server.grammar.residuals import Unclear
from loramux_server.grammar.shape import Shape
from loramux_server.grammar.shared_masks import Mask, PatternMasks, PatternPlace, SharedMasks
from loramux_server.grammar.vocabulary import Vocabulary
from support.grammar_walks import family_tokenizer, grammars_of, tokens_in
from support.patterns import WRITTEN, mask_of, matcher_of, random_pattern, vocabulary_of_many_texts, walk
from support.tokenizer_families import embedded

FAMILY = "byte-level BPE"
WORDS = "([a-z]{2,9} ){500}"


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    return vocabulary_of_many_texts()


def shared_of(pattern: str, vocabulary: Vocabulary) -> SharedMasks | None:
    return PatternMasks().of(pattern, vocabulary.texts)


def same(one: Mask, other: Mask) -> bool:
    return one.may_end == other.may_end and np.array_equal(one.bits, other.bits)


def compare(pattern: str, vocabulary: Vocabulary, *, replies: int, tokens: int) -> tuple[int, int]:
    """Places of random replies at which a mask was known, and at which none was. Those that are are llguidance's."""
    shared = shared_of(pattern, vocabulary)
    known = unknown = 0
    for seed in range(replies if shared is not None else 0):
        assert shared is not None
        place: PatternPlace | None = shared.start
        for token, mask in walk(pattern, vocabulary, random.Random(seed), tokens):
            if token is not None and place is not None:
                before, text = place, vocabulary.text(token)
                moved = shared.moved(before, text)
                place = shared.move(before, text)
                assert moved is None or moved == (place,)
                assert shared.moved(before, text) == (place,)
            if place is None:
                break
            found = shared.known(place)
            if found is None:
                unknown += 1
                shared.keep(place, mask)
                assert shared.known(place) is not None
            else:
                known += 1
                assert same(found, mask), (pattern, seed)
    return known, unknown


def test_a_mask_that_is_known_is_llguidances_in_random_patterns(vocabulary: Vocabulary) -> None:
    """Tokens of up to eight bytes, of few characters: they see far ahead in these patterns."""
    rng = random.Random(5)
    counts = [compare(random_pattern(rng), vocabulary, replies=6, tokens=30) for _ in range(250)]
    assert sum(known for known, _ in counts) > 5_000
    assert sum(unknown for _, unknown in counts) > 500


@pytest.mark.parametrize("pattern", WRITTEN)
@pytest.mark.parametrize("name", [FAMILY, "Llama 2"])
def test_a_mask_that_is_known_is_llguidances_with_real_tokens(name: str, pattern: str) -> None:
    compare(pattern, grammars_of(name).prepare(), replies=3, tokens=40)


@pytest.mark.skipif(embedded() is None, reason="the embedded base's tokenizer has not been fetched")
@pytest.mark.parametrize(
    ("pattern", "most_made"),
    [
        (WORDS, 12),
        (r"[^\n]{1,2000}", 20),
        ("([A-Z][a-z]{0,12}[,;]? ?){1,200}", 20),
        ("[a-zé]{1,300}", 30),
    ],
)
def test_a_few_masks_do_for_many_places_of_the_embedded_base(pattern: str, most_made: int) -> None:
    known, made = compare(pattern, grammars_of("embedded").prepare(), replies=6, tokens=100)
    assert made <= most_made
    assert known + made > 300


def test_the_end_of_a_repetition_is_seen_from_as_far_as_a_token_reaches(vocabulary: Vocabulary) -> None:
    shared = shared_of("(ab){20}", vocabulary)
    assert shared is not None and shared._reach == 4
    places = [shared.start]
    for _ in range(20):
        moved = shared.move(places[-1], b"ab")
        assert moved is not None
        places.append(moved)
    assert len({place.rest for place in places}) == 21
    assert len({place.seen for place in places[:19]}) == 1  # two or more "ab" to come
    assert len({place.seen for place in places}) == 3


def test_how_far_a_token_reaches_counts_those_alone_that_the_pattern_may_have(vocabulary: Vocabulary) -> None:
    reaches = {"[ab]*": 4, "a b": 3, "[x-z]+": 1, "(a ?)+": 4, "語+": 6, r"\w": 6, "(a|b) ": 2, "(a )+": 4, "a|b": 1}
    for pattern, reach in reaches.items():
        shared = shared_of(pattern, vocabulary)
        assert shared is not None and shared._reach == reach, pattern


def test_a_character_of_a_class_that_is_not_known_ends_the_sharing_for_that_reply(vocabulary: Vocabulary) -> None:
    shared = shared_of(r"\w+", vocabulary)
    assert shared is not None
    assert shared.move(shared.start, "é".encode()) is None
    assert shared.moved(shared.start, "é".encode()) == (None,)
    assert shared.move(shared.start, b"ab") is not None


def test_a_pattern_that_was_read_wrongly_is_not_shared_any_more(vocabulary: Vocabulary) -> None:
    for wrong in range(2):
        shared = shared_of("a+", vocabulary)
        assert shared is not None
        mask = mask_of(matcher_of("a+", vocabulary), vocabulary)
        shared.keep(shared.start, mask)
        assert shared.known(shared.start) is not None
        if wrong:
            shared.keep(shared.start, Mask(mask.bits, True))  # llguidance lets the reply end where the pattern does not
        else:
            assert shared.move(shared.start, b"b") is None  # it lets come what the pattern does not
        assert shared.known(shared.start) is None


def test_what_is_held_has_bounds(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_masks, "_MOST_HELD", 150)
    monkeypatch.setattr(shared_masks, "_MOST_WORK", 60)
    shared = shared_of("([ab]{2,9} ){500}", vocabulary)
    assert shared is not None
    place: PatternPlace | None = shared.start
    moves = 0
    while place is not None and moves < 500:
        place = shared.move(place, b"ab ")
        moves += 1
    assert 3 < moves < 60
    assert shared._terms.count + len(shared._moves) <= 150
    assert shared.move(shared.start, b"ab ") is not None  # what is held stays

    monkeypatch.setattr(shared_masks, "_MOST_MASK_BYTES", 0)
    shared.keep(shared.start, mask_of(matcher_of("([ab]{2,9} ){500}", vocabulary), vocabulary))
    assert shared.known(shared.start) is None


def test_a_token_that_takes_long_to_follow_is_not_followed(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = shared_of("(a|b)*a(a|b){40}", vocabulary)
    monkeypatch.setattr(shared_masks, "_MOST_WORK", 3)
    assert shared is not None
    assert shared.move(shared.start, b"abab") is None
    assert shared.moved(shared.start, b"abab") == (None,)


def test_a_pattern_whose_masks_are_hardly_used_is_given_up(vocabulary: Vocabulary) -> None:
    for uses, goes_on in ((0, False), (200, True)):
        shared = shared_of("(a|b)*a(a|b){30}", vocabulary)
        assert shared is not None
        shared.keep(shared.start, mask_of(matcher_of("(a|b)*a(a|b){30}", vocabulary), vocabulary))
        for _ in range(uses):
            shared.known(shared.start)
        place: PatternPlace | None = shared.start
        rng, moves = random.Random(2), 0
        while place is not None and moves < 100:
            place = shared.move(place, rng.choice([b"a", b"b"]))
            moves += 1
        assert (place is not None) == goes_on


def test_the_patterns_that_were_asked_for_last_are_kept(vocabulary: Vocabulary) -> None:
    patterns = PatternMasks()
    texts = vocabulary.texts
    first = patterns.of("a+", texts)
    assert first is not None and patterns.of("a+", texts) is first
    assert patterns.of("[[:alpha:]]", texts) is None
    for count in range(1, shared_masks._MOST_PATTERNS):
        patterns.of(f"a{{{count}}}", texts)
        assert patterns.of("a+", texts) is first
    assert len(patterns._patterns) == shared_masks._MOST_PATTERNS
    for count in range(1, shared_masks._MOST_PATTERNS + 1):
        patterns.of(f"b{{{count}}}", texts)
    assert patterns.of("a+", texts) is not first


def test_one_that_holds_all_it_may_makes_room_for_another_if_it_was_worth_it(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_masks, "_MOST_HELD", 200)
    monkeypatch.setattr(shared_masks, "_MOST_WORK", 80)
    patterns, pattern = PatternMasks(), "([ab]{2,9} ){500}"
    shared = patterns.of(pattern, vocabulary.texts)
    assert shared is not None
    place: PatternPlace | None = shared.start
    while place is not None:
        place = shared.move(place, b"ab ")
    assert patterns.of(pattern, vocabulary.texts) is shared
    shared.keep(shared.start, mask_of(matcher_of(pattern, vocabulary), vocabulary))
    for _ in range(len(shared._moves) + 1):
        assert patterns.of(pattern, vocabulary.texts) is shared
        assert shared.known(shared.start) is not None
    other = patterns.of(pattern, vocabulary.texts)
    assert other is not None and other is not shared
    assert other.move(other.start, b"ab ") is not None


def test_threads_that_follow_one_pattern_at_once_come_to_the_same_places(vocabulary: Vocabulary) -> None:
    shared = shared_of("([ab]{1,9} ){50}", vocabulary)
    assert shared is not None
    begin, ends = threading.Barrier(6), []

    def follow(number: int) -> None:
        begin.wait()
        rng, place, text = random.Random(number % 3), shared.start, b""
        for _ in range(60):
            token = rng.choice([b"ab", b"a ", b"b"])
            moved = shared.move(place, token)
            if moved is None:
                break
            place, text = moved, text + token
        ends.append((number % 3, text, place))

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(number, text, place.rest, place.seen) for number, text, place in ends}) == 3


class CountingExecutor(Executor):
    """Does what it is given at once, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def submit(self, call: Any, /, *args: Any, **named: Any) -> Any:
        self.count += 1
        future: Future[Any] = Future()
        future.set_result(call(*args, **named))
        return future


def test_a_reply_whose_masks_are_known_asks_no_thread(vocabulary: Vocabulary) -> None:
    pattern = "([ab]{2,5} ){300}"
    shared = shared_of(pattern, vocabulary)
    asked = []
    for _ in range(2):
        threads = CountingExecutor()
        grammar = FollowedGrammar(
            matcher_of(pattern, vocabulary), vocabulary, None, Lanes(threads, threads), GrammarLimits(), shared=shared
        )
        alone = matcher_of(pattern, vocabulary)
        rng = random.Random(1)
        called: list[int] = []
        for _ in range(80):
            assert same(Mask(grammar.mask(), grammar._may_end), mask_of(alone, vocabulary))
            grammar.on_ready(partial(called.append, 1))
            token = int(rng.choice(tokens_in(grammar.mask())))
            alone.consume_token(token)
            grammar.advance(token)
        assert len(called) == 80 and grammar.is_ready
        asked.append(threads.count)
    assert 0 < asked[0] <= 81 and asked[1] == 0


@pytest.mark.parametrize("pattern", [r"\w+[.!]", "(a|b)+c?", r"[^\n]{3,9}", r"(é| )+"])
def test_replies_end_where_llguidance_lets_them(pattern: str) -> None:
    """Whole replies through a server's grammars, each beside a matcher of its own."""
    grammars = Grammars(family_tokenizer(FAMILY), num_workers=1)
    vocabulary = grammars.prepare()
    try:
        for seed in range(6):
            grammar: Any = grammars.of(Shape("regex", pattern), "p")
            alone, rng = matcher_of(pattern, vocabulary), random.Random(seed % 2)
            for _ in range(40):
                own = mask_of(alone, vocabulary)
                assert np.array_equal(grammar.mask(), own.bits)
                token = int(rng.choice(tokens_in(own.bits)))
                grammar.advance(token)
                alone.consume_token(token)
                assert grammar.ended == (alone.is_stopped() or token in vocabulary.stop_ids)
                if grammar.ended:
                    break
    finally:
        grammars.close()


def test_an_unclear_pattern_is_an_error_of_this_class_alone(vocabulary: Vocabulary) -> None:
    with pytest.raises(Unclear):
        SharedMasks(r"\p{L}", vocabulary.texts)
