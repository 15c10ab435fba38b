"""POST /v1/responses, as the official client and programs see it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from loramux_server.api.description import responses as described
from loramux_server.api.responses.request import parse_response
from loramux_server.errors import RequestError, ServerBusy
from loramux_server.tools.reasoning import Reasoning
from support.fakes_api import BASE_NAME, FakeGrammars, Server, make_server

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
LOGPROBS = "message.output_text.logprobs"
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>'
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path, context=4096, grammars=FakeGrammars())


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx2.ASGITransport(server.app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport) as http:
        yield openai.AsyncOpenAI(api_key="x", base_url="http://localhost/v1", http_client=http, max_retries=0)


def replying(server: Server, text: str) -> None:
    server.engine.replies[None] = text.encode()


async def whole(server: Server, **fields: Any) -> dict[str, Any]:
    reply = await server.post("/v1/responses", {"model": BASE_NAME, "input": "hi", **fields})
    assert reply.status_code == 200, reply.text
    described.ResponseReply.model_validate_json(reply.content)
    Response.model_validate_json(reply.content)
    response: dict[str, Any] = reply.json()
    return response


async def streamed(server: Server, **fields: Any) -> list[dict[str, Any]]:
    """The events, each of which is what the official client takes it for."""
    text = (await server.post("/v1/responses", {"model": BASE_NAME, "input": "hi", "stream": True, **fields})).text
    events = []
    for number, block in enumerate(text.split("\n\n")[:-1]):
        kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}" and event["sequence_number"] == number
        assert EVENT.validate_python(event).type == event["type"]
        events.append(event)
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Their types, deltas in a row told once."""
    told = [event["type"].removeprefix("response.") for event in events]
    return [kind for at, kind in enumerate(told) if at == 0 or told[at - 1] != kind]


def without_ids(response: dict[str, Any]) -> Any:
    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            names = ("id", "call_id", "created_at", "completed_at")
            return {name: bare(item) for name, item in value.items() if name not in names}
        return [bare(item) for item in value] if isinstance(value, list) else value

    return bare(response)


@pytest.mark.anyio
async def test_a_text_is_answered_with_a_message(server: Server) -> None:
    response = await whole(server, metadata={"a": "b"}, instructions="be brief", max_output_tokens=100)
    (message,) = response["output"]
    assert (response["object"], response["status"], response["model"]) == ("response", "completed", BASE_NAME)
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    assert message["content"] == [{"type": "output_text", "text": "Hello world", "annotations": [], "logprobs": []}]
    usage = response["usage"]
    assert usage["output_tokens"] and usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert response["metadata"] == {"a": "b"} and response["instructions"] == "be brief" and not response["store"]
    assert server.tokenizer.conversations[-1] == [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"},
    ]  # fmt: skip
    assert server.engine.sequences[-1].params.max_tokens == 100


@pytest.mark.anyio
async def test_a_stream_has_openais_events(server: Server) -> None:
    events = await streamed(server)
    assert kinds(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert "".join(event["delta"] for event in events if "delta" in event) == "Hello world"
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    assert len({event["item_id"] for event in events if "item_id" in event} | {events[-2]["item"]["id"]}) == 1
    assert without_ids(events[-1]["response"]) == without_ids(await whole(server))


@pytest.mark.anyio
async def test_calls_are_items_whole_and_streamed(server: Server) -> None:
    replying(server, f"Let me look.\n{CALL}\n{CALL}")
    response = await whole(server, tools=[WEATHER])
    message, call, other = response["output"]
    assert message["content"][0]["text"] == "Let me look."
    assert (call["name"], call["arguments"], call["status"]) == ("weather", PARIS, "completed")
    assert call["id"].startswith("fc_") and call["call_id"] not in (other["call_id"], call["id"])
    assert response["tools"] == [WEATHER] and response["tool_choice"] == "auto"
    events = await streamed(server, tools=[WEATHER])
    one = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert kinds(events)[-9:] == [*one, *one, "completed"]
    assert without_ids(events[-1]["response"]) == without_ids(response)
    deltas = [event for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert {event["output_index"] for event in deltas} == {1, 2}
    assert "".join(event["delta"] for event in deltas) == PARIS + PARIS


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ["weather", "now"]), ({"type": "function", "name": "now"}, ["now"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}, ["now"]),
    ],
)  # fmt: skip
async def test_a_demanded_call_is_held_to_a_grammar(server: Server, choice: Any, names: list[str]) -> None:
    replying(server, CALL)
    tools = [WEATHER, {"type": "function", "name": "now", "parameters": None, "strict": None}]
    response = await whole(server, tools=tools, tool_choice=choice, parallel_tool_calls=False)
    assert response["tool_choice"] == choice and response["parallel_tool_calls"] is False
    grammars = server.deps.grammars
    assert isinstance(grammars, FakeGrammars)
    ((shape, param),) = grammars.asked
    assert param == "tools" and [name for name in ("weather", "now") if name in shape.value] == names


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ({"type": "text"}, None), ({"type": "json_object"}, "json_object"),
        ({"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}, "json_schema"),
    ],
)  # fmt: skip
async def test_a_text_may_have_a_shape(server: Server, form: dict[str, Any], kind: str | None) -> None:
    response = await whole(server, text={"format": form, "verbosity": None})
    grammar: Any = server.engine.sequences[-1].params.grammar
    assert (None if grammar is None else grammar.shape.kind) == kind and response["text"] == {"format": form}


@pytest.mark.anyio
async def test_what_was_thought_is_an_item_and_is_understood_again(server: Server) -> None:
    server.tokenizer.spoken = replace(server.tokenizer.spoken, reasoning=Reasoning("<think>", "</think>"))
    replying(server, "<think>\nHm.\n</think>\n\nIt rains.")
    response = await whole(server, reasoning={"effort": "low", "summary": "auto"})
    thought, message = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm."}] and thought["summary"] == []
    assert message["content"][0]["text"] == "It rains."
    assert 3 <= response["usage"]["output_tokens_details"]["reasoning_tokens"] < 25
    assert server.tokenizer.variables[-1] == {"reasoning_effort": "low", "enable_thinking": True}
    events = await streamed(server)
    assert kinds(events)[2:8] == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
        "output_item.done",
    ]  # fmt: skip
    await whole(
        server, input=[{"role": "user", "content": "hi"}, *response["output"], {"role": "user", "content": "?"}]
    )
    assert server.tokenizer.conversations[-1][1] == {
        "role": "assistant", "content": "It rains.", "reasoning_content": "Hm."
    }  # fmt: skip


@pytest.mark.anyio
async def test_the_client_holds_the_conversation(server: Server) -> None:
    replying(server, f"Let me look.\n{CALL}")
    output = (await whole(server, tools=[WEATHER]))["output"]
    answer = {"type": "function_call_output", "call_id": output[1]["call_id"], "output": "rain"}
    said = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
        {"role": "user", "content": "weather?"},
        *output,
        answer | {"output": [{"type": "input_text", "text": "rain"}], "status": "completed", "id": None},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": "It rains.", "id": "msg_1", "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": PARIS},
        answer | {"call_id": "c2"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "and"}]},
    ]
    await whole(server, input=said, instructions="Be brief.")
    system, user, called, told, again, told_again, last = server.tokenizer.conversations[-1]
    assert system == {"role": "system", "content": "Be brief.\n\nBe kind."}
    assert user["content"] == "weather?" and last == {"role": "user", "content": "and"}
    assert called["content"] == "Let me look."
    assert called["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    assert told == {"role": "tool", "content": "rain", "tool_call_id": output[1]["call_id"], "name": "weather"}
    assert again["content"] == "It rains." and again["tool_calls"][0]["id"] == "c2"
    assert told_again["tool_call_id"] == "c2"


def tokens_of(part: dict[str, Any]) -> str:
    return "".join(entry["token"] for entry in part["logprobs"])


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("asked", "top"),
    [({"include": [LOGPROBS], "top_logprobs": 2}, 2), ({"include": [LOGPROBS]}, 0), ({"top_logprobs": 1}, 1)],
)
async def test_log_probabilities_of_a_message_are_told_whole_and_streamed(
    server: Server, asked: dict[str, Any], top: int
) -> None:
    response = await whole(server, **asked)
    (part,) = response["output"][0]["content"]
    likeliest = [{"token": "A", "bytes": [65], "logprob": -1.0}, {"token": "B", "bytes": [66], "logprob": -2.0}]
    first = {"token": "H", "bytes": [72], "logprob": -0.5, "top_logprobs": likeliest[:top]}
    assert part["logprobs"][0] == first and tokens_of(part) == part["text"] == "Hello world"
    assert response["top_logprobs"] == top
    events = await streamed(server, **asked)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert all(tokens_of(event) == event["delta"] for event in deltas) and len(deltas) > 1
    bare = [{"token": one["token"], "logprob": one["logprob"]} for one in likeliest[:top]]
    assert deltas[0]["logprobs"][0] == {"token": "H", "logprob": -0.5, "top_logprobs": bare}
    (done,) = [event for event in events if event["type"] == "response.output_text.done"]
    assert done["logprobs"] == [entry for event in deltas for entry in event["logprobs"]]
    assert events[-1]["response"]["output"][0]["content"] == [part]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "reply",
    [
        f"<think>\nIt rains. <b\n</think>\n\nIt rains. <b> </thi <tool_cal\n{CALL}",
        f"<think>Hm.</think>{CALL}\nIt rains.",
        f"It rains.\n{CALL}\n{CALL}",
        'It <tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call> rains.',
        "Il pleut \N{CLOUD WITH RAIN}, <tool_call>",
    ],
)
async def test_tokens_of_thoughts_and_calls_are_no_message_s(server: Server, reply: str) -> None:
    server.tokenizer.spoken = replace(server.tokenizer.spoken, reasoning=Reasoning("<think>", "</think>"))
    replying(server, reply)
    response = await whole(server, tools=[WEATHER], include=[LOGPROBS])
    messages = [item for item in response["output"] if item["type"] == "message"]
    for message in messages:
        (part,) = message["content"]
        raw = bytes(byte for entry in part["logprobs"] for byte in entry["bytes"])
        assert raw.decode() == part["text"]
    assert messages
    replying(server, f"<think>Hm.</think>{CALL}")
    (_, call) = (await whole(server, tools=[WEATHER], include=[LOGPROBS]))["output"]
    assert call["type"] == "function_call"


@pytest.mark.anyio
async def test_half_a_character_at_the_end_has_its_tokens(server: Server) -> None:
    replying(server, "é")
    response = await whole(server, include=[LOGPROBS], max_output_tokens=1)
    (part,) = response["output"][0]["content"]
    assert part["text"] == "\ufffd" and [entry["bytes"] for entry in part["logprobs"]] == [[0xC3]]


@pytest.mark.anyio
async def test_a_response_that_is_cut_is_incomplete(server: Server) -> None:
    response = await whole(server, max_output_tokens=3)
    assert response["status"] == "incomplete" == response["output"][0]["status"]
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["usage"]["output_tokens"] == 3 and response["completed_at"] is None
    events = await streamed(server, max_output_tokens=3)
    assert events[-1]["type"] == "response.incomplete"
    assert without_ids(events[-1]["response"]) == without_ids(response)


@pytest.mark.anyio
async def test_a_reply_of_nothing_is_an_empty_message(server: Server) -> None:
    replying(server, "")
    assert (await whole(server))["output"][0]["content"][0]["text"] == ""
    assert kinds(await streamed(server))[-1] == "completed"


@pytest.mark.anyio
async def test_a_failure_in_mid_stream_is_its_last_events(server: Server) -> None:
    server.engine.error_after = 4
    events = await streamed(server)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-2]["message"] == "the step of this request failed" == events[-1]["response"]["error"]["message"]
    assert events[-1]["response"]["status"] == "failed" and not server.store.leased
    failed = await server.post("/v1/responses", {"model": BASE_NAME, "input": "hi"})
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "engine_error"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"), ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"), ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"), ({"prompt": {"id": "p"}}, "prompt"), ({"nothing": 1}, "nothing"),
        ({"include": ["nothing"]}, "include.0"), ({"include": "x"}, "include"), ({"top_logprobs": 21}, "top_logprobs"),
        ({"include": [LOGPROBS] * 17}, "include"),
        ({"input": []}, "input"), ({"input": 5}, "input"), ({"input": None}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": "x", "extra": 1}]}, "input.0.extra"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0.call_id"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[" * 99}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"), ({"tools": [WEATHER] * 2}, "tools.1.name"),
        ({"tool_choice": "required"}, "tool_choice"), ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "x"}, "tools": [WEATHER]}, "tool_choice"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"effort": "most"}}, "reasoning.effort"), ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "max_output_tokens"), ({"temperature": 3}, "temperature"),
        ({"metadata": {"a": 1}}, "metadata.a"), ({"input": "x" * 10_000}, "input"),
        ({"stream_options": {"include_usage": True}}, "stream_options.include_usage"),
    ],
)  # fmt: skip
async def test_a_refusal_names_its_parameter_as_it_is_called_here(
    server: Server, fields: dict[str, Any], param: str
) -> None:
    reply = await server.post("/v1/responses", {"model": BASE_NAME, "input": "hi", **fields})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param and len(error["message"]) < 600, error
    assert "messages" not in error["message"] and "response_format" not in error["message"]
    assert not server.engine.sequences and not server.store.leased


@pytest.mark.anyio
async def test_what_clients_send_without_meaning_anything_is_taken(server: Server) -> None:
    response = await whole(
        server, store=False, previous_response_id=None, truncation="disabled",
        include=["reasoning.encrypted_content", "file_search_call.results"],
        service_tier="auto", user="me", prompt_cache_key="k", max_tool_calls=3, background=False, tools=[],
        tool_choice="auto", parallel_tool_calls=True, stream_options={"include_obfuscation": False}, top_logprobs=0,
        text={}, reasoning={}, metadata=None,
    )  # fmt: skip
    assert response["status"] == "completed"


@pytest.mark.anyio
async def test_options_of_ours_and_adapters_work_here_too(server: Server) -> None:
    response = await whole(server, adapters=[{"name": "pirate", "scale": 0.5}], seed=4, top_k=3, min_p=0.1)
    params = server.engine.sequences[-1].params
    assert (params.seed, params.top_k, params.min_p) == (4, 3, 0.1)
    assert response["output"][0]["content"][0]["text"] == "Arr, matey"
    missing = await server.post("/v1/responses", {"model": "nobody", "input": "hi"})
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


class Place(BaseModel):
    city: str


@pytest.mark.anyio
async def test_the_official_client_does_not_notice(server: Server, client: openai.AsyncOpenAI) -> None:
    reply = await client.responses.create(model="pirate", input="hi")
    assert reply.output_text == "Arr, matey" and reply.usage is not None
    replying(server, f"Let me look.\n{CALL}")
    tools: list[Any] = [WEATHER]
    first = await client.responses.create(model=BASE_NAME, input="weather?", tools=tools)
    async with client.responses.stream(model=BASE_NAME, input="weather?", tools=tools) as stream:
        seen = {event.type async for event in stream}
        final = await stream.get_final_response()
    assert {"response.output_text.delta", "response.function_call_arguments.delta", "response.completed"} <= seen
    assert final.output_text == first.output_text
    call = final.output[1]
    assert call.type == "function_call" and call.arguments == PARIS
    history: list[Any] = [
        {"role": "user", "content": "weather?"},
        *(item.to_dict() for item in first.output),
        {"type": "function_call_output", "call_id": first.output[1].to_dict()["call_id"], "output": "rain"},
    ]
    await client.responses.create(model=BASE_NAME, input=history)
    assert [turn["role"] for turn in server.tokenizer.conversations[-1]] == ["user", "assistant", "tool"]
    replying(server, PARIS)
    parsed = await client.responses.parse(model=BASE_NAME, input="where?", text_format=Place)
    assert parsed.output_parsed == Place(city="Paris")
    chunks = [event async for event in await client.responses.create(model=BASE_NAME, input="hi", stream=True)]
    assert chunks[-1].type == "response.completed" and chunks[-1].response.output_text == PARIS


@pytest.mark.anyio
async def test_errors_are_of_the_clients_own_classes(server: Server, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(model=BASE_NAME, input="hi", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    server.engine.refusal = ServerBusy("the queue is full")
    with pytest.raises(openai.InternalServerError):
        await client.responses.create(model=BASE_NAME, input="hi", stream=True)


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("messages", [{"role": "user", "content": "x"}], "input"),
        ("max_tokens", 3, "max_output_tokens"),
        ("max_completion_tokens", 3, "max_output_tokens"),
        ("response_format", {"type": "text"}, "text.format"),
        ("reasoning_effort", "low", "reasoning.effort"),
    ],
)
def test_names_of_chat_completions_are_refused_with_the_name_here(name: str, value: object, ours: str) -> None:
    with pytest.raises(RequestError, match=f"'{name}' is not supported: `{ours}` is its name here"):
        parse_response(json.dumps({"model": "base", "input": "x", name: value}).encode())
