"""Replies, read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loramux_server.tools.calls import AddedTokens, WrittenCall
from loramux_server.tools.formats import CallFormat
from support.tool_replies import FORMATS, NO_CALLS, PARIS, THINK, TOOLS, WEATHER, WRITTEN, calls, read


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_read(name: str) -> None:
    got = read(name, [WRITTEN[name]])

    assert calls(got) == [("weather", PARIS), ("time", {})]
    assert [call[0] for call in got.calls] == ["id0", "id1"]
    assert got.content == ""


@pytest.mark.parametrize("name", FORMATS)
def test_text_around_calls_is_content(name: str) -> None:
    got = read(name, ["I look.\n\n" + WRITTEN[name] + "\nDone."])

    assert calls(got) == [("weather", PARIS), ("time", {})]
    assert got.content == "I look.\nDone."


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_writes_it_reads(name: str) -> None:
    arguments = {"city": 'a "b"\n</tool_call> {', "days": 3}
    text = CallFormat(name).write([WrittenCall("weather", json.dumps(arguments)), WrittenCall("time", "{}")])

    assert calls(read(name, [text])) == [("weather", arguments), ("time", {})]


@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "</tool_call>"},
        {"city": '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'},
        {"city": 'say "}" and \\ and \\" and {'},
        {"city": {"a": [{"b": [[], {}]}]}},
        {"city": "Zürich \U0001f600 \u2028"},
        {"city": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")},
        {"city": [1, -2.5e3, None, True]},
        {},
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_arguments_are_what_the_model_wrote(arguments: dict[str, Any], ascii_only: bool) -> None:
    text = json.dumps(arguments, ensure_ascii=ascii_only)
    for shape in (
        f'{{"name": "weather", "arguments": {text}}}',
        f'{{"arguments": {text}, "name": "weather"}}',
        f'{{"name":"weather","parameters":{text}}}',
        f'{{ "type": "function" ,\n "name": "weather" ,\n "arguments" : {text} , "id": "x" }}',
        f'{{"name": "weather", "arguments": {json.dumps(text)}}}',
        f'{{"arguments": {json.dumps(text, ensure_ascii=False)}, "name": "weather"}}',
    ):
        got = read("hermes", [f"<tool_call>{shape}</tool_call>"])
        assert [call[1:] for call in got.calls] == [("weather", text)], shape
        assert got.content == ""


def test_arguments_come_as_they_are_written() -> None:
    reader = CallFormat("hermes").reader(TOOLS)
    seen = [
        reader.add(piece) for piece in ('<tool_call>{"name": "weather", "arg', 'uments": {"city": "P', "ar", 'is"}')
    ]

    assert [[call.arguments for call in part.calls] for part in seen] == [[], ['{"city": "P'], ["ar"], ['is"}']]


def test_text_between_tags_comes_as_it_is_written() -> None:
    reader = CallFormat("qwen3_coder").reader(TOOLS)
    seen = [reader.add(piece) for piece in ("<tool_call><function=weather>\n<parameter=city>\nP", 'a"r', "i\ns</para")]

    assert [[call.arguments for call in part.calls] for part in seen] == [['{"city": "P'], ['a\\"r'], ["i\\ns"]]


def test_values_between_tags_have_the_types_of_the_schema() -> None:
    value = "3\n</parameter> no end\n</parameter>\n"
    got = read(
        "qwen3_coder",
        [
            f"<tool_call>\n<function=weather>\n<parameter=city>\n{value}\n</parameter>\n<parameter=days>\n3\n</parameter>"
            "<parameter=other>\nTrue\n</parameter>\n<parameter=more>\n[1, 2\n</parameter>\n</function>\n</tool_call>"
        ],
    )

    assert calls(got) == [("weather", {"city": value, "days": 3, "other": True, "more": "[1, 2"})]


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_only_looks_like_a_call_is_content_and_nothing_of_it_is_lost(text: str) -> None:
    got = read("hermes", [text])

    assert (got.content, got.calls) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        '{"city": "Paris"}',
        '{"name": "Paris", "arguments": {}}',
        '{"name": "time"}',
        'See {"name": "time", "parameters": {}}',
        "{",
        "{{}}",
        "def f():\n{\n}",
    ],
)
@pytest.mark.parametrize("name", ["llama3", "json"])
def test_a_bare_object_is_a_call_only_where_it_says_all(name: str, text: str) -> None:
    got = read(name, [text])

    assert (got.content, got.calls) == (text, [])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "time"}', "{}"),
        ('{"name": "time", "arguments": null}', "{}"),
        ('{"arguments": null, "name": "time"}', "{}"),
        ('{"name": "time", "arguments": ""}', "{}"),
        (r'{"name": "time", "arguments": "{\"a\": \"\u00e9\/\t\"}"}', '{"a": "é/\t"}'),
        (r'{"name": "time", "arguments": "{\ud83d\ude00}"}', "{\U0001f600}"),
        (r'{"name": "time", "arguments": "{\ud83d\ud83d\ude00}"}', "{\ufffd\U0001f600}"),
        (r'{"name": "time", "arguments": "{\ud83d\n\ude00}"}', "{\ufffd\n\ufffd}"),
        (r'{"name": "time", "arguments": "{\ud83da}"}', "{\ufffda}"),
        (r'{"name": "time", "arguments": "{\ud83d"}', "{\ufffd"),
        (r'{"name": "time", "arguments": "{\ud83d\u0041}"}', "{\ufffdA}"),
        ('time {"a": 1}', '{"a": 1}'),
    ],
)
def test_arguments_in_other_words(text: str, arguments: str) -> None:
    got = read("hermes", [f"<tool_call>{text}</tool_call>"])

    assert (got.content, got.calls) == ("", [("id0", "time", arguments)])


@pytest.mark.parametrize(
    ("text", "arguments", "content"),
    [
        ('{"name": "time", "arguments": "{\\uzz"}', "{", '\\uzz"}</tool_call>'),
        ('{"name": "time", "arguments": {"a": ]}}', '{"a": ', "]}}</tool_call>"),
        ('{"name": "time", "arguments": {}, "more": 1}', "{}", ', "more": 1}</tool_call>'),
        ('{"name": "time", "arguments": {}, "arguments": {}}', "{}", ', "arguments": {}}</tool_call>'),
        ('[{"name": "time", "arguments": {}} 5]', "{}", "5]</tool_call>"),
        ("<function=time>\nno tag", "{", "no tag</tool_call>"),
        ("<function=time>\n<other>", "{", "\n<other></tool_call>"),
    ],
)
def test_a_call_that_goes_wrong_ends_there(text: str, arguments: str, content: str) -> None:
    got = read("hermes", [f"<tool_call>{text}</tool_call>"])

    assert (got.content.lstrip(), got.calls) == (content.lstrip(), [("id0", "time", arguments)])


def test_a_value_may_follow_its_tag_on_the_same_line() -> None:
    values = "<parameter=city>Paris</parameter><parameter=x>NaN</parameter>"
    text = f"<tool_call><function=weather>{values}</function></tool_call>"

    assert calls(read("qwen3_coder", [text])) == [("weather", {"city": "Paris", "x": "NaN"})]


def test_a_bare_object_may_begin_a_line() -> None:
    got = read("json", [f"Let me see:\n{WEATHER}\n"])

    assert (got.content, calls(got)) == ("Let me see:", [("weather", PARIS)])


@pytest.mark.parametrize("name", ["llama3", "json"])
def test_a_bare_list_of_calls_is_read(name: str) -> None:
    got = read(name, [f'[{WEATHER}, {{"name": "time", "arguments": {{}}}}]'])

    assert (got.content, calls(got)) == ("", [("weather", PARIS), ("time", {})])
    for text in ("[1, 2]", "[x] done", '[{"name": "time"}]', "see [1]"):
        assert (read(name, [text]).content, read(name, [text]).calls) == (text, [])


def test_a_call_may_stand_in_a_fence() -> None:
    got = read("json", [f"```json\n{WEATHER}\n```", ' and ```json\n{"a": 1}\n```'])

    assert (got.content, calls(got)) == ('and ```json\n{"a": 1}\n```', [("weather", PARIS)])


def test_a_call_behind_one_that_is_none_is_read() -> None:
    got = read("hermes", ["<tool_call>\n<tool_call>\n" + WEATHER + "</tool_call>"])

    assert (got.content, calls(got)) == ("<tool_call>", [("weather", PARIS)])


def test_an_end_tag_may_be_missing() -> None:
    got = read("hermes", [f"<tool_call>{WEATHER}\n<tool_call>{WEATHER} bye"])

    assert (got.content, calls(got)) == ("bye", [("weather", PARIS)] * 2)


def test_what_does_not_fit_behind_arguments_is_content() -> None:
    got = read("hermes", ['<tool_call>{"name": "weather", "arguments": {"city": "Paris"}]}</tool_call>'])

    assert (got.content, calls(got)) == ("]}</tool_call>", [("weather", PARIS)])


def test_a_list_may_hold_what_is_no_call() -> None:
    got = read("mistral", [f'[TOOL_CALLS] [{WEATHER}, {{"name": "unknown", "arguments": {{}}}}]'])

    assert calls(got) == [("weather", PARIS)]
    assert got.content == ', {"name": "unknown", "arguments": {}}]'


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Par', '{"city": "Par'),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {}', "{}"),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {}}</tool_', "{}"),
        ("mistral_args", "[TOOL_CALLS]weather[ARGS]{", "{"),
        ("qwen3_coder", "<tool_call><function=weather>\n<parameter=city>\nPar", '{"city": "Par'),
    ],
)
def test_a_call_that_was_cut_keeps_its_arguments(name: str, text: str, arguments: str) -> None:
    got = read(name, [text])

    assert (got.content, got.calls) == ("", [("id0", "weather", arguments)])


@pytest.mark.parametrize("name", FORMATS)
def test_of_a_demanded_call_that_was_cut_nothing_is_content(name: str) -> None:
    """Without the demand, what is cut before it is a call is content, with every character."""
    for end in range(1, len(WRITTEN[name])):
        text = WRITTEN[name][:end]
        got = read(name, [text], demanded=True)
        free = read(name, [text])
        assert got.content == "" and got.calls == free.calls
        assert free.calls or free.content.strip() == text.strip()


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_where_one_is_asked_for(name: str) -> None:
    got = read(name, [WRITTEN[name]], parallel=False)

    assert (got.content, calls(got)) == ("", [("weather", PARIS)])


def test_special_tokens_are_never_content() -> None:
    added = AddedTokens({"[TOOL_CALLS]": 5, "[ARGS]": 6}, frozenset(("[TOOL_CALLS]", "[ARGS]")))
    got = read("mistral_args", ["a [TOOL_CALLS]unknown[ARGS]{} b"], added=added)

    assert (got.content, got.calls) == ("a unknown{} b", [])


def test_ids_are_new_for_each_call() -> None:
    for name, length in (("hermes", 29), ("mistral", 9)):
        reader = CallFormat(name).reader(TOOLS)
        ids = [call.id for call in reader.add(WRITTEN[name]).calls]
        assert len(set(ids)) == 2 and all(identity is not None and len(identity) == length for identity in ids)


# thinking


def test_thinking_is_set_apart_and_its_calls_are_no_calls() -> None:
    got = read(
        "hermes", [f"\n<think>\nI <tool_call>{WEATHER}</tool_call>?\n</think>\n\n{WRITTEN['hermes']}"], reasoning=THINK
    )

    assert got.reasoning == f"I <tool_call>{WEATHER}</tool_call>?"
    assert (got.content, calls(got)) == ("", [("weather", PARIS), ("time", {})])


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("<think>Hm.</think>Yes.", "Hm.", "Yes."),
        ("\n</think>\n\nYes.\n", "", "Yes.\n"),
        ("never ends\n", "never ends", ""),
        ("a <think> b</think> c </think>", "a <think> b", "c </think>"),
    ],
)
def test_thinking_that_the_prompt_opened(text: str, reasoning: str, content: str) -> None:
    got = read("hermes", [text], reasoning=THINK, opened=True)

    assert (got.reasoning, got.content) == (reasoning, content)


@pytest.mark.parametrize("text", ["Use <think> here.", "so </think> yes", "<thin", " x"])
def test_tags_within_an_answer_are_content(text: str) -> None:
    got = read("hermes", [text], reasoning=THINK)

    assert (got.reasoning, got.content) == ("", text)


def test_thinking_may_go_on_between_calls() -> None:
    got = read("hermes", [f"<think>a</think><tool_call>{WEATHER}</tool_call><think>b</think>c"], reasoning=THINK)

    assert (got.reasoning, got.content, len(got.calls)) == ("ab", "c", 1)


def test_a_reader_says_whether_it_is_in_the_thinking() -> None:
    reader = CallFormat("hermes").reader((), reasoning=THINK)
    states = []
    for piece in ("\n", "<think>", "a", "</think>", "b"):
        reader.add(piece)
        states.append(reader.thinking)

    assert states == [False, True, True, False, False]


def test_without_tools_only_thinking_is_read() -> None:
    text = f"<think>a</think>{WRITTEN['hermes']}"
    got = read("hermes", [text], reasoning=THINK, tools=())

    assert (got.reasoning, got.content, got.calls) == ("a", WRITTEN["hermes"], [])


def test_a_value_that_is_nested_too_deeply_to_be_json_is_a_text() -> None:
    value = "[" * 5000
    text = f"<tool_call><function=weather><parameter=x>{value}</parameter></function></tool_call>"
    assert calls(read("qwen3_coder", [text])) == [("weather", {"x": value})]
