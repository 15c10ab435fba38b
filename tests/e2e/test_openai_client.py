"""The official client against the real process: it must not notice that this is not OpenAI."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionMessageParam

from loramux_server.base.source import EMBEDDED_NAME, resolve_base
from support.real_adapters import ADAPTERS
from support.real_server import BASE, RealServer

TEXT = "The best way to learn a new language is"
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You are a story teller."},
    {"role": "user", "content": "Tell a long story about a fisherman and his cat."},
]
CONTEXT = 2048


@pytest.fixture(scope="module")
def client(server: RealServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="unused", base_url=f"{server.url}/v1", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def ids(embedded_cache: Path) -> list[int]:
    """`TEXT` in tokens of the base."""
    from tokenizers import Tokenizer

    directory = resolve_base(EMBEDDED_NAME, embedded_cache, print).directory
    encoded: list[int] = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXT).ids
    return encoded


def counts(usage: CompletionUsage | None) -> tuple[int, int, int]:
    """Tokens of prompt, reply and both."""
    assert usage is not None
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def test_a_chat_says_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": ADAPTERS[1],
        "messages": MESSAGES,
        "max_tokens": 12,
        "temperature": 0.7,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 2,
    }
    reply = client.chat.completions.create(**asked)
    choice = reply.choices[0]
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "length" and reply.usage is not None
    assert (reply.object, reply.model, reply.usage.completion_tokens) == ("chat.completion", ADAPTERS[1], 12)
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert b"".join(bytes(t.bytes or []) for t in choice.logprobs.content).decode() == choice.message.content
    for entry in choice.logprobs.content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob >= max(entry.logprob, entry.top_logprobs[1].logprob)

    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == choice.message.content
    assert [part.choices[0].finish_reason for part in parts][-2:] == [None, "length"]
    assert all(part.usage is None for part in parts)
    assert last.choices == [] and counts(last.usage) == counts(reply.usage)
    assert last.usage is not None and last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens, "the same prompt was asked a moment ago"
    streamed = [entry for part in parts if part.choices[0].logprobs for entry in part.choices[0].logprobs.content or []]
    assert streamed == choice.logprobs.content


def test_a_completion_says_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": BASE, "prompt": TEXT, "max_tokens": 10, "temperature": 0, "logprobs": 2}
    reply = client.completions.create(**asked)
    choice = reply.choices[0]
    assert (reply.object, choice.finish_reason, choice.index) == ("text_completion", "length", 0)
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs
    assert logprobs.text_offset is not None and logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == choice.text
    assert all(choice.text.startswith(*pair) for pair in zip(logprobs.tokens, logprobs.text_offset, strict=True))
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == value == max(top.values()), "greedy takes the most likely"

    chunks = list(client.completions.create(**asked, stream=True))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks), "nobody asked for usage"
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    values = [v for c in chunks if c.choices[0].logprobs for v in c.choices[0].logprobs.token_logprobs or []]
    assert values == logprobs.token_logprobs


def test_a_stop_string_may_lie_across_tokens(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": ADAPTERS[0], "prompt": TEXT, "max_tokens": 14, "temperature": 0, "logprobs": 0}
    free = client.completions.create(**asked).choices[0]
    assert free.logprobs is not None and free.logprobs.tokens is not None
    tokens = free.logprobs.tokens
    border = next(i for i in range(3, len(tokens)) if len(tokens[i - 1]) > 1 and len(tokens[i]) > 1)
    stop = tokens[border - 1][-1] + tokens[border][:2]
    expected = free.text[: free.text.index(stop)]
    reply = client.completions.create(**asked, stop=["never said", stop])
    choice = reply.choices[0]
    assert (choice.text, choice.finish_reason) == (expected, "stop")
    assert reply.usage is not None and reply.usage.completion_tokens < 14, "the rest must not be generated"
    chunks = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected, "no part of a stop string may be sent"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_prompt_may_be_text_or_token_ids_and_one_or_many(client: openai.OpenAI, ids: list[int]) -> None:
    def ask(prompt: Any, **more: Any) -> Any:
        return client.completions.create(model=ADAPTERS[2], prompt=prompt, max_tokens=6, temperature=0, **more)

    one = ask(TEXT)
    assert counts(one.usage) == (len(ids), 6, len(ids) + 6)
    other = ask("Water boils at").choices[0].text
    assert ask(ids).choices[0].text == one.choices[0].text != other
    many = ask([TEXT, "Water boils at", TEXT])
    assert [(c.index, c.text) for c in many.choices] == list(
        enumerate([one.choices[0].text, other, one.choices[0].text])
    )
    assert many.usage.completion_tokens == 18
    assert [choice.text for choice in ask([ids, ids]).choices] == [one.choices[0].text] * 2
    texts = ["", ""]
    for chunk in ask([TEXT, "Water boils at"], stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [one.choices[0].text, other]


def test_a_model_may_be_named_in_four_ways(server: RealServer, client: openai.OpenAI) -> None:
    name = ADAPTERS[1]
    digest = server.adapters()[name]["version"]

    def ask(model: str) -> tuple[str, str, Any]:
        raw = client.completions.with_raw_response.create(
            model=model, prompt=TEXT, max_tokens=4, temperature=0, logprobs=0
        )
        reply = raw.parse()
        assert reply.model == model
        return raw.headers["x-loramux-adapter-version"], reply.choices[0].text, reply.choices[0].logprobs

    named = ask(name)
    assert named[0] == digest
    assert ask(f"{BASE}:{name}") == ask(f"{name}@{digest[:8]}") == ask(f"{BASE}:{name}@{digest}") == named
    version, _, logprobs = ask(BASE)
    assert version == "base" and logprobs != named[2]


def test_replies_carry_an_id_and_times(client: openai.OpenAI) -> None:
    create = client.completions.with_raw_response.create
    given = create(model=BASE, prompt=TEXT, max_tokens=2, extra_headers={"x-request-id": "mine-1"}).headers
    assert given["x-request-id"] == "mine-1"
    assert 0 <= float(given["x-loramux-queue-ms"]) <= float(given["x-loramux-ttft-ms"])
    ids = {create(model=BASE, prompt=TEXT, max_tokens=1).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2 and all(made.startswith("req-") for made in ids)


def test_models_are_the_base_and_its_adapters(server: RealServer, client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert listed.keys() == {BASE, *ADAPTERS}
    shown = client.models.retrieve(ADAPTERS[3]).to_dict()
    assert shown == listed[ADAPTERS[3]].to_dict()
    assert (shown["parent"], shown["root"]) == (BASE, server.adapters()[ADAPTERS[3]]["version"])
    assert listed[BASE].to_dict()["parent"] is None


@pytest.mark.parametrize("model", ["nobody", f"{BASE}:nobody", f"{ADAPTERS[0]}@{'0' * 8}", "../../etc/passwd", "a b"])
def test_an_unknown_model_is_not_found(client: openai.OpenAI, model: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as error:
            client.completions.create(model=model, prompt=TEXT, stream=stream)
        assert (error.value.code, error.value.type) == ("model_not_found", "invalid_request_error")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(model)


BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": ["fine", ""]}, "prompt", "invalid_value"),
    ({"prompt": [0] * CONTEXT}, "prompt", "context_length_exceeded"),
    ({"prompt": "word " * CONTEXT}, "prompt", "context_length_exceeded"),
    ({"prompt": [10**7]}, "prompt", "invalid_value"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": -2}, "max_tokens", "invalid_value"),
    ({"max_tokens": CONTEXT}, "max_tokens", "context_length_exceeded"),
    ({"max_tokens": 10**30}, "max_tokens", "invalid_value"),
    ({"temperature": 2.5}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"logprobs": 21}, "logprobs", "invalid_value"),
    ({"stop": ["x"] * 17}, "stop", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 10**6}, "n", "invalid_value"),
    ({"prompt": ["a"] * 64, "n": 3}, "n", "invalid_value"),
    ({"best_of": 1, "n": 2}, "best_of", "invalid_value"),
    ({"suffix": "."}, "suffix", "unsupported_value"),
    ({"frequency_penalty": 2.5}, "frequency_penalty", "invalid_value"),
    ({"logit_bias": {"50": 101}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"49152": 1}}, "logit_bias", "invalid_value"),
    ({"extra_body": {"guided_regex": "("}}, "guided_regex", "invalid_value"),
    ({"extra_body": {"guided_json": {"not": {}}}}, "guided_json", "unsupported_value"),
    ({"extra_body": {"use_beam_search": True}}, "use_beam_search", "unsupported_parameter"),
]


@pytest.mark.parametrize(("changes", "param", "code"), BAD_COMPLETIONS, ids=lambda value: str(value)[:40])
def test_a_bad_completion_is_refused_by_name(
    client: openai.OpenAI, changes: dict[str, Any], param: str, code: str | None
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(**{"model": ADAPTERS[0], "prompt": TEXT, "stream": stream} | changes)
        assert (error.value.param, error.value.code) == (param, code)
        assert param in error.value.message or code in ("context_length_exceeded", "unsupported_value")


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": "word " * CONTEXT}]}, "messages"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": CONTEXT}, "max_tokens"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"n": 129}, "n"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"stream_options": {"continuous_usage": True}}, "stream_options.continuous_usage"),
    ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, "chat_template_kwargs"),
    ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
]


@pytest.mark.parametrize(("changes", "param"), BAD_CHATS, ids=lambda value: str(value)[:40])
def test_a_bad_chat_is_refused_by_name(client: openai.OpenAI, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{"model": BASE, "messages": MESSAGES} | changes)
    assert error.value.param == param


def test_tokens_are_counted_as_a_reply_counts_them(server: RealServer, client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model=ADAPTERS[0], messages=MESSAGES, max_tokens=1)
    completion = client.completions.create(model=BASE, prompt=TEXT, max_tokens=1)
    with server.client() as http:
        told = http.post("/tokenize", json={"model": ADAPTERS[0], "messages": MESSAGES}).json()
        closed = http.post("/tokenize", json={"messages": MESSAGES, "add_generation_prompt": False}).json()
        text = http.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True}).json()
        back = http.post("/detokenize", json={"tokens": text["tokens"]}).json()
        turns = http.post("/detokenize", json={"tokens": told["tokens"]}).json()["prompt"]
    assert chat.usage is not None and told["count"] == len(told["tokens"]) == chat.usage.prompt_tokens
    assert closed["tokens"] == told["tokens"][: closed["count"]] and closed["count"] < told["count"]
    assert completion.usage is not None and text["count"] == completion.usage.prompt_tokens
    assert back == {"prompt": TEXT} and "".join(text["token_strs"]) == TEXT
    assert MESSAGES[-1]["content"] in turns and "<|im_start|>" in turns


def test_thirty_two_streams_over_sixteen_adapters(server: RealServer, client: openai.OpenAI) -> None:
    """One unbounded and one with a stop string for each adapter; each as the same request says it alone."""
    asked: list[dict[str, Any]] = []
    expected: list[tuple[str, str]] = []
    for index, model in enumerate(ADAPTERS):
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": 8 + index % 5,
            "temperature": 0.6 * (index % 2),
            "seed": index,
        }
        alone = client.chat.completions.create(**body, messages=MESSAGES).choices[0]
        text = alone.message.content or ""
        assert alone.finish_reason in ("length", "stop") and len(text) > 8
        stop = text[len(text) // 2 :][:4]
        asked += [body, body | {"stop": stop}]
        expected += [(text, alone.finish_reason), (text[: text.index(stop)], "stop")]
    together = threading.Barrier(len(asked))

    def stream(body: dict[str, Any]) -> tuple[str, str]:
        together.wait(60)
        text, finish_reasons = "", []
        with client.chat.completions.create(**body, messages=MESSAGES, stream=True) as chunks:
            for chunk in chunks:
                (choice,) = chunk.choices
                text += choice.delta.content or ""
                finish_reasons += [choice.finish_reason] if choice.finish_reason else []
        (finish_reason,) = finish_reasons
        return text, finish_reason

    largest = server.scrape()["loramux_batch_adapters_bucket"]
    with ThreadPoolExecutor(len(asked)) as pool:
        replies = list(pool.map(stream, asked))
    now = server.scrape()["loramux_batch_adapters_bucket"]
    steps = {float(dict(key)["le"]): now[key] - largest[key] for key in now}
    assert steps[float("inf")] > steps[12.0], "no step had more than 12 adapters"
    assert replies == expected, json.dumps([*zip(replies, expected, strict=True)])
