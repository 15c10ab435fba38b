"""Tools in chat: offered in a request, told to the template, called in a reply, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from loramux_server.errors import RequestError
from loramux_server.tools.calls import AddedTokens
from loramux_server.tools.conventions import Conventions
from loramux_server.tools.formats import CallFormat
from loramux_server.tools.reasoning import Reasoning
from support.fakes_api import BASE_NAME, FakeGrammars, Server, make_server

MESSAGES = [{"role": "user", "content": "weather?"}]
WEATHER = {
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now"}}]
NAMED = {"type": "function", "function": {"name": "weather"}}
PARIS, ROME = '{"city": "Paris"}', '{"city": "Rome </tool_call>"}'
ONE = f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>'
TWO = f'Let me look.\n{ONE}\n<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call>'


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path, context=4096, grammars=FakeGrammars())


def grammars(server: Server) -> FakeGrammars:
    assert isinstance(server.deps.grammars, FakeGrammars)
    return server.deps.grammars


def replying(server: Server, text: str) -> None:
    server.engine.replies[None] = text.encode()


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": BASE_NAME, "messages": MESSAGES, "tools": TOOLS, **fields}


async def whole(server: Server, **fields: Any) -> dict[str, Any]:
    reply = await server.post("/v1/chat/completions", asked(**fields))
    assert reply.status_code == 200, reply.text
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


async def deltas(server: Server, **fields: Any) -> tuple[list[dict[str, Any]], str]:
    """Every delta of a stream, and the finish reason."""
    text = (await server.post("/v1/chat/completions", asked(stream=True, **fields))).text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    return [choice["delta"] for choice in choices], choices[-1]["finish_reason"]


def put_together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A message of a stream's deltas, as a client puts it together."""
    message: dict[str, Any] = {"content": None, "calls": []}
    for delta in parts:
        for name in ("content", "reasoning_content"):
            if delta.get(name) is not None:
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(message["calls"]) and call["function"]["arguments"] == ""
                message["calls"].append((call["function"]["name"], ""))
            else:
                assert call.keys() == {"index", "function"} and call["function"].keys() == {"arguments"}
                name, arguments = message["calls"][call["index"]]
                message["calls"][call["index"]] = (name, arguments + call["function"]["arguments"])
    return message


@pytest.mark.anyio
async def test_a_reply_that_only_calls_has_no_content(server: Server) -> None:
    replying(server, ONE)
    choice = await whole(server)
    (call,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
    assert call == {"id": call["id"], "type": "function", "function": {"name": "weather", "arguments": PARIS}}
    assert call["id"].startswith("call_")


@pytest.mark.anyio
@pytest.mark.parametrize("text", [ONE, TWO, "It rains.", "", "<tool_call>\nno json", '{"name": "weather"}'])
@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_stream_says_the_same_as_the_whole(server: Server, text: str, choice: str) -> None:
    replying(server, text)
    reply = await whole(server, tool_choice=choice)
    parts, finish = await deltas(server, tool_choice=choice)
    message = put_together(parts)
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in reply["message"].get("tool_calls", ())]
    assert (message["content"], message["calls"], finish) == (
        reply["message"]["content"], calls, reply["finish_reason"]
    )  # fmt: skip
    assert parts[0]["role"] == "assistant" and all("role" not in part for part in parts[1:]) and parts[-1] == {}
    assert finish == ("tool_calls" if calls else "stop")


@pytest.mark.anyio
async def test_calls_come_in_openais_deltas(server: Server) -> None:
    replying(server, ONE)
    parts, finish = await deltas(server)
    call_id = parts[1]["tool_calls"][0]["id"]
    assert parts[:2] == [
        {"role": "assistant", "content": None},
        {"tool_calls": [
            {"index": 0, "id": call_id, "type": "function", "function": {"name": "weather", "arguments": ""}}
        ]},
    ]  # fmt: skip
    assert parts[2] == {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]} and finish == "tool_calls"
    replying(server, "It rains.")
    assert (await deltas(server))[0][:2] == [{"role": "assistant", "content": ""}, {"content": "I"}]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("choice", "finish"),
    [("auto", "tool_calls"), (None, "tool_calls"), ("required", "tool_calls"), (NAMED, "stop")],
)
async def test_finish_reasons_are_openais(server: Server, choice: Any, finish: str) -> None:
    replying(server, ONE)
    assert (await whole(server, tool_choice=choice))["finish_reason"] == finish
    assert (await deltas(server, tool_choice=choice))[1] == finish
    cut = await whole(server, tool_choice=choice, max_tokens=60)
    assert cut["finish_reason"] == "length" == (await deltas(server, tool_choice=choice, max_tokens=60))[1]
    assert PARIS.startswith(cut["message"]["tool_calls"][0]["function"]["arguments"])


@pytest.mark.anyio
async def test_required_and_named_replies_are_held_to_a_grammar(server: Server) -> None:
    replying(server, ONE)
    for choice in (None, "auto", "none"):
        await whole(server, tool_choice=choice)
    assert grammars(server).asked == [] and server.engine.sequences[-1].params.grammar is None
    for choice in ("required", NAMED):
        await whole(server, tool_choice=choice)
        shape, param = grammars(server).asked[-1]
        assert (shape.kind, param) == ("lark", "tools") and ("now" in shape.value) == (choice == "required")
        assert server.engine.sequences[-1].params.grammar.shape is shape  # type: ignore[union-attr]
    grammars(server).failure = RequestError("no such keyword", param="tools")
    reply = await server.post("/v1/chat/completions", asked(tool_choice="required", stream=True))
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "tools" and not server.store.leased


@pytest.mark.anyio
async def test_a_reply_of_a_shape_may_call_in_its_place(server: Server) -> None:
    schema = {"type": "object", "properties": {"sky": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    replying(server, ONE)
    assert (await whole(server, response_format=form))["message"]["tool_calls"]
    shape, param = grammars(server).asked[-1]
    assert (shape.kind, param) == ("lark", "response_format") and '"sky"' in shape.value and '"city"' in shape.value
    await whole(server, response_format=form, tool_choice="none")
    assert grammars(server).asked[-1][0].kind == "json_schema"
    await whole(server, response_format=form, tool_choice="required")
    assert '"sky"' not in grammars(server).asked[-1][0].value, "what it says is not said"
    reply = await server.post("/v1/chat/completions", asked(guided_regex="a+"))
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "guided_regex"


@pytest.mark.anyio
async def test_parallel_tool_calls_false_means_one(server: Server) -> None:
    replying(server, TWO)
    assert len((await whole(server))["message"]["tool_calls"]) == 2
    assert len((await whole(server, parallel_tool_calls=False))["message"]["tool_calls"]) == 1
    assert len(put_together((await deltas(server, parallel_tool_calls=False))[0])["calls"]) == 1


@pytest.mark.anyio
async def test_the_template_is_told_of_the_tools_that_may_be_called(server: Server) -> None:
    await whole(server)
    told = server.tokenizer.variables[-1]["tools"]
    assert told[0] == {"type": "function", "function": WEATHER}
    assert told[1]["function"]["parameters"] == {"type": "object", "properties": {}}, "templates look into it"
    await whole(server, tool_choice="none")
    assert "tools" not in server.tokenizer.variables[-1]
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]}
    await whole(server, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert [tool["function"]["name"] for tool in server.tokenizer.variables[-1]["tools"]] == ["now"]
    assert grammars(server).asked == []


@pytest.mark.anyio
async def test_a_template_without_tools_gets_a_text_of_ours(server: Server) -> None:
    server.tokenizer.spoken = Conventions(CallFormat("json"))
    replying(server, '{"name": "weather", "arguments": {"city": "Paris"}}')
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
        ]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]  # fmt: skip
    choice = await whole(server, messages=history)
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": PARIS}
    system, _, called, answered = server.tokenizer.conversations[-1]
    assert system["role"] == "system" and '"of a city"' in system["content"]
    assert called == {"role": "assistant", "content": '{"name": "now", "arguments": {}}'}
    assert answered["role"] == "user" and answered["content"] == "Result of now:\nnoon"
    assert server.tokenizer.variables[-1] == {}


@pytest.mark.anyio
async def test_earlier_calls_reach_the_template_as_it_takes_them(server: Server) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": PARIS}}
    history = [
        {"role": "developer", "content": "be brief"},
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
        {"role": "assistant", "content": "ok", "tool_calls": []},
        {"role": "user", "content": "go on", "name": "someone"},
    ]
    await whole(server, messages=history)
    system, user, called, answered, said, last = server.tokenizer.conversations[-1]
    assert system == {"role": "system", "content": "be brief"} and user == MESSAGES[0]
    assert called["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    assert called["content"] == "" and called["reasoning_content"] == "hm"
    assert answered == {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"}
    assert said == {"role": "assistant", "content": "ok"} and last == {"role": "user", "content": "go on"}
    server.tokenizer.spoken = replace(server.tokenizer.spoken, arguments="string")
    await whole(server, messages=history)
    assert server.tokenizer.conversations[-1][2]["tool_calls"][0]["function"]["arguments"] == PARIS


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", {}), (" {} ", {}), ("not json", "not json"), ("[1]", "[1]"), ('{"a": ', '{"a": '),
        ({"city": "Paris"}, {"city": "Paris"}), ('{"a": "[[[["}', {"a": "[[[["}),
    ],
)  # fmt: skip
async def test_whatever_a_model_wrote_may_be_sent_back(server: Server, arguments: Any, told: Any) -> None:
    call = {"id": "c1", "function": {"name": "weather", "arguments": arguments}}
    await whole(server, messages=[*MESSAGES, {"role": "assistant", "tool_calls": [call]}])
    assert server.tokenizer.conversations[-1][1]["tool_calls"][0]["function"]["arguments"] == told


@pytest.mark.anyio
async def test_functions_are_tools_by_their_old_name(server: Server) -> None:
    replying(server, TWO)
    old: dict[str, Any] = {"tools": None, "functions": [WEATHER], "function_call": "auto"}
    choice = await whole(server, **old)
    assert choice["message"]["function_call"] == {"name": "weather", "arguments": PARIS}
    assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "function_call"
    assert server.tokenizer.variables[-1]["tools"] == [TOOLS[0]]
    parts, finish = await deltas(server, **old)
    called = [part["function_call"] for part in parts if "function_call" in part]
    assert called[0] == {"name": "weather", "arguments": ""} and finish == "function_call"
    assert "".join(part["arguments"] for part in called) == PARIS
    assert (await whole(server, **old | {"function_call": {"name": "weather"}}))["finish_reason"] == "stop"
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": PARIS}},
        {"role": "function", "name": "weather", "content": "rain"},
    ]
    await whole(server, **old, messages=history)
    _, called_before, answered = server.tokenizer.conversations[-1]
    assert called_before["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    assert answered["role"] == "tool" and answered["name"] == "weather"
    assert answered["tool_call_id"] == called_before["tool_calls"][0]["id"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f\n"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [TOOLS[0], TOOLS[1], TOOLS[0]]}, "tools.2.function.name"),
        ({"tools": TOOLS * 65}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools.0.function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
         "tools.0.function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"title": "x" * 70_000}}}]},
         "tools.0.function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]}, "tools.0.function.x"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "weather"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "x", "tools": [NAMED]}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": NAMED, "tools": None}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"functions": [WEATHER]}, "functions"),
        ({"tools": None, "functions": [WEATHER, WEATHER]}, "functions.1.name"),
        ({"tools": None, "functions": [WEATHER], "function_call": "required"}, "function_call"),
        ({"tools": None, "functions": [WEATHER], "function_call": {"name": "nobody"}}, "function_call"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "function": {"name": "f"}}]}]},
         "messages.0.tool_calls.0.type"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 129}]},
         "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 99}}]}]},
         "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y" * 600}]}, "messages.0.tool_call_id"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "x"}], "continue_final_message": True,
          "add_generation_prompt": True}, "continue_final_message"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
          "continue_final_message": True}, "continue_final_message"),
    ],
)  # fmt: skip
async def test_a_refusal_names_its_parameter(server: Server, fields: dict[str, Any], param: str) -> None:
    reply = await server.post("/v1/chat/completions", asked(**fields))
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param and len(error["message"]) < 600
    assert not server.engine.sequences and not server.store.leased


@pytest.mark.anyio
@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, {"tools": None, "tool_choice": "none"},
        {"functions": [], "function_call": None}, {"tools": None, "functions": [], "function_call": "none"},
        {"tools": TOOLS * 0 + [{"type": "function", "function": {"name": "f" + "." * 63, "strict": True}}]},
        {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(128)]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}, "description": None}}]},
    ],
)  # fmt: skip
async def test_what_clients_send_without_meaning_anything_is_taken(server: Server, fields: dict[str, Any]) -> None:
    assert (await whole(server, **fields))["finish_reason"] == "stop"


@pytest.mark.anyio
async def test_log_probabilities_are_of_all_tokens_calls_among_them(server: Server) -> None:
    replying(server, TWO)
    choice = await whole(server, logprobs=True)
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == TWO
    text = (await server.post("/v1/chat/completions", asked(stream=True, logprobs=True))).text
    entries = []
    for line in text.split("\n\n"):
        if line.startswith("data: {"):
            told = json.loads(line.removeprefix("data: "))["choices"][0]["logprobs"]
            entries += told["content"] if told else []
    assert entries == choice["logprobs"]["content"]


@pytest.mark.anyio
@pytest.mark.parametrize("tools", [TOOLS, None])
async def test_what_was_thought_is_told_apart(server: Server, tools: Any) -> None:
    server.tokenizer.spoken = replace(server.tokenizer.spoken, reasoning=Reasoning("<think>", "</think>"))
    text = "<think>\nHm, rain?\n</think>\n\nIt rains."
    replying(server, text)
    reply = (await server.post("/v1/chat/completions", asked(tools=tools))).json()
    message = reply["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm, rain?", "It rains.")
    thought = reply["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert len("Hm, rain?") <= thought < len("<think>\nHm, rain?\n</think>")
    parts, finish = await deltas(server, tools=tools)
    assert put_together(parts) == {"content": "It rains.", "reasoning_content": "Hm, rain?", "calls": []}
    assert finish == "stop"
    for kept in (True, None):
        assert "reasoning_content" in (await whole(server, tools=tools, include_reasoning=kept))["message"]
    left_out = await whole(server, tools=tools, include_reasoning=False)
    assert left_out["message"] == {"role": "assistant", "content": "It rains.", "refusal": None}
    assert all("reasoning_content" not in part for part in (await deltas(server, include_reasoning=False))[0])


@pytest.mark.anyio
async def test_a_prompt_may_open_the_thought(server: Server) -> None:
    server.tokenizer.spoken = replace(server.tokenizer.spoken, reasoning=Reasoning("<think>", "</think>"))
    server.tokenizer.opening = "<think>\n"
    replying(server, "Hm.</think>" + ONE)
    message = (await whole(server))["message"]
    assert message["reasoning_content"] == "Hm." and message["content"] is None
    assert message["tool_calls"][0]["function"]["arguments"] == PARIS


@pytest.mark.anyio
async def test_a_conversation_without_thoughts_or_tools_is_not_read_at_all(server: Server) -> None:
    replying(server, ONE)
    reply = (await server.post("/v1/chat/completions", asked(tools=None))).json()
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": ONE, "refusal": None}
    assert "completion_tokens_details" not in reply["usage"]


@pytest.mark.anyio
async def test_special_tokens_that_calls_are_written_in_are_read_and_never_shown(server: Server) -> None:
    added = AddedTokens({"[TOOL_CALLS]": 256}, frozenset(("[TOOL_CALLS]",)))
    server.tokenizer.spoken = replace(server.tokenizer.spoken, format=CallFormat("mistral", added), short_ids=True)
    server.tokenizer.special_texts[256] = b"[TOOL_CALLS]"
    call = [*b'[{"name": "weather", "arguments": {"city": "Paris"}}]']
    server.engine.replies[None] = [256, *call]
    message = (await whole(server))["message"]
    assert message["content"] is None and message["tool_calls"][0]["function"]["arguments"] == PARIS
    assert len(message["tool_calls"][0]["id"]) == 9
    server.engine.replies[None] = [*b"a ", 256, *b"no call"]
    assert (await whole(server))["message"]["content"] == "a no call"
    assert (await whole(server, tools=None))["message"]["content"] == "a no call"


@pytest.mark.anyio
async def test_the_last_message_may_be_continued(server: Server) -> None:
    said = {"role": "assistant", "content": "Arr, "}
    fields = {"tools": None, "messages": [*MESSAGES, said], "continue_final_message": True}
    await whole(server, **fields)
    assert bytes(server.engine.sequences[-1].prompt).decode() == "user:weather?\nassistant:Arr, "
    await whole(server, **fields, add_generation_prompt=False)
    tokens = (await server.post("/tokenize", {name: fields[name] for name in fields if name != "tools"})).json()
    assert tokens["tokens"] == server.engine.sequences[-1].prompt


@pytest.mark.anyio
async def test_tools_are_part_of_a_conversations_tokens(server: Server) -> None:
    reply = await server.post("/tokenize", {"messages": MESSAGES, "tools": TOOLS})
    assert reply.status_code == 200 and len(server.tokenizer.variables[-1]["tools"]) == 2


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx2.ASGITransport(server.app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport) as http:
        yield openai.AsyncOpenAI(api_key="x", base_url="http://localhost/v1", http_client=http, max_retries=0)


@pytest.mark.anyio
async def test_the_official_client_puts_a_stream_together(server: Server, client: openai.AsyncOpenAI) -> None:
    replying(server, TWO)
    options: dict[str, Any] = {"model": BASE_NAME, "messages": MESSAGES, "tools": TOOLS}
    reply = await client.chat.completions.create(**options)
    async with client.chat.completions.stream(**options) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    assert {"content.delta", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    message, said = final.choices[0].message, reply.choices[0].message
    assert message.content == said.content == "Let me look."
    assert message.tool_calls is not None and said.tool_calls is not None
    assert [c.function.arguments for c in message.tool_calls] == [PARIS, ROME]
    assert [c.function.to_dict() | {"parsed_arguments": None} for c in said.tool_calls if c.type == "function"] == [
        c.function.to_dict() | {"parsed_arguments": None} for c in message.tool_calls
    ]
    assert final.choices[0].finish_reason == reply.choices[0].finish_reason == "tool_calls"
    again: list[Any] = [
        *MESSAGES,
        said.to_dict(),
        {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "x"},
    ]
    await client.chat.completions.create(model=BASE_NAME, messages=again)
    assert server.tokenizer.conversations[-1][-1]["name"] == "weather"


@pytest.mark.anyio
async def test_the_function_whose_parameters_have_no_grammar_is_named(server: Server) -> None:
    grammars(server).failure = RequestError("the JSON schema at #: no", param="tools", code="unsupported_value")
    bad = {"type": "object", "properties": {"cities": {"type": "array", "uniqueItems": True}}}
    tools = [*TOOLS, {"type": "function", "function": {"name": "many", "parameters": bad}}]
    reply = await server.post("/v1/chat/completions", asked(tools=tools, tool_choice="required"))
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["message"].startswith("the function many: the JSON schema at #/properties/cities: 'uniqueItems'")
    assert (error["param"], error["code"]) == ("tools", "unsupported_value")
