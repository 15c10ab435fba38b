"""Replies that are held to a shape, where the model may think before, or call in their place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from loramux_server.grammar.shape import Shape
from loramux_server.tools.calls import Tool
from loramux_server.tools.formats import CallFormat
from loramux_server.tools.lark import LarkWriter
from loramux_server.tools.reasoning import Reasoning

_BARE = {"llama3": "parameters", "json": "arguments"}  # formats whose calls are JSON and nothing else


def shape_beside(
    answer: Shape,
    form: CallFormat,
    tools: Sequence[Tool],
    *,
    parallel: bool = True,
    thought: Reasoning | None = None,
) -> Shape | None:
    """
    Args:
        answer: what the reply shall be, unless it calls.
        tools: that it may call; none if it may call nothing.
        parallel: it may call several. Where calls are JSON and nothing else it may call one: answers, which are JSON
            too, are told from it by schemas of the whole reply.
        thought: that the prompt has opened, and the reply first ends; None if it has not.
    Returns:
        None: a pattern or a grammar of a client's, which cannot be made part of another.
    """
    if tools and form.name in _BARE:
        if answer.kind not in ("json_object", "json_schema"):
            return None
        answer, tools = Shape("json_schema", _any_of(answer, tools, _BARE[form.name])), ()
        if thought is None:
            return answer
    body = _body(answer)
    if body is None:
        return None
    rules = [f"answer: {body if thought is None else f'thought {body}'}"]
    if tools:
        calls = form.shape(tools, parallel=parallel, reasoning=thought, opened=thought is not None)
        called = calls.value.replace("\nstart:", "\ncalls:", 1).removeprefix("%llguidance {}\n")
        rules += ["start: calls | answer", called]
    else:
        rules.append("start: answer")
        if thought is not None:
            rules += LarkWriter(form.added).until("thought", "THINKING", thought.end, behind=r" /[ \n]{0,4}/")
    return Shape("lark", "%llguidance {}\n" + "\n".join(rules) + "\n")


def _any_of(answer: Shape, tools: Sequence[Tool], key: str) -> dict[str, Any]:
    """One schema of answers and calls; `key`: what a call has its arguments under."""
    definitions = {"answer": _moved(_schema(answer), "answer")}
    forms: list[dict[str, Any]] = []
    for place, tool in enumerate(tools):
        parameters = {"additionalProperties": False} if tool.parameters is None else tool.parameters
        definitions[f"call_{place}"] = _moved({"type": "object", **parameters}, f"call_{place}")
        fields = {"name": {"const": tool.name}, key: {"$ref": f"#/$defs/call_{place}"}}
        forms.append({"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False})
    return {"anyOf": [{"$ref": "#/$defs/answer"}, *forms], "$defs": definitions}


def _moved(schema: Any, name: str) -> Any:
    """A schema as a definition of another: what it refers to within itself moves with it."""
    if isinstance(schema, dict):
        return {
            key: f"#/$defs/{name}{value[1:]}"
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, name)
            for key, value in schema.items()
        }
    return [_moved(item, name) for item in schema] if isinstance(schema, list) else schema


def _schema(answer: Shape) -> dict[str, Any]:
    if answer.kind == "json_object":
        return {"type": "object"}
    return answer.value if isinstance(answer.value, dict) else {}


def _body(answer: Shape) -> str | None:
    """As the body of a rule."""
    if answer.kind in ("json_object", "json_schema"):
        return "%json " + json.dumps(_schema(answer), ensure_ascii=False)
    if answer.kind == "choice":
        return f"({' | '.join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(answer.value))})"
    return None
