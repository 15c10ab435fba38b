"""The OpenAPI document, made from the routes there are, the models of requests, and those of replies."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from loramux_adapters.names import MAX_NAME, NAME_PATTERN
from loramux_server.api.completions.request.options import OPTIONS
from loramux_server.api.description.operations import EVENTS, FORM, JSON, OPERATIONS, Operation
from loramux_server.api.description.replies import AdapterValidation, ErrorReply
from loramux_server.api.http.auth import Access

_CONVERTER = re.compile(r":\w+(?=\})")
_PARAMETER = re.compile(r"\{(\w+)\}")
_ABOUT = (
    "OpenAI's API (chat, completions, responses, embeddings) over one base model and many LoRA adapters, and calls to "
    "manage the adapters. `model` names the base or an adapter."
)


@dataclass(frozen=True, slots=True)
class DescribedRoute:
    """One method of one route of the application."""

    method: str
    path: str
    access: Access

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.method, self.path]  # type: ignore[index]

    @property
    def parameters(self) -> list[str]:
        """Names in the path."""
        return _PARAMETER.findall(self.path)


def described_path(path: str) -> str:
    """A route's path without the converters of its parameters."""
    return _CONVERTER.sub("", path)


def openapi_document(
    routes: Sequence[DescribedRoute], *, version: str, needs_key: Collection[Access]
) -> dict[str, Any]:
    """`needs_key`: the kinds of calls that ask for one here."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, route.access in needs_key)
    return {
        "openapi": "3.1.0",
        "info": {"title": "loramux", "version": version, "description": _ABOUT, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": _schemas([route.operation for route in routes]),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: DescribedRoute, needs_key: bool) -> dict[str, Any]:
    operation = route.operation
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": "_".join([route.method.lower(), *re.findall(r"\w+", route.path)]),
        "parameters": [*_parameters(route)],
        "responses": _responses(route, needs_key),
        "security": [{"key": []}] if needs_key else [],
    }
    if operation.requests:
        described["requestBody"] = {
            "required": operation.body_needed,
            "content": {operation.takes: {"schema": _any_of(operation.requests)}},
        }
    return described


def _parameters(route: DescribedRoute) -> Iterator[dict[str, Any]]:
    for name in route.parameters:
        form = {"maxLength": MAX_NAME, "pattern": NAME_PATTERN} if name == "name" else {"minLength": 1}
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"} | form}
    for name, schema in route.operation.query.items():
        yield {"name": name, "in": "query", "required": False, "schema": schema}


def _responses(route: DescribedRoute, needs_key: bool) -> dict[str, Any]:
    operation = route.operation
    content: dict[str, Any] = {operation.media: {}}
    if operation.reply is not None:
        replies = (operation.reply, AdapterValidation) if operation.takes == FORM else (operation.reply,)
        content = {JSON: {"schema": _any_of(replies)}}
    if operation.event is not None:
        content[EVENTS] = {"schema": _event(operation.event, operation.done)}
    responses = {str(status): {"description": operation.summary, "content": content} for status in operation.statuses}
    errors = {"default": "Refused, or failed"}
    if operation.requests or operation.query:
        errors["400"] = "Something about the request is wrong"
    if needs_key:
        errors |= {"401": "No key, or a wrong one", "403": "The key does not allow this"}
    if operation.missing:
        errors["404"] = "There is no such model or adapter"
    for status, text in errors.items():
        responses[status] = {"description": text, "content": {JSON: {"schema": _any_of((ErrorReply,))}}}
    return responses


def _event(model: type[BaseModel], done: bool) -> dict[str, Any]:
    """One event of a stream: a schema describes that there, not the whole."""
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": _any_of((model,))}
    what = {"anyOf": [data, {"const": "[DONE]"}]} if done else data
    return {"type": "object", "properties": {"event": {"type": "string"}, "data": what}, "required": ["data"]}


def _any_of(models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    references = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in models]
    return references[0] if len(references) == 1 else {"anyOf": references}


def _schemas(operations: Iterable[Operation]) -> dict[str, Any]:
    requests: set[type[BaseModel]] = set()
    replies: set[type[BaseModel]] = {ErrorReply, AdapterValidation}
    options: dict[str, Any] = {}
    for operation in operations:
        requests.update(operation.requests)
        replies.update(model for model in (operation.reply, operation.event) if model is not None)
        options |= operation.options
    models = [(model, "validation") for model in sorted(requests, key=_name)]
    models += [(model, "serialization") for model in sorted(replies, key=_name)]
    _, whole = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas: dict[str, Any] = whole["$defs"]
    about = {option.name: option.about for option in OPTIONS if option.served}
    for name, beside in options.items():
        fields = schemas[name].setdefault("properties", {})
        for field in fields:
            if name.endswith("Request") and field in about:
                fields[field].setdefault("description", about[field])
        fields |= {option.name: option.schema for option in beside.values()}
    return schemas


def _name(model: type[BaseModel]) -> str:
    return model.__name__
