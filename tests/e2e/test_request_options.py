"""Options of requests against the real process: what they do to replies is what they say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.loader import load_base_model
from loramux_server.base.source import EMBEDDED_NAME, resolve_base
from loramux_server.engine.local_engine import LocalEngine
from support.real_adapters import ADAPTERS
from support.real_server import BASE, RealServer

TEXT = "The best way to learn a new language is"


@pytest.fixture(scope="module")
def tokenizer(embedded_cache: Path) -> Tokenizer:
    directory = resolve_base(EMBEDDED_NAME, embedded_cache, print).directory
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def in_process(embedded_cache: Path) -> Iterator[LocalEngine]:
    base = load_base_model(EMBEDDED_NAME, device=CpuDevice(), cache_dir=embedded_cache, report=lambda line: None)
    yield LocalEngine.open(base, rows=4, tokens=2048, max_rank=64, check=False)


def complete(server: RealServer, **fields: Any) -> dict[str, Any]:
    body = {"model": BASE, "prompt": TEXT, "max_tokens": 12, "temperature": 0} | fields
    with server.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def choice_of(server: RealServer, **fields: Any) -> dict[str, Any]:
    choice: dict[str, Any] = complete(server, **fields)["choices"][0]
    return choice


@pytest.mark.parametrize("adapter", [None, ADAPTERS[3]])
def test_the_log_probabilities_of_an_echo_are_those_in_process(
    server: RealServer,
    in_process: LocalEngine,
    tokenizer: Tokenizer,
    adapter_dirs: dict[str, Path],
    adapter: str | None,
) -> None:
    """As lm-eval asks for them (`local-completions`): batches of ids, one token that it takes off again."""
    texts = [(TEXT, " to speak it every day."), ("Water", " boils at 100 degrees"), ("2 + 2 =", " 4")]
    rows = [(tokenizer.encode(a).ids, tokenizer.encode(b).ids) for a, b in texts]
    loaded = None if adapter is None else in_process.load(adapter_dirs[adapter])
    expected = in_process.score(rows, loaded)
    asked: dict[str, Any] = {
        "model": adapter or BASE, "prompt": [a + b for a, b in rows], "logprobs": 1, "seed": 1234, "echo": True,
    }  # fmt: skip
    for max_tokens in (1, 0):
        choices = sorted(complete(server, **asked, max_tokens=max_tokens)["choices"], key=itemgetter("index"))
        for choice, (context, rest), scores, (a, b) in zip(choices, rows, expected, texts, strict=True):
            logprobs = choice["logprobs"]
            end = len(context) + len(rest)
            assert logprobs["token_logprobs"][len(context) : end] == scores
            assert len(logprobs["tokens"]) == end + max_tokens and logprobs["token_logprobs"][0] is None
            assert choice["text"].startswith(a + b) and "".join(logprobs["tokens"][:end]) == a + b
            for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
                assert choice["text"][offset:].startswith(token)
            for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
                assert max(top.values()) >= value


def test_a_prompts_log_probabilities_are_the_same_in_vllms_shape(server: RealServer, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT).ids
    echo = choice_of(server, echo=True, logprobs=2, max_tokens=0)["logprobs"]
    told = choice_of(server, prompt_logprobs=2, max_tokens=1)["prompt_logprobs"]
    assert told[0] is None
    for token, one, value, top in zip(
        ids[1:], told[1:], echo["token_logprobs"][1:], echo["top_logprobs"][1:], strict=True
    ):
        assert one[str(token)]["logprob"] == value
        assert {chance["decoded_token"]: chance["logprob"] for chance in one.values()} == top
        assert sorted(chance["rank"] for chance in one.values() if chance["rank"] is not None)[:2] == [1, 2]


def test_one_token_may_be_all_there_is(server: RealServer) -> None:
    choice = choice_of(server, prompt=[[500]], echo=True, logprobs=1, max_tokens=0)
    assert choice["logprobs"]["token_logprobs"] == [None] and choice["finish_reason"] == "length"
    assert choice_of(server, prompt=[[500]], echo=True, max_tokens=0)["text"] == choice["text"]


def test_ids_and_ends_are_told(server: RealServer, tokenizer: Tokenizer) -> None:
    free = choice_of(server, return_token_ids=True)
    assert free["prompt_token_ids"] == tokenizer.encode(TEXT).ids and len(free["token_ids"]) == 12
    assert tokenizer.decode(free["token_ids"]) == free["text"] and free["stop_reason"] is None
    end = free["token_ids"][5]
    first = free["token_ids"].index(end)
    stopped = choice_of(server, stop_token_ids=[end], return_token_ids=True)
    assert stopped["token_ids"] == free["token_ids"][: first + 1]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", end)
    shown = choice_of(server, stop_token_ids=[end], include_stop_str_in_output=True, logprobs=0)
    assert shown["text"] == "".join(shown["logprobs"]["tokens"]) == tokenizer.decode(free["token_ids"][: first + 1])
    word = free["text"].split()[2]
    by_text = choice_of(server, stop=word, include_stop_str_in_output=True)
    assert by_text["stop_reason"] == word and by_text["text"] == free["text"][: free["text"].index(word) + len(word)]


def test_replies_to_one_prompt_differ_by_their_seeds_and_come_again(server: RealServer) -> None:
    asked: dict[str, Any] = {"temperature": 1.0, "seed": 11, "n": 4, "prompt": [TEXT, "Water boils at"]}
    whole = complete(server, **asked)
    texts = [choice["text"] for choice in whole["choices"]]
    assert len({*texts[:4]}) == len({*texts[4:]}) == 4
    assert [choice["text"] for choice in complete(server, **asked)["choices"]] == texts
    alone = choice_of(server, temperature=1.0, seed=11)
    assert alone["text"] == texts[0]
    assert whole["usage"]["completion_tokens"] <= 8 * 12
    assert whole["usage"]["prompt_tokens"] == len(whole_ids(server, [TEXT, "Water boils at"]))


def whole_ids(server: RealServer, texts: Sequence[str]) -> list[int]:
    with server.client() as client:
        replies = [client.post("/tokenize", json={"prompt": text}).json() for text in texts]
    return [token for reply in replies for token in reply["tokens"]]


def test_replies_to_one_prompt_read_it_once(server: RealServer) -> None:
    """What the second to fourth need of the prompt is found, but for the last block or two."""
    prompt = " ".join(f"Rule {number}: never answer question {number % 7}." for number in range(30))
    length = len(whole_ids(server, [prompt]))
    before = server.metric("loramux_prefix_cache_hits_total")
    reply = complete(server, prompt=prompt, n=4, temperature=1.0, seed=1, max_tokens=2)
    assert reply["usage"]["prompt_tokens"] == length and reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    found = server.metric("loramux_prefix_cache_hits_total") - before
    assert 3 * (length - 32) <= found < 3 * length


def test_the_best_reply_is_the_likeliest_of_its_company(server: RealServer) -> None:
    asked: dict[str, Any] = {"temperature": 1.2, "seed": 5, "logprobs": 0, "ignore_eos": True}
    all_of_them = complete(server, **asked, n=4)["choices"]
    means = {sum(one["logprobs"]["token_logprobs"]) / 12: one["text"] for one in all_of_them}
    best = complete(server, **asked, best_of=4, n=2)
    assert [one["text"] for one in best["choices"]] == [means[mean] for mean in sorted(means, reverse=True)[:2]]
    assert best["usage"]["completion_tokens"] == 48


def test_penalties_choose_as_the_log_probabilities_say(server: RealServer) -> None:
    """The first token that a bias of the likeliest one's lead turns around, worked out from the reported chances."""
    top = choice_of(server, max_tokens=1, logprobs=2, return_token_ids=True)
    (first, second) = sorted(top["logprobs"]["top_logprobs"][0].values(), reverse=True)[:2]
    (token,) = top["token_ids"]
    lead = first - second
    for bias, changes in ((-lead - 0.01, True), (-lead + 0.01, False)):
        reply = choice_of(server, max_tokens=1, logit_bias={str(token): bias}, return_token_ids=True, logprobs=0)
        assert (reply["token_ids"] != [token]) == changes
    other = choice_of(server, max_tokens=1, logit_bias={str(token): -100}, return_token_ids=True)["token_ids"][0]
    assert choice_of(server, max_tokens=1, allowed_token_ids=[other], return_token_ids=True)["token_ids"] == [other]
    assert choice_of(server, max_tokens=1, bad_words=[top["text"]], return_token_ids=True)["token_ids"] == [other]


def test_a_reply_repeats_itself_less_where_that_costs(server: RealServer, tokenizer: Tokenizer) -> None:
    asked: dict[str, Any] = {
        "prompt": "la la la la la la",
        "max_tokens": 24,
        "return_token_ids": True,
        "ignore_eos": True,
    }

    def kinds(**fields: Any) -> int:
        return len({*choice_of(server, **asked, **fields)["token_ids"]})

    plain = kinds()
    assert plain < kinds(presence_penalty=2.0) and plain < kinds(frequency_penalty=2.0)
    assert plain < kinds(repetition_penalty=2.0)
    assert kinds(presence_penalty=0, frequency_penalty=0, repetition_penalty=1, logit_bias={}) == plain


def test_a_reply_is_at_least_so_long(server: RealServer) -> None:
    messages = [{"role": "user", "content": "Say only: yes"}]
    with server.client() as client:

        def ask(**fields: Any) -> dict[str, Any]:
            body = {"model": BASE, "messages": messages, "temperature": 0, "max_tokens": 60} | fields
            reply: dict[str, Any] = client.post("/v1/chat/completions", json=body).json()
            return reply

        free = ask(return_token_ids=True)
        length = free["usage"]["completion_tokens"]
        assert free["choices"][0]["finish_reason"] == "stop" and length < 50, "the test needs a reply that ends"
        longer = ask(min_tokens=length + 5)
        assert longer["usage"]["completion_tokens"] >= length + 5
        assert longer["choices"][0]["message"]["content"].startswith(free["choices"][0]["message"]["content"])
        end = free["choices"][0]["token_ids"][-1]
        shown = ask(skip_special_tokens=False, include_stop_str_in_output=True)["choices"][0]["message"]["content"]
        assert shown == free["choices"][0]["message"]["content"] + "<|im_end|>" and end > 0


def test_a_prompt_is_cut_on_request(server: RealServer, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT).ids
    cut = choice_of(server, truncate_prompt_tokens=5, return_token_ids=True)
    assert cut["prompt_token_ids"] == ids[-5:]
    assert cut["text"] == choice_of(server, prompt=ids[-5:])["text"]
    long = complete(server, prompt=TEXT * 500, truncate_prompt_tokens=-1, max_tokens=4)
    assert long["usage"]["prompt_tokens"] == 2048 - 4


def test_a_gap_is_refused_where_the_base_has_no_tokens_for_it(server: RealServer) -> None:
    with server.client() as client:
        reply = client.post("/v1/completions", json={"model": BASE, "prompt": "def f(", "suffix": "return x"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "suffix")


def test_a_salt_keeps_what_was_read_apart(server: RealServer) -> None:
    prompt = " ".join(f"Clause {number} is about {number % 9}." for number in range(30))

    def cached(**fields: Any) -> int:
        details = complete(server, prompt=prompt, max_tokens=1, **fields)["usage"]["prompt_tokens_details"]
        number: int = details["cached_tokens"]
        return number

    assert [cached(cache_salt="a"), cached(cache_salt="b"), cached()] == [0, 0, 0]
    assert cached(cache_salt="a") == cached() > 0


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SHAPES: list[tuple[dict[str, Any], Any]] = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}},
        PERSON,
    ),
    ({"guided_json": PERSON}, PERSON),
    ({"guided_json": json.dumps(PERSON)}, PERSON),
    ({"structured_outputs": {"json": PERSON}}, PERSON),
    ({"response_format": {"type": "json_object"}}, {"type": "object"}),
    ({"guided_json_object": True}, {"type": "object"}),
    ({"guided_regex": "[0-9]{3}-[a-f]{2}"}, re.compile("[0-9]{3}-[a-f]{2}")),
    ({"structured_outputs": {"regex": "(yes|no), sir"}}, re.compile("(yes|no), sir")),
    ({"guided_choice": ["red", "reddish", "blue"]}, ["red", "reddish", "blue"]),
    ({"guided_grammar": 'start: "<" WORD ">"\nWORD: /[a-z]{1,8}/'}, re.compile("<[a-z]{1,8}>")),
]


@pytest.mark.parametrize(
    ("fields", "shape"), SHAPES, ids=[f"{place}-{next(iter(one))}" for place, (one, _) in enumerate(SHAPES)]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_reply_has_the_shape_that_was_asked_for(
    server: RealServer, fields: dict[str, Any], shape: Any, temperature: float
) -> None:
    """Plain and streamed, in chat and completions, of an adapter, and each of several."""
    asked: dict[str, Any] = {
        "model": ADAPTERS[2], "prompt": "A person:", "temperature": temperature, "seed": 7, "max_tokens": 300, "n": 2,
        **fields,
    }  # fmt: skip
    choices = complete(server, **asked)["choices"]
    with server.client() as client:
        messages = [{"role": "user", "content": "Tell me."}]
        body = {**asked, "messages": messages}
        del body["prompt"]
        reply = client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        chat = reply.json()["choices"]
        lines = client.post("/v1/completions", json=asked | {"stream": True}).text.split("\n\n")
    streamed = ["", ""]
    for line in lines:
        if line.startswith("data: {"):
            part = json.loads(line.removeprefix("data: "))["choices"][0]
            streamed[part["index"]] += part["text"]
    assert streamed == [choice["text"] for choice in choices]
    texts = [(choice["finish_reason"], choice["text"]) for choice in choices]
    texts += [(choice["finish_reason"], choice["message"]["content"]) for choice in chat]
    for finish, text in texts:
        if finish == "length":
            assert shape == {"type": "object"}, "only an object without a schema has no end in sight"
        elif isinstance(shape, re.Pattern):
            assert shape.fullmatch(text), text
        elif isinstance(shape, list):
            assert text in shape
        else:
            jsonschema.validate(json.loads(text), shape)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_json": {"type": "nothing"}}, "guided_json"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_before_the_first_token(
    server: RealServer, fields: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        with server.client() as client:
            reply = client.post("/v1/completions", json={"model": BASE, "prompt": "x", "stream": stream} | fields)
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"].startswith(param)


def test_json_that_is_cut_says_so(server: RealServer) -> None:
    choice = choice_of(server, guided_json=PERSON, max_tokens=3)
    assert choice["finish_reason"] == "length" and choice["text"].startswith("{")


def test_shapes_and_penalties_go_together_and_alone_is_as_in_company(server: RealServer) -> None:
    asked: dict[str, Any] = {
        "guided_regex": "[abc]{20}", "presence_penalty": 1.0, "logit_bias": {"81": 2.0}, "temperature": 0.9, "seed": 3,
        "max_tokens": 30, "logprobs": 1,
    }  # fmt: skip
    alone = choice_of(server, **asked)
    assert re.fullmatch("[abc]{20}", alone["text"])
    with ThreadPoolExecutor(6) as pool:
        others = [{"seed": seed, "temperature": 1.0, "max_tokens": 40} for seed in range(5)]
        found = list(pool.map(lambda fields: choice_of(server, **fields), [*others[:3], asked, *others[3:]]))
    assert found[3] == alone
