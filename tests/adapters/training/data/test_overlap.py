"""Copies and near copies between training and held-out data, and within one file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.errors import DataError
from loramux_adapters.training.data import overlap
from loramux_adapters.training.data.examples import Example, ExampleSet, Message
from loramux_adapters.training.data.overlap import OverlapError, deduplicate, find_overlaps, refuse_overlaps

WORDS = (
    "river lamp window garden brother silver market ticket winter yellow pencil doctor summer engine bottle "
    "island letter monkey orange pocket rabbit school tunnel violin wallet button candle dragon flower guitar"
).split()


def ask(text: str, answer: str = "ham", line: int = 1, system: str = "") -> Example:
    start = (Message("system", system),) if system else ()
    return Example((*start, Message("user", text), Message("assistant", answer)), line)


def sentences(count: int, *, seed: int = 0, words: int = 14) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(words)) for _ in range(count)]


def lines_of(examples: list[str], start: int = 1, template: str = "{}") -> list[Example]:
    return [ask(template.format(text), line=line) for line, text in enumerate(examples, start)]


def pairs(train: list[Example], held: list[Example]) -> list[tuple[int, int]]:
    return [(found.train, found.held) for found in find_overlaps(train, held)]


def test_a_copy_is_found_whatever_its_case_spaces_punctuation_and_answer() -> None:
    train = [ask("Good morning, all", line=3), ask("You have WON a prize!!! Call  now.", "spam", line=4)]
    held = [ask("you have won a prize, call now", "ham", line=9), ask("something else entirely", line=10)]

    (found,) = find_overlaps(train, held)
    assert (found.train, found.held, found.similarity) == (4, 9, 1.0)


def test_a_near_copy_is_found_and_another_text_is_not() -> None:
    train = lines_of(sentences(30))
    near = train[11].prompt[0].content.replace("a", "A").rsplit(" ", 1)[0] + " indeed"
    (found,) = find_overlaps(train, [ask(near, line=5), ask(sentences(1, seed=9)[0], line=6)])

    assert (found.train, found.held) == (12, 5)
    assert overlap.NEAR <= found.similarity < 1


def test_the_training_line_that_is_most_alike_is_told() -> None:
    text = "the quick brown fox jumps over the lazy dog and runs away into the dark forest"
    train = [ask(text + " now", line=1), ask(text, line=2), ask(text + " too", line=3)]

    assert pairs(train, [ask(text, line=7)]) == [(2, 7)]


def test_an_instruction_around_every_text_makes_no_two_of_them_alike() -> None:
    template = "Read the message below with care and say in one word whether it is spam or ham.\n\n{}\n\nSpam or ham?"
    texts = sentences(60, words=3)

    assert pairs(lines_of(texts[:40], template=template), lines_of(texts[40:], template=template)) == []
    held = lines_of([*texts[40:], texts[7].upper()], template=template)
    assert pairs(lines_of(texts[:40], template=template), held) == [(8, 21)]


def test_a_system_message_does_not_count() -> None:
    long = "You are a careful reader of short messages and answer in one single word, always."

    assert find_overlaps([ask("hello", system=long)], [ask("good bye", system=long)]) == []
    assert len(find_overlaps([ask("hello there", system=long)], [ask("hello there")])) == 1


def test_short_texts_of_common_words_are_not_alike() -> None:
    texts = [f"i am {adjective} today" for adjective in WORDS]

    assert pairs(lines_of(texts[:20]), lines_of(texts[20:])) == []


def test_where_all_prompts_are_one_the_answers_are_compared() -> None:
    stories = sentences(30)
    train = [ask("Write a story.", story, line) for line, story in enumerate(stories[:20], 1)]
    held = [ask("Write a story.", story, line) for line, story in enumerate([*stories[20:], stories[4]], 1)]

    assert pairs(train, held) == [(5, 11)]


def test_texts_of_nothing_but_signs_differ_if_the_signs_do() -> None:
    assert find_overlaps([ask(":)")], [ask(":(")]) == []
    assert len(find_overlaps([ask(":)")], [ask(" :) ")])) == 1


def test_every_script_is_compared_by_its_letters() -> None:
    assert find_overlaps([ask("こんにちは世界")], [ask("さようなら世界")]) == []
    assert len(find_overlaps([ask("नमस्ते दुनिया।")], [ask("नमस्ते दुनिया")])) == 1
    assert find_overlaps([ask("नमस्ते दुनिया")], [ask("नमस्तु दुनियी")]) == []


def test_nothing_overlaps_with_nothing() -> None:
    assert find_overlaps([], []) == []
    assert find_overlaps([], [ask("a")]) == find_overlaps([ask("a")], []) == []
    assert deduplicate([]) == []


@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, 24), st.integers(0, 13)), max_size=12))
def test_no_near_copy_is_missed_that_comparing_every_pair_finds(seed: int, changes: list[tuple[int, int]]) -> None:
    texts = sentences(25, seed=seed)
    held = list(texts[:3])
    for index, place in changes:
        words = texts[index].split()
        words[place] = "changed"
        held.append(" ".join(words))
    train_set, held_set = lines_of(texts[3:], 4), lines_of(held)
    found = {entry.held: entry.similarity for entry in find_overlaps(train_set, held_set)}

    everything = [*train_set, *held_set]
    grams = [
        {text[i : i + 5] for i in range(len(text) - 4)} for text in (each.prompt[0].content for each in everything)
    ]
    common = max(4, min(10, len(everything) // 2), len(everything) // 20)
    rare = [{gram for gram in each if sum(gram in other for other in grams) <= common} for each in grams]

    def alike(first: int, second: int) -> float:
        if everything[first].messages == everything[second].messages:
            return 1.0
        values = (len(sets[first] & sets[second]) / (len(sets[first] | sets[second]) or 1) for sets in (grams, rare))
        return min(values)

    best = {
        example.line: max(alike(other, index) for other in range(len(train_set)))
        for index, example in enumerate(everything)
        if index >= len(train_set)
    }
    assert found == pytest.approx({line: value for line, value in best.items() if value >= 0.8}, abs=1e-5)


def test_a_sample_of_the_shingles_finds_what_all_of_them_find(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.randbytes(3).hex() for _ in range(200)) for _ in range(35)]
    texts, held = texts[:30], [texts[3].replace("a1", "b2"), *texts[30:]]
    monkeypatch.setattr(overlap, "MEAN_SHINGLES", 10**9)
    whole = pairs(lines_of(texts), lines_of(held))
    monkeypatch.setattr(overlap, "MEAN_SHINGLES", 150)

    assert pairs(lines_of(texts), lines_of(held)) == whole == [(4, 1)]


def test_deduplicate_keeps_the_first_of_each_kind_and_leaves_nothing_alike() -> None:
    texts = sentences(40)
    near = [text.rsplit(" ", 1)[0] for text in texts[:10]]
    examples = lines_of([*texts, *near, *(text.upper() for text in texts[:5])])
    kept = deduplicate(examples)

    assert [example.line for example in kept] == list(range(1, 41))
    assert find_overlaps(kept[::2], kept[1::2]) == []


def example_set(examples: list[Example], name: str) -> ExampleSet:
    return ExampleSet(tuple(examples), (), "", Path(name))


def test_overlaps_are_refused_with_lines_counts_and_the_way_to_allow_them() -> None:
    texts = sentences(20)
    train = example_set(lines_of(texts), "train.jsonl")
    held = example_set(lines_of([*texts[:7], texts[8].rsplit(" ", 1)[0], "other text"]), "held.jsonl")

    with pytest.raises(OverlapError) as caught:
        refuse_overlaps(train, held)
    message = str(caught.value)
    assert isinstance(caught.value, DataError) and len(caught.value.overlaps) == 8
    assert "8 of the 9 held-out examples in held.jsonl are in the training data train.jsonl" in message
    assert "(7 word for word, 1 nearly)" in message
    assert "held-out line 1, training line 1, 100 % alike" in message and "and 3 more" in message
    assert "--allow-overlap" in message
    assert len(refuse_overlaps(train, held, allow=True)) == 8
    assert refuse_overlaps(train, example_set([ask("other text")], "held.jsonl")) == []
