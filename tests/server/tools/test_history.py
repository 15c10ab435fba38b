"""Conversations with tools, as templates get them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loramux_adapters.chat.template import CompiledTemplate
from loramux_server.tools.calls import Tool
from loramux_server.tools.conventions import conventions_of
from loramux_server.tools.history import for_template, short_id
from support import tool_templates as templates

TOOLS = (Tool("weather", "Looks.", {"type": "object", "properties": {"city": {"type": "string"}}}), Tool("time"))
ARGUMENTS = '{"city": "Zürich \\"x\\"", "now": true}'


def call(name: str = "weather", arguments: str = ARGUMENTS, identity: str = "call_1") -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(*calls: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": None, "tool_calls": list(calls)},
        *({"role": "tool", "tool_call_id": each["id"], "content": f"result {each['id']}"} for each in calls),
    ]


def render(source: str, messages: list[dict[str, Any]], tools: tuple[Tool, ...] = TOOLS) -> str:
    told, arguments = for_template(conventions_of(source, templates.VARIABLES), messages, tools)
    return CompiledTemplate(source).render(told, templates.VARIABLES, arguments, generate=True)


@pytest.mark.parametrize("name", templates.FAMILIES)
def test_every_family_writes_tools_calls_and_results(name: str) -> None:
    text = render(templates.FAMILIES[name], conversation(call()))
    head, _, rest = text.partition("How is it?")

    assert "weather" in head + rest and "time" in text
    assert "weather" in rest and "result call_1" in rest
    if name == "qwen3_coder":
        assert '<parameter=city>\nZürich "x"\n</parameter>' in rest
    else:
        decoder = json.JSONDecoder()
        values = [
            decoder.raw_decode(rest, at)[0] for at, character in enumerate(rest) if rest[at:].startswith('{"city"')
        ]
        assert values == [json.loads(ARGUMENTS)]


@pytest.mark.parametrize("source", [templates.HERMES, templates.CONCATENATING, templates.GRANITE_3_0, templates.PLAIN])
def test_several_calls_of_one_turn_are_written(source: str) -> None:
    text = render(source, conversation(call(), call("time", "{}", "call_2")))

    assert '{"name": "weather", "arguments": {"city"' in text and '{"name": "time", "arguments": {}}' in text
    assert "result call_1" in text and "result call_2" in text


def test_several_calls_of_one_turn_become_turns_where_a_template_takes_one() -> None:
    messages = conversation(call(), call("time", "{}", "call_2"))
    messages[1]["content"] = "I look."
    later = [*messages, {"role": "assistant", "content": "Fine."}, *conversation(call("time", "{}", "call_1"))]
    told, _ = for_template(conventions_of(templates.LLAMA3, templates.VARIABLES), later, TOOLS)

    assert [
        message["role"] for message in told
    ] == "user assistant tool assistant tool assistant user assistant tool".split()
    assert [message["tool_call_id"] for message in told if message["role"] == "tool"] == ["call_1", "call_2", "call_1"]
    assert [message.get("content") for message in told if message["role"] == "assistant"] == [
        "I look.",
        "",
        "Fine.",
        "",
    ]
    text = render(templates.LLAMA3, later)
    assert text.index('"weather", "parameters"') < text.index("result call_1") < text.index('"time", "parameters"')


def test_results_without_a_call_stay_where_they_are() -> None:
    messages = conversation(call(), call("time", "{}", "call_2"))
    messages.append({"role": "tool", "tool_call_id": "call_9", "content": "lost"})
    del messages[3]
    told, _ = for_template(conventions_of(templates.LLAMA3, templates.VARIABLES), messages, TOOLS)

    assert [message.get("tool_call_id") for message in told] == [None, None, "call_1", None, "call_9"]


def test_arguments_that_a_template_concatenates_stay_as_they_were() -> None:
    odd = '{"b":1,  "a":2}'

    assert odd in render(templates.CONCATENATING, conversation(call(arguments=odd)))
    assert '{"b": 1, "a": 2}' in render(templates.GRANITE, conversation(call(arguments=odd)))


def test_arguments_that_are_no_object_stay_text() -> None:
    assert '"arguments": cut {' in render(templates.HERMES, conversation(call(arguments="cut {")))


def test_arguments_that_are_no_object_have_no_tags() -> None:
    source = templates.QWEN3_CODER.replace("{% if message.tool_calls %}", "{% if false %}").replace(
        "{% if tools %}", "{% if tools %}<tool_call><function=name>"
    )

    for arguments in ("cut {", "[1]"):
        assert "<function=weather>\n</function>" in render(source, conversation(call(arguments=arguments)))


def test_ids_of_calls_and_results_are_the_same_where_they_are_short() -> None:
    text = render(templates.MISTRAL, conversation(call(identity="call_0123456789abcdef")))
    short = short_id("call_0123456789abcdef")

    assert len(short) == 9 and short.isalnum()
    assert f'"id": "{short}"' in text and f'"call_id": "{short}"' in text
    assert short_id("a1B2c3D4e") == "a1B2c3D4e"
    assert short_id("call_2") != short_id("call_1")


def test_results_are_named() -> None:
    conventions = conventions_of(templates.HERMES)
    messages, _ = for_template(conventions, conversation(call(), call("time", "{}", "call_2")), TOOLS)

    assert [message.get("name") for message in messages[2:]] == ["weather", "time"]


def test_a_template_that_knows_no_tools_is_told_of_them_by_the_system() -> None:
    conventions = conventions_of(templates.PLAIN)
    messages, arguments = for_template(
        conventions, [{"role": "system", "content": "Be kind."}, *conversation(call())], TOOLS
    )

    assert arguments == {}
    assert messages[0]["role"] == "system" and messages[0]["content"].startswith("Be kind.\n\nYou can call")
    assert json.dumps(TOOLS[0].parameters) in messages[0]["content"]
    assert messages[2] == {"role": "assistant", "content": f'{{"name": "weather", "arguments": {ARGUMENTS}}}'}
    assert messages[3] == {"role": "user", "content": "Result of weather:\nresult call_1"}


def test_where_turns_alternate_and_no_system_speaks_it_fits_too() -> None:
    messages = [*conversation(call(), call("time", "{}", "call_2")), {"role": "user", "content": "And then?"}]
    told, _ = for_template(conventions_of(templates.GEMMA, templates.VARIABLES), messages, TOOLS)

    assert [message["role"] for message in told] == ["user", "assistant", "user"]
    assert told[0]["content"].startswith("You can call") and told[0]["content"].endswith("How is it?")
    assert "call_2\n\nAnd then?" in told[2]["content"]
    assert "And then?" in render(templates.GEMMA, messages)


def test_a_conversation_without_a_user_is_told_of_tools_too() -> None:
    messages = [{"role": "assistant", "content": "Hello."}]
    told, _ = for_template(conventions_of(templates.GEMMA, templates.VARIABLES), messages, TOOLS)

    assert [message["role"] for message in told] == ["user", "assistant"]


def test_without_tools_nothing_is_added() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]

    for source in (templates.PLAIN, templates.HERMES, templates.SMOLLM3):
        assert for_template(conventions_of(source), messages) == (messages, {})


def test_what_was_given_is_not_changed() -> None:
    messages = conversation(call())
    before = json.dumps(messages)
    for source in templates.FAMILIES.values():
        for_template(conventions_of(source, templates.VARIABLES), messages, TOOLS)

    assert json.dumps(messages) == before
