from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_server.api.completions.schemas import parse_chat, parse_completion
from loramux_server.errors import RequestError

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> Any:
    return parse_chat(json.dumps(CHAT | fields).encode())


def completion(**fields: Any) -> Any:
    return parse_completion(json.dumps(COMPLETION | fields).encode())


GOOD_NUMBERS = [
    ("temperature", 0), ("temperature", 2), ("temperature", 0.7), ("top_p", 1), ("top_p", 1e-9), ("top_k", -1),
    ("top_k", 0), ("top_k", 50), ("min_p", 0), ("min_p", 1), ("seed", -(2**63)), ("seed", 2**63 - 1),
    ("max_tokens", 1), ("max_tokens", None), ("temperature", None), ("stop", None), ("stream", None), ("seed", None),
]  # fmt: skip
BAD_NUMBERS = [
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", True), ("temperature", "1"), ("temperature", 10**400),
    ("top_p", 0), ("top_p", -1), ("top_p", 1.01), ("top_p", [1]), ("top_k", -2), ("top_k", 1.5), ("top_k", 2**31),
    ("top_k", False), ("min_p", -0.1), ("min_p", 1.1), ("seed", 2**63), ("seed", -(2**63) - 1), ("seed", 1.0),
    ("seed", True), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2**31), ("max_tokens", 10**30),
    ("max_tokens", True), ("max_tokens", "8"), ("stream", 1), ("stream", "true"), ("ignore_eos", 1),
]  # fmt: skip


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize(("name", "value"), GOOD_NUMBERS)
def test_a_value_in_range_is_taken(parse: Any, name: str, value: object) -> None:
    assert getattr(parse(**{name: value}), name) in (value, ())


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize(("name", "value"), BAD_NUMBERS)
def test_a_value_out_of_range_is_refused_by_name(parse: Any, name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"'{name}'") as caught:
        parse(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("parse", "name", "value"),
    [
        (chat, "top_logprobs", 21), (chat, "top_logprobs", -1), (chat, "top_logprobs", 2), (chat, "logprobs", 1),
        (chat, "max_completion_tokens", 0), (chat, "max_completion_tokens", True), (completion, "logprobs", 6),
        (completion, "logprobs", True), (completion, "logprobs", -1), (completion, "max_completion_tokens", 5),
        (completion, "messages", []), (chat, "prompt", "x"), (chat, "stream_options", {"include_usage": True}),
    ],
)  # fmt: skip
def test_the_two_endpoints_have_their_own_options(parse: Any, name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"'{name}'"):
        parse(**{name: value})


def test_log_probabilities_are_asked_for_in_each_endpoints_own_way() -> None:
    assert chat().alternatives is None
    assert chat(logprobs=True).alternatives == 0
    assert chat(logprobs=True, top_logprobs=20).alternatives == 20
    assert completion(logprobs=0).alternatives == 0
    assert completion().alternatives is None


def test_max_tokens_has_two_names_in_chat_that_must_agree() -> None:
    assert chat(max_tokens=3).longest_reply == 3
    assert chat(max_completion_tokens=4).longest_reply == 4
    assert chat(max_tokens=4, max_completion_tokens=4).longest_reply == 4
    with pytest.raises(RequestError, match="differ"):
        chat(max_tokens=3, max_completion_tokens=4)


UNSUPPORTED = [
    ("n", 1, 2), ("frequency_penalty", 0, 0.5), ("presence_penalty", 0.0, -1), ("repetition_penalty", 1.0, 1.1),
    ("logit_bias", {}, {"50256": -100}), ("min_tokens", 0, 5), ("user", "someone", 5), ("metadata", {}, {"a": 1}),
]  # fmt: skip
UNSUPPORTED_CHAT = UNSUPPORTED + [
    ("response_format", {"type": "text"}, {"type": "json_object"}), ("tools", [], [{}]),
    ("tool_choice", "none", "auto"), ("functions", [], [{}]), ("function_call", "none", "auto"),
    ("parallel_tool_calls", True, False),
    ("modalities", ["text"], ["audio"]), ("store", False, True), ("service_tier", "auto", "flex"),
    ("audio", None, {}), ("reasoning_effort", None, "low"), ("chat_template", None, "{{ x }}"),
    ("chat_template_kwargs", None, {}), ("prediction", None, {}), ("web_search_options", None, {}),
]  # fmt: skip
UNSUPPORTED_COMPLETION = UNSUPPORTED + [("best_of", 1, 20), ("echo", False, True), ("suffix", "", "x")]


@pytest.mark.parametrize(
    ("parse", "name", "neutral", "value"),
    [(chat, *row) for row in UNSUPPORTED_CHAT] + [(completion, *row) for row in UNSUPPORTED_COMPLETION],
)
def test_an_unsupported_option_is_taken_only_where_it_changes_nothing(
    parse: Any, name: str, neutral: object, value: object
) -> None:
    assert parse(**{name: neutral}) == parse(**{name: None}) == parse()
    with pytest.raises(RequestError, match=f"'{name}' is not supported yet") as caught:
        parse(**{name: value})
    assert (caught.value.param, caught.value.code) == (name, "unsupported")


@pytest.mark.parametrize("value", [True, 10**6, -1, "1", 1.5, []])
def test_more_than_one_choice_is_refused_whatever_its_type(value: object) -> None:
    with pytest.raises(RequestError, match="'n'"):
        chat(n=value)


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="unknown parameter 'temprature'") as caught:
        chat(temprature=1)
    assert (caught.value.param, caught.value.code) == ("temprature", "unknown_parameter")


@pytest.mark.parametrize("name", ["x" * 10**5, "a\r\nb: c", "\u202e", "0x7f"])
def test_the_name_of_an_unknown_option_is_quoted_harmlessly(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**{name: 1})
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable() and str(caught.value).isascii()


@pytest.mark.parametrize(("missing", "body"), [("model", {"messages": CHAT["messages"]}), ("messages", {"model": "m"})])
def test_a_missing_option_is_named(missing: str, body: object) -> None:
    with pytest.raises(RequestError, match=f"missing parameter '{missing}'"):
        parse_chat(json.dumps(body).encode())


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"nul", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"model": "\\ud800"}', b"[]", b'"x"',
        b"1", b'{"model":"m","seed":' + b"9" * 100_000 + b"}", b'{"model":"m","temperature":NaN}',
        b'{"model":"m","temperature":-Infinity}',
    ],
)  # fmt: skip
def test_a_body_that_is_no_plain_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError, match="JSON"):
        parse_chat(raw)


def test_infinity_by_another_name_is_refused() -> None:
    raw = json.dumps(CHAT).encode()[:-1] + b', "temperature": 1e999}'
    with pytest.raises(RequestError, match="'temperature'"):
        parse_chat(raw)


@pytest.mark.parametrize(
    ("value", "expected"), [(None, ()), ([], ()), ("a", ("a",)), (["a", "bc"], ("a", "bc")), (["x"] * 16, ("x",) * 16)]
)
def test_stop_is_a_string_or_a_list(value: object, expected: tuple[str, ...]) -> None:
    assert chat(stop=value).stop == expected


@pytest.mark.parametrize("value", ["", [""], ["x"] * 17, "x" * 257, [1], {"a": 1}, 5, [["a"]], ["a", None]])
def test_a_wrong_stop_is_refused(value: object) -> None:
    with pytest.raises(RequestError, match="'stop'"):
        chat(stop=value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), (" ", [" "])],
)
def test_a_prompt_has_four_forms(value: object, expected: object) -> None:
    assert completion(prompt=value).prompt == expected


@pytest.mark.parametrize(
    "value", ["", [], [[]], [""], ["a", ""], [[1], []], None, 5, {}, [True], [1, "a"], ["a", [1]], [[1.5]], [[True]]]
)
def test_a_prompt_that_is_empty_or_of_no_such_form_is_refused(value: object) -> None:
    with pytest.raises(RequestError, match="'prompt'"):
        completion(prompt=value)


def test_the_number_of_prompts_is_bounded() -> None:
    assert len(completion(prompt=["a"] * 64).prompt) == 64
    with pytest.raises(RequestError, match="at most 64"):
        completion(prompt=["a"] * 65)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("a", "a"), ([{"type": "text", "text": "a"}], "a"), ([{"type": "text", "text": t} for t in "ab"], "a\nb")],
)
def test_a_message_is_a_text_or_a_list_of_texts(content: object, expected: str) -> None:
    assert chat(messages=[{"role": "user", "content": content}]).messages[0].content == expected


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": []},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        {"role": "user", "content": [{"type": "text", "text": 1}]},
        {"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}, {"role": "user", "content": ["a"]},
        {"role": "user", "content": [{"type": "text", "text": "a"}] * 257},
        {"role": "tool", "content": "a"}, {"role": True, "content": "a"}, {"content": "a"}, "a", 1, None, [],
        {"role": "user", "content": "a", "tool_calls": [{}]}, {"role": "user", "content": "a", "name": "x"},
        {"role": "user", "content": "a", "extra": 1},
    ],
)  # fmt: skip
def test_a_wrong_message_is_refused_by_its_place(message: object) -> None:
    good = {"role": "user", "content": "a"}
    with pytest.raises(RequestError, match=r"'messages\.1"):
        chat(messages=[good, message])


def test_a_message_that_was_an_earlier_reply_is_taken_as_it_came() -> None:
    earlier: dict[str, Any] = {
        "role": "assistant",
        "content": "a",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": None,
    }
    assert chat(messages=[earlier]).messages[0].content == "a"


def test_the_number_of_messages_is_bounded() -> None:
    for count in (0, 2049):
        with pytest.raises(RequestError, match="'messages'"):
            chat(messages=[{"role": "user", "content": "a"}] * count)


@pytest.mark.parametrize("model", ["", "x" * 513, None, 5, ["m"]])
def test_a_wrong_model_is_refused(model: object) -> None:
    with pytest.raises(RequestError, match="'model'"):
        chat(model=model)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
OPTIONS = [name for name, *_ in GOOD_NUMBERS + UNSUPPORTED_CHAT] + [
    "model", "messages", "logprobs", "top_logprobs", "stream_options", "prompt", "echo", "best_of",
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(set(OPTIONS))), JSON, max_size=4))
def test_no_json_does_anything_but_parse_or_be_refused(fields: dict[str, Any]) -> None:
    for parse in (chat, completion):
        try:
            parse(**fields)
        except RequestError as error:
            assert str(error).isprintable()
