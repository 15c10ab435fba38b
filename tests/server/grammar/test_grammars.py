"""Grammars are compiled within bounds and kept; hostile ones end with an error, soon."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loramux_adapters.artifact.own_tokens import OwnToken, OwnTokens
from loramux_server.errors import GrammarFailed, RequestError, ServerBusy
from loramux_server.grammar.grammars import Grammars
from loramux_server.grammar.limits import GrammarLimits
from loramux_server.grammar.shape import Shape
from support.grammar_walks import bytes_tokenizer, grammars_of, tokens_in

OBJECT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    made = Grammars(bytes_tokenizer(), num_workers=2)
    yield made
    made.close()


def count_compiled(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    compiled: list[str] = []
    compile_one = grammars._compile

    def counted(text: str, *others: Any) -> Any:
        compiled.append(text)
        return compile_one(text, *others)

    monkeypatch.setattr(grammars, "_compile", counted)
    return compiled


def write(grammar: Any, text: str) -> list[list[int]]:
    """What was allowed at each place of this reply."""
    allowed = []
    for token in bytes_tokenizer().encode(text, special=False):
        allowed.append(tokens_in(grammar.mask()).tolist())
        grammar.advance(token)
    return allowed


def test_a_grammar_is_compiled_once_for_sequences_after_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patient = GrammarLimits(kept_spent_seconds=60.0)  # however slow this machine is
    grammars = Grammars(bytes_tokenizer(), patient, num_workers=2)
    compiled = count_compiled(grammars, monkeypatch)
    seen = []
    for text in ('{"a": "b"}', '{"a": "', '{"a": "b"}'):
        grammar = grammars.of(Shape("json_schema", OBJECT), "p")
        seen.append(write(grammar, text))
        kept = weakref.ref(grammar)
        del grammar
        while kept() is not None:  # a thread may still be making its next mask
            gc.collect()
            time.sleep(0.01)
    grammars.close()

    assert len(compiled) == 1
    assert seen[0] == seen[2]
    assert seen[0][:6] == seen[1][:6]


def test_sequences_at_once_have_an_automaton_each(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = count_compiled(grammars, monkeypatch)
    together = [grammars.of(Shape("json_schema", OBJECT), "p") for _ in range(3)]

    assert len(compiled) == 3
    for text, grammar in zip(("{", '{"a"', '{"a":"x'), together, strict=True):
        write(grammar, text)
    assert tokens_in(together[0].mask()).tolist() != tokens_in(together[2].mask()).tolist()


def test_a_grammar_that_failed_is_not_kept(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = count_compiled(grammars, monkeypatch)
    for _ in range(2):
        grammar = grammars.of(Shape("choice", ["a"]), "p")
        with pytest.raises(GrammarFailed):
            grammar.advance(bytes_tokenizer().encode("b", special=False)[0])
        del grammar
        gc.collect()

    assert len(compiled) == 2


def test_what_is_kept_is_bounded() -> None:
    grammars = Grammars(bytes_tokenizer(), replace(GrammarLimits(), kept_bytes=20_000, kept_copies=2))
    try:
        for number in range(40):
            together = [grammars.of(Shape("choice", [f"{number}"]), "p") for _ in range(4)]
            for grammar in together:
                grammar.mask()
            del together, grammar
        gc.collect()
        kept = [len(idle) for idle in grammars._idle.values()]
        assert kept and max(kept) <= 2
        assert grammars._kept_bytes() <= 20_000
        assert len(kept) < 20
    finally:
        grammars.close()


def test_few_are_kept_of_all_grammars_together_and_none_that_took_long() -> None:
    """What a kept one holds is what its automaton has grown to, and does not follow from the length of its text."""
    for limits, expected in (
        (GrammarLimits(kept_matchers=5), 5),
        (GrammarLimits(kept_matchers=50), 12),
        (GrammarLimits(kept_spent_seconds=-1.0), 0),
    ):
        grammars = Grammars(bytes_tokenizer(), limits)
        try:
            for number in range(12):
                grammars.of(Shape("choice", [f"{number}"]), "p").mask()
            gc.collect()
            assert sum(map(len, grammars._idle.values())) == expected
        finally:
            grammars.close()


def test_the_time_of_all_replies_counts_for_what_is_kept() -> None:
    grammars = Grammars(bytes_tokenizer(), GrammarLimits(kept_spent_seconds=1e9))
    try:
        before = 0.0
        for _ in range(3):
            grammar = grammars.of(Shape("choice", ["ab"]), "p")
            grammar.advance(bytes_tokenizer().encode("a", special=False)[0])
            grammar.mask()
            del grammar
            gc.collect()
            [[(_, used)]] = grammars._idle.values()
            assert used.seconds > before
            before = used.seconds
    finally:
        grammars.close()


def test_grammars_are_made_and_followed_on_many_threads_at_once(grammars: Grammars) -> None:
    wrong: list[BaseException] = []

    def follow(number: int) -> None:
        try:
            for _ in range(20):
                write(grammars.of(Shape("json_schema", OBJECT), "p"), '{"a": "b"}')
                write(grammars.of(Shape("choice", [f"x{number}"]), "p"), f"x{number}")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_compiler_that_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(bytes_tokenizer(), replace(GrammarLimits(), compile_seconds=0.05, queue_seconds=0.05))
    done = threading.Event()

    def slow(text: str, vocabulary: Any, begun: threading.Event) -> Any:
        begun.set()
        done.wait(10)

    monkeypatch.setattr(grammars, "_compile", slow)
    try:
        for _ in range(2):
            with pytest.raises(RequestError, match="takes longer than 0.05 s to compile"):
                grammars.of(Shape("choice", ["a"]), "p")
        with pytest.raises(ServerBusy, match="compiles the grammars of other requests"):
            grammars.of(Shape("choice", ["a"]), "p")
    finally:
        done.set()
        grammars.close()


def doubling(way: str) -> dict[str, Any]:
    def two(name: str) -> dict[str, Any]:
        references = [{"$ref": f"#/$defs/{name}"}] * 2
        return {"allOf": references} if way == "allOf" else {"type": "array", "prefixItems": references, "minItems": 2}

    return {
        "$defs": {**{f"a{i}": two(f"a{i + 1}") for i in range(30)}, "a30": {"type": "object"}},
        "$ref": "#/$defs/a0",
    }


def option(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}


HOSTILE: dict[str, tuple[Any, Any]] = {
    "an enum of thousands": ("json_schema", {"enum": [f"value {i}" for i in range(4000)]}),
    "a long string": ("json_schema", {"type": "string", "maxLength": 1_000_000}),
    "a string of a least length": ("json_schema", {"type": "string", "minLength": 100_000}),
    "a list of a least length": ("json_schema", {"type": "array", "minItems": 100_000}),
    "doubling by allOf": ("json_schema", doubling("allOf")),
    "doubling by items": ("json_schema", doubling("items")),
    "a product of anyOf": (
        "json_schema",
        {"allOf": [{"anyOf": [option(f"p{i}_{j}") for j in range(10)]} for i in range(12)]},
    ),
    "an anyOf of thousands": ("json_schema", {"anyOf": [option(f"k{i}") for i in range(3000)]}),
    "a thousand properties": ("json_schema", {"properties": {f"p{i}": True for i in range(1000)}}),
    "patterns by the hundred": (
        "json_schema",
        {"properties": {f"p{i}": {"type": "string", "pattern": f"(a|b)*a(a|b){{{10 + i % 9}}}"} for i in range(200)}},
    ),
    "an automaton of 2 ** 60 states": ("regex", "(a|b)*a(a|b){60}"),
    "forced text of 10 ** 9 bytes": ("regex", "((a{1000}){1000}){1000}"),
    "nested counts": ("regex", "((a{0,1000}b){0,1000}c){0,1000}"),
    "classes with counts": ("regex", "([^a]{0,3000}[^b]{0,3000}){0,3000}"),
    "optional letters": ("regex", "(a?){1000}a{1000}"),
    "letters of all scripts": ("regex", r"(\p{L}\p{N}|\w+\d*)*(\p{L}\p{N}|\w+\d*)*(\p{L}\p{N}|\w+\d*)*"),
    "thousands of choices": ("choice", [f"word {i}" for i in range(4000)]),
    "a long choice": ("choice", ["x" * 60_000, "x" * 60_000 + "y"]),
    "forced text by another option": ("lark", '%llguidance {"no_forcing": false}\nstart: /((a{1000}){1000}){1000}/'),
    "an ambiguous grammar": ("lark", 'start: e\ne: e e | "a" | ""'),
    "doubling rules": (
        "lark",
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1}? r{i + 1}?" for i in range(40)) + '\nr40: "a"',
    ),
    "negated patterns": (
        "lark",
        "start: T\nT: /(?s:.*)/ & ~/(?s:.*)(a|b)*a(a|b){20}(?s:.*)/ & ~/(?s:.*)b.{20}c(?s:.*)/",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_shapes_end_soon_or_go_on_in_bounded_steps(name: str) -> None:
    kind, value = HOSTILE[name]
    rng = np.random.default_rng(3)
    begun = time.thread_time() + time.process_time()
    slowest = 0.0
    try:
        grammar: Any = grammars_of().of(Shape(kind, value), "p")
        for _ in range(60):
            before = time.process_time()
            allowed = [token for token in tokens_in(grammar.mask()) if token != 257]
            if not allowed:
                break
            grammar.advance(int(rng.choice(allowed)))
            slowest = max(slowest, time.process_time() - before)
            if grammar.ended:
                break
    except (RequestError, GrammarFailed) as error:
        assert 20 < len(str(error)) < 500
    assert slowest < 1.5
    assert time.thread_time() + time.process_time() - begun < 10


def test_llguidance_is_not_imported_before_it_is_needed() -> None:
    program = "import sys, loramux_server.grammar.grammars; print('llguidance' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )

    assert said.stdout.strip() == "False"


def test_a_grammar_that_no_reply_can_begin_is_refused(grammars: Grammars) -> None:
    end = min(grammars.prepare().stop_ids)
    with pytest.raises(RequestError, match="no token of the base may come first"):
        grammars.of(Shape("lark", f'start: <[{end}]> "a"'), "guided_grammar")


OWN = OwnTokens((OwnToken(258, "@@call"), OwnToken(259, "<|done|>", special=True)), (("eos_token", "<|done|>"),))


@pytest.mark.parametrize("shape", [Shape("regex", "(@@call)+"), Shape("lark", 'start: "@@call"+')])
def test_a_shape_is_written_in_the_tokens_of_the_adapter_and_ends_with_its_end(
    grammars: Grammars, shape: Shape
) -> None:
    own, bare = grammars.of(shape, "p", OWN), grammars.of(shape, "p")
    at, *others = bytes_tokenizer().encode("@@call", special=False)
    assert tokens_in(own.mask()).tolist() == [at, 258]
    assert tokens_in(bare.mask()).tolist() == [at]
    own.advance(258)
    for token in (at, *others):
        bare.advance(token)
    assert tokens_in(own.mask()).tolist() == [at, 257, 258, 259]
    assert tokens_in(bare.mask()).tolist() == [at, 257], "to the base no other token ends a reply"


def test_a_grammar_is_kept_for_the_tokens_it_was_made_for(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, shape = count_compiled(grammars, monkeypatch), Shape("choice", ["@@call"])
    for own in (OWN, None, OWN, None):
        grammars.of(shape, "p", own).mask()
        gc.collect()
    assert len(compiled) == 2


def test_tokens_of_the_adapters_that_asked_last_are_kept_and_their_grammars_with_them(grammars: Grammars) -> None:
    shape = Shape("regex", "a+")
    several = [OwnTokens((OwnToken(258, f"@@{number}"),)) for number in range(7)]
    running = grammars.of(shape, "p", several[0])
    for own in (None, *several):
        grammars.of(shape, "p", own).mask()
        gc.collect()
    assert len(grammars._spoken) == 5 and None in grammars._spoken
    assert {number for number, _ in grammars._idle} == {spoken.number for spoken in grammars._spoken.values()}
    write(running, "aa")  # what is in use goes on
    del running
    gc.collect()
    assert {number for number, _ in grammars._idle} == {spoken.number for spoken in grammars._spoken.values()}
