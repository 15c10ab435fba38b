"""The table of options: whole, and true of what the routes do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as CompletionParams

from loramux_server.api.completions.request.chat import ChatRequest, parse_chat
from loramux_server.api.completions.request.completion import CompletionRequest, parse_completion
from loramux_server.api.completions.request.elsewhere import OPENAI, VLLM, VLLM_EARLIER
from loramux_server.api.completions.request.options import OPTIONS, Option, documented
from loramux_server.errors import RequestError

ROUTES: dict[str, Any] = {"chat": (ChatRequest, parse_chat), "completions": (CompletionRequest, parse_completion)}
BODIES = {"chat": {"messages": [{"role": "user", "content": "hi"}]}, "completions": {"prompt": "hi"}}
UNSERVED = [(route, option) for option in OPTIONS for route in option.routes if not option.served]
LABELS: list[object] = ["text", True, {"a": "b"}]


def parse(route: str, **fields: object) -> Any:
    return ROUTES[route][1](json.dumps({"model": "m", **BODIES[route], **fields}).encode())


@pytest.mark.parametrize(
    ("route", "names"),
    [
        *OPENAI.items(), *VLLM.items(), ("chat", VLLM_EARLIER), ("completions", VLLM_EARLIER),
    ],
)  # fmt: skip
def test_every_option_of_openai_and_vllm_is_in_the_table(route: str, names: Any) -> None:
    assert sorted(set(names) - {option.name for option in OPTIONS if route in option.routes}) == []


@pytest.mark.parametrize(("route", "params"), [("chat", ChatParams), ("completions", CompletionParams)])
def test_the_options_of_openai_are_those_of_its_own_client(route: str, params: Any) -> None:
    assert OPENAI[route] == set(get_type_hints(params))


def test_an_option_stands_once_for_each_route() -> None:
    rows = [(route, option.name) for option in OPTIONS for route in option.routes]
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize("route", ROUTES)
def test_the_options_that_are_served_are_the_fields_of_the_schema(route: str) -> None:
    served = {option.name for option in OPTIONS if option.served and route in option.routes}
    assert served == set(ROUTES[route][0].model_fields)


@pytest.mark.parametrize(("route", "option"), UNSERVED, ids=lambda one: one if isinstance(one, str) else one.name)
def test_an_option_that_is_not_served_is_taken_where_it_changes_nothing(route: str, option: Option) -> None:
    nothing = parse(route)
    taken = [value for value in LABELS if option.label is not None and option.takes(value)]
    assert taken or option.label is None
    for value in [None, *option.neutral, *taken]:
        assert parse(route, **{option.name: value}) == nothing
    for value in ([["x"]], 10**20, {"x": ["y"] * 17}, "x" * 1000):
        if not option.takes(value):
            with pytest.raises(RequestError, match=f"'{option.name}'") as caught:
                parse(route, **{option.name: value})
            assert (caught.value.param, caught.value.code) == (option.name, "unsupported_parameter")
            assert option.about in str(caught.value)


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("chat", {"guided_json": None, "prompt_logprobs": None, "tool_choice": "auto", "tools": []}),
        ("chat", {"tool_choice": "none", "stop": "", "max_tokens": -1, "max_completion_tokens": None}),
        ("chat", {"chat_template_kwargs": {}, "add_generation_prompt": True, "skip_special_tokens": True}),
        ("chat", {"stream_options": {"include_usage": True}, "reasoning_effort": None, "n": 1, "logit_bias": {}}),
        ("chat", {"top_logprobs": 0, "logprobs": False, "parallel_tool_calls": False, "store": True}),
        ("completions", {"best_of": 1, "echo": False, "suffix": None, "stop": [], "max_tokens": None, "n": 1.0}),
    ],
)
def test_what_real_clients_send_without_meaning_anything_is_taken(route: str, fields: dict[str, Any]) -> None:
    parse(route, **fields)


@pytest.mark.parametrize(
    ("name", "value"), [("watermarking", 0), ("stream_interval", True), ("priority", False), ("use_beam_search", "1")]
)
def test_a_neutral_value_has_its_own_type(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"'{name}' is not supported except as"):
        parse("completions", **{name: value})


def test_the_documentation_has_this_table() -> None:
    page = (Path(__file__).parents[4] / "docs" / "api.md").read_text(encoding="utf-8")
    assert "\n".join(documented()) in page
