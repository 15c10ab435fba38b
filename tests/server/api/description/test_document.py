"""The OpenAPI document: every route is in it, and every reply is what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from loramux_adapters.errors import AdapterRejected
from loramux_adapters.names import is_name
from loramux_server.api.description import replies
from loramux_server.api.description.document import described_path
from loramux_server.api.description.operations import OPERATIONS
from loramux_server.api.http.dependencies import Keys
from loramux_server.publishing.lora_path import LoraPathRoot
from support.fakes_api import BASE_NAME, Server, make_server

MESSAGES = [{"role": "user", "content": "x"}]
FILES = {"config": b"{}", "weights": b"w"}


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


async def document_of(server: Server, **headers: str) -> dict[str, Any]:
    async with server.client() as client:
        reply = await client.get("/openapi.json", headers=headers)
    document: dict[str, Any] = reply.json()
    return document


def with_lora_path_root(tmp_path: Path, **options: Any) -> Server:
    """A server that has all the routes there can be."""
    root = LoraPathRoot.__new__(LoraPathRoot)  # never called
    return make_server(tmp_path, lora_path_root=root, **options)


@pytest.mark.anyio
async def test_every_route_is_described_and_nothing_else_is(tmp_path: Path) -> None:
    server = with_lora_path_root(tmp_path)
    routes = {(method, described_path(route.path)) for route in server.app.routes for method in route.methods}
    assert {(method, path) for method, path in routes if method != "HEAD"} == set(OPERATIONS)
    paths = (await document_of(server))["paths"]
    assert {(method.upper(), path) for path, it in paths.items() for method in it} == set(OPERATIONS)


@pytest.mark.anyio
async def test_every_reference_leads_somewhere(tmp_path: Path) -> None:
    document = await document_of(with_lora_path_root(tmp_path))
    names = {name.rpartition("/")[2] for name in _values(document, "$ref")}
    assert names and names <= set(document["components"]["schemas"])
    ids = list(_values(document["paths"], "operationId"))
    assert len(ids) == len(set(ids)) == len(OPERATIONS)


@pytest.mark.anyio
async def test_the_path_says_which_names_an_adapter_can_have(server: Server) -> None:
    paths = (await document_of(server))["paths"]
    for path in ("/v1/adapters/{name}", "/v1/adapters/{name}/pin"):
        (name,) = [each for each in paths[path]["delete"]["parameters"] if each["in"] == "path"]
        form, longest = re.compile(name["schema"]["pattern"]), name["schema"]["maxLength"]
        assert form.search("org/adapter") and form.search("x" * longest) and is_name("x" * longest)
        assert not any(form.search(other) for other in ("", "a b", "org/", "/org", "a//b", ".a", "a:b", "ä"))


@pytest.mark.anyio
async def test_a_null_default_is_a_value_of_its_schema(tmp_path: Path) -> None:
    schemas = (await document_of(with_lora_path_root(tmp_path)))["components"]["schemas"]
    fields = [field for schema in schemas.values() for field in schema.get("properties", {}).values()]
    nulls = [field for field in fields if "default" in field and field["default"] is None]
    assert nulls and all({"type": "null"} in field.get("anyOf", []) for field in nulls)


def _values(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        for name, item in value.items():
            if name == key:
                yield item
            yield from _values(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _values(item, key)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("keys", "generation", "management"),
    [(Keys(), False, False), (Keys("k"), True, True), (Keys("k", "a"), True, True), (Keys(None, "a"), False, True)],
)
async def test_the_document_says_which_calls_need_a_key(
    tmp_path: Path, keys: Keys, generation: bool, management: bool
) -> None:
    server = make_server(tmp_path, keys=keys)
    paths = (await document_of(server, authorization=f"Bearer {keys.admin_key or keys.api_key or 'x'}"))["paths"]
    assert bool(paths["/v1/completions"]["post"]["security"]) == generation
    assert bool(paths["/v1/adapters/{name}"]["put"]["security"]) == management
    assert not paths["/health"]["get"]["security"] and not paths["/"]["get"]["security"]


@pytest.mark.anyio
async def test_options_that_are_not_served_are_in_the_schema(server: Server) -> None:
    schemas = (await document_of(server))["components"]["schemas"]
    chat = schemas["ChatRequest"]["properties"]
    assert chat["use_beam_search"]["anyOf"] == [{"enum": [False]}, {"type": "null"}]
    assert chat["prediction"]["anyOf"] == [{"type": "null"}]
    assert {"type": "string", "maxLength": 512} in chat["user"]["anyOf"]
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert "tool_calls" in schemas["ChatMessage"]["properties"]
    assert "cache_control" in schemas["TextPart"]["properties"]


CALLS: list[tuple[str, str, dict[str, Any], type[BaseModel]]] = [
    ("POST", "/v1/chat/completions", {"model": "pirate", "messages": MESSAGES}, replies.ChatReply),
    ("POST", "/v1/chat/completions", {"model": BASE_NAME, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2},
     replies.ChatReply),
    ("POST", "/v1/completions", {"model": BASE_NAME, "prompt": ["x", "y"], "max_tokens": 2}, replies.CompletionReply),
    ("POST", "/v1/completions", {"model": BASE_NAME, "prompt": "x", "logprobs": 2}, replies.CompletionReply),
    ("POST", "/v1/completions", {"model": BASE_NAME, "prompt": "xy", "logprobs": 2, "echo": True, "n": 2,
                                 "prompt_logprobs": 1, "return_token_ids": True, "stop": "o"}, replies.CompletionReply),
    ("POST", "/v1/completions", {"model": BASE_NAME, "prompt": "xy", "echo": True, "max_tokens": 0},
     replies.CompletionReply),
    ("POST", "/v1/chat/completions", {"model": BASE_NAME, "messages": MESSAGES, "prompt_logprobs": 1, "n": 2,
                                      "return_token_ids": True, "stop_token_ids": [111]}, replies.ChatReply),
    ("POST", "/tokenize", {"prompt": "x", "return_token_strs": True}, replies.TokenizeReply),
    ("POST", "/tokenize", {"messages": MESSAGES}, replies.TokenizeReply),
    ("POST", "/detokenize", {"tokens": [65, 66]}, replies.DetokenizeReply),
    ("GET", "/v1/models", {}, replies.ModelList),
    ("GET", "/v1/models/pirate", {}, replies.Model),
    ("GET", "/v1/adapters", {}, replies.AdapterList),
    ("GET", "/v1/adapters/pirate", {}, replies.Adapter),
    ("PUT", "/v1/adapters/new", {}, replies.Adapter),
    ("PUT", "/v1/adapters/new?validate_only=true", {}, replies.AdapterValidation),
    ("POST", "/v1/adapters/pirate/pin", {}, replies.Adapter),
    ("DELETE", "/v1/adapters/pirate/pin", {}, replies.Adapter),
    ("DELETE", "/v1/adapters/pirate", {}, replies.AdapterDeleted),
    ("GET", "/health", {}, replies.Status),
    ("GET", "/ready", {}, replies.Status),
    ("GET", "/version", {}, replies.VersionReply),
]  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "path", "body", "model"), CALLS)
async def test_a_reply_is_what_the_document_says(
    server: Server, method: str, path: str, body: dict[str, Any], model: type[BaseModel]
) -> None:
    options: dict[str, Any] = {"json": body} if body else {"files": FILES} if method == "PUT" else {}
    async with server.client() as client:
        reply = await client.request(method, path, **options)
    assert reply.status_code in (200, 201)
    model.model_validate_json(reply.content)
    path = path.partition("?")[0].replace("/new", "/{name}").replace("/pirate", "/{name}")
    operation = OPERATIONS[method, path.replace("models/{name}", "models/{model}")]  # type: ignore[index]
    assert model in (operation.reply, replies.AdapterValidation)
    assert reply.status_code in operation.statuses


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "prompt", "model"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True}, replies.ChatChunk),
        ("/v1/completions", {"prompt": "x", "logprobs": 1}, replies.CompletionReply),
        (
            "/v1/completions",
            {"prompt": "x", "logprobs": 1, "echo": True, "return_token_ids": True, "n": 2},
            replies.CompletionReply,
        ),
        ("/v1/chat/completions", {"messages": MESSAGES, "return_token_ids": True, "stop": "wor"}, replies.ChatChunk),
    ],
)
async def test_an_event_of_a_stream_is_what_the_document_says(
    server: Server, path: str, prompt: dict[str, Any], model: type[BaseModel]
) -> None:
    body = {"model": BASE_NAME, "stream": True, "stream_options": {"include_usage": True}} | prompt
    lines = (await server.post(path, body)).text.split("\n\n")
    events = [line.removeprefix("data: ") for line in lines if line and "[DONE]" not in line]
    assert len(events) > 3
    for event in events:
        model.model_validate_json(event)


@pytest.mark.anyio
async def test_an_error_is_what_the_document_says(server: Server) -> None:
    server.check.failure = AdapterRejected(["one", "another"])
    async with server.client() as client:
        answers = [
            await client.get("/nothing"),
            await client.post("/v1/completions", json={"model": BASE_NAME}),
            await client.post("/v1/completions", json={"model": "nobody", "prompt": "x"}),
            await client.put("/v1/adapters/new", files=FILES),
        ]
    assert [answer.status_code for answer in answers] == [404, 400, 404, 422]
    for answer in answers:
        replies.ErrorReply.model_validate_json(answer.content)


@pytest.mark.anyio
async def test_the_document_is_json_without_anything_of_this_machine(server: Server) -> None:
    text = json.dumps(await document_of(server))
    assert "/home" not in text and str(Path(__file__).parents[4]) not in text


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "done"), [("/v1/chat/completions", True), ("/v1/completions", True), ("/v1/responses", False)]
)
async def test_a_streams_schema_describes_one_event_and_the_json_in_it(server: Server, path: str, done: bool) -> None:
    async with server.client() as client:
        document = (await client.get("/openapi.json")).json()
    schema = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    assert (schema["type"], schema["required"]) == ("object", ["data"])
    data = schema["properties"]["data"]
    assert ({"const": "[DONE]"} in data.get("anyOf", [])) == done
    reference = (data["anyOf"][0] if done else data)["contentSchema"]["$ref"]
    assert reference.rpartition("/")[2] in document["components"]["schemas"]


@pytest.mark.anyio
async def test_options_that_differ_between_routes_are_described_as_each_route_has_them(server: Server) -> None:
    schemas = (await document_of(server))["components"]["schemas"]
    completion = schemas["CompletionRequest"]["properties"]
    assert "highest mean log probability" in completion["best_of"]["description"]
    assert "the text begins with the prompt" in completion["echo"]["description"]
    assert "only `false`" in schemas["ChatRequest"]["properties"]["echo"]["description"]
    assert {"type": "boolean"} in schemas["StreamOptions"]["properties"]["continuous_usage_stats"]["anyOf"]
    assert all("description" in told for told in schemas["EmbeddingRequest"]["properties"].values())
