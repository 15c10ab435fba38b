from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_server.api.completions.conversation import as_turns
from loramux_server.api.completions.request.chat import RESERVED_VARIABLES, parse_chat
from loramux_server.api.completions.request.completion import parse_completion
from loramux_server.api.completions.request.options import OPTIONS
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
    ("seed", True), ("max_tokens", 0), ("max_tokens", -2), ("max_tokens", 2**31), ("max_tokens", 10**30),
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
        (chat, "max_completion_tokens", 0), (chat, "max_completion_tokens", True), (completion, "logprobs", 21),
        (completion, "logprobs", True), (completion, "logprobs", -1), (completion, "max_completion_tokens", 5),
        (completion, "messages", []), (chat, "prompt", "x"), (completion, "add_generation_prompt", True),
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


def test_minus_one_is_the_default_length() -> None:
    assert chat(max_tokens=-1).longest_reply is chat(max_completion_tokens=-1).longest_reply is None
    assert chat(max_tokens=-1, max_completion_tokens=7).longest_reply == 7
    assert completion(max_tokens=-1).max_tokens is None


def test_stream_options_mean_nothing_without_a_stream() -> None:
    assert chat(stream_options={"include_usage": True}).stream is None
    assert not chat(stream_options={"include_usage": None, "include_obfuscation": False}).include_usage
    assert not chat(stream_options={"continuous_usage_stats": True}).continuous_usage
    assert chat(stream_options={"include_usage": True, "continuous_usage_stats": True}).continuous_usage
    with pytest.raises(RequestError, match=r"'stream_options\.include_obfuscation' is not supported"):
        chat(stream_options={"include_obfuscation": True})


@pytest.mark.parametrize("value", [True, 129, 0, -1, "1", 1.5, []])
def test_n_is_a_whole_number_within_bounds(value: object) -> None:
    assert [chat(n=number).replies for number in (None, 1, 1.0, 128)] == [1, 1, 1, 128]
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
        b"", b"nul", b"{", b"\xff\xfe", b"[" * 10_000, b'{"a":' * 10_000, b'{"model": "\\ud800"}', b"[]", b'"x"', b"1",
        b'{"model":"m","temperature":NaN}', b'{"model":"m","temperature":-Infinity}',
        b'{"model":"m","temperature":1e999}', b'{"model":"m","model":"m"}',
    ],
)  # fmt: skip
def test_a_body_that_is_no_plain_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError, match="JSON"):
        parse_chat(raw)


@pytest.mark.parametrize(
    ("value", "expected"), [
        (None, ()), ([], ()), ("", ()), ([""], ()), ("a", ("a",)), (["a", "", "bc"], ("a", "bc")),
        (["x"] * 16, ("x",) * 16),
    ],
)  # fmt: skip
def test_stop_is_a_string_or_a_list(value: object, expected: tuple[str, ...]) -> None:
    assert chat(stop=value).stop == expected


@pytest.mark.parametrize("value", [["x"] * 17, "x" * 257, [1], {"a": 1}, 5, [["a"]], ["a", None]])
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
        {"role": "robot", "content": "a"}, {"role": True, "content": "a"}, {"content": "a"}, "a", 1, None, [],
        {"role": "user", "content": "a", "tool_calls": [{}]}, {"role": "user", "content": "a", "name": 5},
        {"role": "system", "content": None}, {"role": "tool", "content": None, "refusal": "a"},
        {"role": "assistant", "content": None, "refusal": 5}, {"role": "user", "content": "a", "refusal": {}},
        {"role": "assistant", "content": None, "audio": {"id": "x"}}, {"role": "user", "content": "a", "extra": 1},
    ],
)  # fmt: skip
def test_a_wrong_message_is_refused_by_its_place(message: object) -> None:
    good = {"role": "user", "content": "a"}
    with pytest.raises(RequestError, match=r"'messages\.1") as caught:
        chat(messages=[good, message])
    assert (caught.value.code == "unsupported_value") == ("image_url" in str(message))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "developer", "content": "a"}, ("system", "a")),
        ({"role": "system", "content": [{"type": "text", "text": "a"}]}, ("system", "a")),
        ({"role": "user", "content": "a", "name": "Ann"}, ("user", "a")),
        ({"role": "tool", "content": "42", "tool_call_id": "call_1"}, ("tool", "42")),
        ({"role": "assistant", "content": "a", "refusal": None, "annotations": [], "audio": None, "tool_calls": None,
          "reasoning_content": "hm", "reasoning": None, "function_call": None}, ("assistant", "a")),
        ({"role": "assistant", "content": None}, ("assistant", "")),
        ({"role": "assistant"}, ("assistant", "")),
        ({"role": "assistant", "content": None, "refusal": "no"}, ("assistant", "no")),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, ("assistant", "no")),
        ({"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
         ("user", "a")),
        ({"role": "user", "content": "a", "cache_control": {"type": "ephemeral"}}, ("user", "a")),
    ],
)  # fmt: skip
def test_a_message_reaches_the_template_as_plain_text(message: object, expected: tuple[str, str]) -> None:
    (turn,) = as_turns(chat(messages=[message]).messages)
    assert (turn["role"], turn["content"]) == expected


def test_template_variables_are_passed_on_and_effort_is_one_of_them() -> None:
    assert chat().template_variables == chat(chat_template_kwargs={}, reasoning_effort=None).template_variables == {}
    assert chat(chat_template_kwargs={"enable_thinking": False}).template_variables == {"enable_thinking": False}
    effort = {"reasoning_effort": "low", "enable_thinking": True}
    assert chat(reasoning_effort="low").template_variables == effort
    given = chat(reasoning_effort="none", chat_template_kwargs={"enable_thinking": True}).template_variables
    assert given == {"reasoning_effort": "none", "enable_thinking": True}


@pytest.mark.parametrize(
    "variables",
    [{name: 1} for name in sorted(RESERVED_VARIABLES)]
    + [{"__class__": 1}, {"a b": 1}, {"": 1}, {f"v{i}": 1 for i in range(65)}, [], "x", 5],
)
def test_a_template_variable_that_is_not_the_callers_is_refused(variables: object) -> None:
    with pytest.raises(RequestError, match="'chat_template_kwargs'"):
        chat(chat_template_kwargs=variables)


def test_the_assistants_turn_is_opened_unless_the_caller_says_otherwise() -> None:
    opened = [chat(add_generation_prompt=value).opens_turn for value in (None, True, False)]
    assert opened == [True, True, False]


def test_all_that_is_wrong_is_told_at_once_up_to_a_number() -> None:
    with pytest.raises(RequestError) as caught:
        chat(watermarking=2, temprature=1, temperature=5, messages=[{"role": "user", "content": 5}] * 2048)
    message = str(caught.value)
    assert all(name in message for name in ("'watermarking'", "'temprature'", "'temperature'", "'messages.0.content'"))
    assert "messages.1" not in message and (caught.value.param, caught.value.code) == (
        "watermarking",
        "unsupported_parameter",
    )
    with pytest.raises(RequestError, match="; and 80 more$") as caught:
        chat(**{f"x{i}": 1 for i in range(100)})
    assert str(caught.value).count("unknown parameter") == 20
    with pytest.raises(RequestError) as caught:
        chat(**{"\U0001f600" * 1000 + str(i): 1 for i in range(100)})
    assert len(str(caught.value)) < 4000
    with pytest.raises(RequestError, match="'messages.0' has 1002 fields; at most 64 are taken"):
        chat(messages=[{"role": "user", "content": "a"} | {f"x{i}": 1 for i in range(1000)}])


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
NAMES = [name for name, _ in GOOD_NUMBERS] + [option.name for option in OPTIONS] + [
    "model", "messages", "logprobs", "top_logprobs", "stream_options", "prompt", "echo", "best_of",
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(set(NAMES))), JSON, max_size=4))
def test_no_json_does_anything_but_parse_or_be_refused(fields: dict[str, Any]) -> None:
    for parse in (chat, completion):
        try:
            parse(**fields)
        except RequestError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools.0", "a function stands in 'function'"),
        ({"tools": [{"name": "f", "input_schema": {}}]}, "tools.0", "a function stands in 'function'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "only tools of the type 'function' are served"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "args": {}}}]},
            "tools.0.function.args",
            "unknown parameter 'tools.0.function.args'",
        ),
        (
            {"response_format": {"type": "json_schema", "schema": {}}},
            "response_format",
            "'schema' stands in 'json_schema'",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"type": "object"}}},
            "response_format",
            "which are name, description, schema, strict",
        ),
    ],
)
def test_what_other_calls_have_in_another_form_is_refused_with_the_form_here(
    fields: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert said in str(caught.value)
