"""What chat templates do with tools."""

from __future__ import annotations

import time

import pytest

from loramux_adapters.errors import TemplateFailed
from loramux_server.tools.calls import AddedTokens
from loramux_server.tools.conventions import Conventions, conventions_of
from loramux_server.tools.reasoning import Reasoning
from support import tool_templates as templates


def found(source: str | None) -> Conventions:
    return conventions_of(source, templates.VARIABLES)


@pytest.mark.parametrize("name", templates.FAMILIES)
def test_the_format_is_what_the_template_writes(name: str) -> None:
    assert found(templates.FAMILIES[name]).format.name == name


@pytest.mark.parametrize("name", sorted(set(templates.FAMILIES) - {"smollm3", "json"}))
def test_templates_that_write_calls_are_given_calls(name: str) -> None:
    conventions = found(templates.FAMILIES[name])

    assert conventions.writes_calls and conventions.takes_results and conventions.tools_argument == "tools"
    assert conventions.arguments == "object"
    assert conventions.short_ids == name.startswith("mistral")


def test_arguments_are_strings_where_the_template_puts_them_as_they_are() -> None:
    conventions = found(templates.CONCATENATING)

    assert (conventions.format.name, conventions.arguments) == ("hermes", "string")


def test_a_template_may_describe_tools_and_write_no_calls() -> None:
    granite, smollm3 = found(templates.GRANITE_3_0), found(templates.SMOLLM3)

    assert (granite.format.name, granite.tools_argument, granite.writes_calls) == ("granite", "tools", False)
    assert (smollm3.format.name, smollm3.tools_argument, smollm3.writes_calls) == ("smollm3", "xml_tools", False)


@pytest.mark.parametrize("source", [None, templates.PLAIN, templates.FOREIGN, templates.GEMMA])
def test_where_no_call_can_be_read_the_tools_are_described_by_us(source: str | None) -> None:
    conventions = found(source)

    assert (conventions.format.name, conventions.tools_argument) == ("json", None)
    assert not conventions.writes_calls and not conventions.takes_results
    assert conventions.takes_system == (source != templates.GEMMA)


def test_a_template_without_words_for_calls_goes_by_its_tokens() -> None:
    source = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}" + templates.PLAIN
    names = {
        token: conventions_of(source, templates.VARIABLES, AddedTokens({token: 7})).format.name
        for token in ("<|tool_call|>", "<tool_call>", "[TOOL_CALLS]", "<s>")
    }

    assert list(names.values()) == ["granite", "hermes", "mistral", "json"]


def test_one_call_a_turn_is_seen() -> None:
    singles = {name for name, source in templates.FAMILIES.items() if found(source).single_calls}

    assert singles == {"llama3"}


def test_the_tags_of_thinking_are_found() -> None:
    thinking = Reasoning("<think>", "</think>")

    assert found(templates.THINKING).reasoning == found(templates.SMOLLM3).reasoning == thinking
    assert found(templates.HERMES).reasoning is None


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<think>a</think> b<|im_start|>assistant\n", False),
        ("say <think> to me<|im_start|>assistant\n", False),
        ("", False),
    ],
)
def test_a_prompt_may_end_inside_the_thinking(prompt: str, opened: bool) -> None:
    assert Reasoning("<think>", "</think>").opened_by(prompt) is opened


def test_special_tokens_that_a_reader_needs_are_shown() -> None:
    added = AddedTokens({"[TOOL_CALLS]": 5, "[ARGS]": 6, "<s>": 1}, frozenset(("[TOOL_CALLS]", "[ARGS]", "<s>")))

    assert conventions_of(templates.MISTRAL_ARGS, templates.VARIABLES, added).format.shown == {"[TOOL_CALLS]", "[ARGS]"}
    assert conventions_of(templates.HERMES, templates.VARIABLES, added).format.shown == frozenset()
    think = AddedTokens({"<think>": 7, "</think>": 8}, frozenset(("<think>", "</think>")))
    assert conventions_of(templates.THINKING, templates.VARIABLES, think).shown == {"<think>", "</think>"}


def test_a_template_that_takes_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux_server.tools.conventions.MAX_SECONDS", 0.05)
    slow = "{% for turn in range(20000) %}{% set x = turn * 2 %}{% endfor %}" + templates.HERMES

    with pytest.raises(TemplateFailed, match="take longer than 0.05 seconds"):
        conventions_of(slow, templates.VARIABLES)


@pytest.mark.parametrize("filling", ["{", '{"a":', "[{", '"'])
def test_a_template_that_writes_a_lot_takes_no_longer(filling: str) -> None:
    for times, found_behind in ((3000, True), (50_000, False)):
        lots = templates.HERMES.replace("\n<tool_call>", "{{ " + repr(filling) + f" * {times} }}}}\n<tool_call>")
        started = time.thread_time()
        conventions = conventions_of(lots, templates.VARIABLES)

        assert conventions.writes_calls == found_behind and time.thread_time() - started < 4


def test_what_is_no_template_is_refused() -> None:
    with pytest.raises(TemplateFailed):
        conventions_of("{% for %}")
