"""Tools with the real process, on a base that has learned of none: demanded calls come, and match their schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from jsonschema import validate

from support.real_adapters import ADAPTERS
from support.real_server import BASE, RealServer

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"$ref": "#/$defs/city"},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Paris", "Rome", "Oslo </tool_call>"]}},
    },
}
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "get_time"}}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
MESSAGES: list[Any] = [{"role": "user", "content": "What is the weather in Rome for the next 3 days?"}]


@pytest.fixture(scope="module")
def client(server: RealServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="unused", base_url=f"{server.url}/v1", max_retries=0, timeout=300) as client:
        yield client


def ask(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    asked = {"model": model, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 200, "temperature": 0} | fields
    return client.chat.completions.create(**asked)


def check_call(function: Any) -> None:
    arguments = json.loads(function.arguments)
    if function.name == "get_weather":
        validate(arguments, WEATHER["parameters"])
    else:
        assert (function.name, arguments) == ("get_time", {})


@pytest.mark.parametrize("model", [BASE, ADAPTERS[3]])
@pytest.mark.parametrize(("choice", "finish"), [("required", "tool_calls"), (NAMED, "stop")])
def test_a_demanded_call_comes_and_matches_its_schema(
    client: openai.OpenAI, model: str, choice: Any, finish: str
) -> None:
    reply = ask(client, model, tool_choice=choice, parallel_tool_calls=False).choices[0]
    assert reply.finish_reason == finish and reply.message.content is None
    (call,) = reply.message.tool_calls
    assert choice == "required" or call.function.name == "get_weather"
    check_call(call.function)
    with client.chat.completions.stream(
        model=model, messages=MESSAGES, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=200,
        temperature=0,
    ) as stream:  # fmt: skip
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == finish and streamed.message.tool_calls is not None
    (again,) = streamed.message.tool_calls
    assert (again.function.name, again.function.arguments) == (call.function.name, call.function.arguments)


def test_sampled_calls_in_company_all_match_their_schemas(client: openai.OpenAI) -> None:
    def one(seed: int) -> Any:
        model = ADAPTERS[seed % len(ADAPTERS)]
        return ask(client, model, tool_choice="required", temperature=1.0, seed=seed, max_tokens=64, n=2)

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(one, range(4)))
    calls = 0
    for choice in (choice for reply in replies for choice in reply.choices):
        assert choice.finish_reason in ("tool_calls", "length")
        for call in choice.message.tool_calls[: None if choice.finish_reason == "tool_calls" else -1]:
            check_call(call.function)
            calls += 1
    assert calls


def test_the_answer_to_a_call_is_taken(client: openai.OpenAI) -> None:
    reply = ask(client, BASE, tool_choice=NAMED).choices[0].message
    answer = {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": '{"sky": "clear"}'}
    said = ask(client, BASE, messages=[*MESSAGES, reply.to_dict(), answer], tool_choice="none", max_tokens=16)
    assert said.choices[0].message.content and said.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    "parameters",
    [{"type": "object", "properties": {"a": {"type": "nothing"}}}, {"type": "object", "required": 5}],
)
def test_a_schema_that_is_none_is_refused_before_the_first_token(client: openai.OpenAI, parameters: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, BASE, tools=tools, tool_choice="required", stream=stream)
        assert refused.value.param == "tools"


def test_a_response_calls_and_its_stream_says_the_same(client: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", "strict": None, **WEATHER}]
    asked: dict[str, Any] = {
        "model": ADAPTERS[1], "input": MESSAGES, "tools": tools, "tool_choice": "required", "temperature": 0,
        "parallel_tool_calls": False, "max_output_tokens": 200,
    }  # fmt: skip
    reply = client.responses.create(**asked)
    (call,) = reply.output
    assert reply.status == "completed" and call.type == "function_call"
    validate(json.loads(call.arguments), WEATHER["parameters"])
    events = list(client.responses.create(**asked, stream=True))
    final = events[-1]
    assert final.type == "response.completed" and final.response.output[0].to_dict()["arguments"] == call.arguments
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments


def test_a_reply_goes_on_where_the_last_message_ends(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": ADAPTERS[2], "temperature": 0, "max_tokens": 24}
    choice = client.chat.completions.create(messages=MESSAGES, logprobs=True, **asked).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    tokens = [entry.token for entry in choice.logprobs.content]
    said = "".join(tokens[:10])
    rest = client.chat.completions.create(
        messages=[*MESSAGES, {"role": "assistant", "content": said}],
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
        **asked | {"max_tokens": 24 - 10},
    )
    assert rest.choices[0].message.content == "".join(tokens[10:])
