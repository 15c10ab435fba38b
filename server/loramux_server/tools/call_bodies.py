"""Calls as formats write them, read character by character: objects, lists of them, names before arguments, tags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

import regex

from loramux_server.tools.calls import Tool
from loramux_server.tools.json_pieces import (
    Reading,
    Take,
    Unexpected,
    behind_space,
    container,
    decoded,
    literal,
    string,
)

_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
_LONGEST_NAME = 256
_ARGUMENTS = ("arguments", "parameters")
_BESIDE = ("type", "id", "call_id")  # fields of a call that say nothing more
_END_OF_VALUE = regex.compile(r"\n?</parameter>\s{0,64}<(parameter=[^<>\n]{0,256}|/function)>")
_PYTHON = {"True": "true", "False": "false", "None": "null"}


class CallSink(Protocol):
    """Where calls go that are read."""

    tools: Mapping[str, Tool]

    def begin(self, name: str) -> None:
        """From here on this is a call, whatever comes."""

    def take(self, text: str) -> None:
        """A piece of its arguments."""

    def done(self) -> None:
        """It is complete."""


def calls(sink: CallSink, bracket: str = "") -> Reading[None]:
    """Whatever stands behind what opens a call. `bracket`: nothing but this bracket did."""
    first = bracket or (yield from behind_space())
    if first == "{":
        yield from _object(sink, bare=bool(bracket))
    elif first == "[":
        yield from _list(sink, bare=bool(bracket))
    elif first == "<":
        yield from _tags(sink)
    elif first in _NAME:
        yield from _named(sink, first)
    else:
        raise Unexpected


def _object(sink: CallSink, *, bare: bool) -> Reading[None]:
    """{"name": ..., "arguments": {...}}, in either order, behind its bracket.

    A bare one is a call only if it says its arguments: it may as well be an answer.
    """
    name: str | None = None
    held: list[str] | None = None  # arguments that came before the name
    begun = False
    while True:
        if (yield from behind_space()) != '"':
            raise Unexpected
        key = yield from string()
        yield from _colon()
        first = yield from behind_space()
        if key == "name" and name is None and first == '"':
            name = yield from string()
            if name not in sink.tools:
                raise Unexpected
            if held is not None:
                _give(sink, name, "".join(held))
                begun = True
        elif key in _ARGUMENTS and not begun and held is None:
            if name is None:
                held = []
                yield from _value(first, _Held(held))
            else:
                yield from _value(first, _Streamed(sink, name))
                begun = True
        elif key in _BESIDE and first == '"':
            yield from string()
        else:
            raise Unexpected
        behind = yield from behind_space()
        if behind == "}":
            break
        if behind != ",":
            raise Unexpected
    if not begun:
        if name is None or bare:
            raise Unexpected
        _give(sink, name, "{}")
    sink.done()


def _colon() -> Reading[None]:
    if (yield from behind_space()) != ":":
        raise Unexpected


def _give(sink: CallSink, name: str, arguments: str) -> None:
    sink.begin(name)
    sink.take(arguments)


class _Held:
    """Arguments that wait for their name."""

    def __init__(self, pieces: list[str]) -> None:
        self.take = pieces.append

    def begin(self) -> None: ...


class _Streamed:
    """Arguments whose name is known: their first character makes it a call."""

    def __init__(self, sink: CallSink, name: str) -> None:
        self._sink = sink
        self._name = name
        self.take = sink.take

    def begin(self) -> None:
        self._sink.begin(self._name)


def _value(first: str, arguments: _Held | _Streamed) -> Reading[None]:
    """Arguments: an object, an object's JSON text as a string, or null for none."""
    if first == "{":
        arguments.begin()
        yield from container(first, arguments.take)
    elif first == '"':
        begun = False

        def take(character: str) -> None:
            nonlocal begun
            if not begun:
                if character != "{":
                    raise Unexpected
                arguments.begin()
                begun = True
            arguments.take(character)

        yield from decoded(take)
        if not begun:
            arguments.begin()
            arguments.take("{}")
    elif first == "n":
        yield from literal("ull")
        arguments.begin()
        arguments.take("{}")
    else:
        raise Unexpected


def _list(sink: CallSink, *, bare: bool) -> Reading[None]:
    """[{...}, {...}], behind its bracket."""
    while True:
        if (yield from behind_space()) != "{":
            raise Unexpected
        yield from _object(sink, bare=bare)
        behind = yield from behind_space()
        if behind == "]":
            return
        if behind != ",":
            raise Unexpected


def _named(sink: CallSink, first: str) -> Reading[None]:
    """name[ARGS]{...}, name[CALL_ID]id[ARGS]{...} or name{...}."""
    name = first
    while (character := (yield)) in _NAME and len(name) < _LONGEST_NAME:
        name += character
    if name not in sink.tools:
        raise Unexpected
    if character == "[":
        tag = yield
        if tag == "C":
            yield from literal("ALL_ID]")
            for _ in range(_LONGEST_NAME):
                if (yield) == "[":
                    break
            tag = yield
        if tag != "A":
            raise Unexpected
        yield from literal("RGS]")
        character = yield from behind_space()
    elif character in " \n":
        character = yield from behind_space()
    if character != "{":
        raise Unexpected
    sink.begin(name)
    yield from container(character, sink.take)
    sink.done()


def _tags(sink: CallSink) -> Reading[None]:
    """<function=name> <parameter=key> value </parameter> ... </function>, behind its first bracket.

    A value ends at an end tag that another parameter or the end of the function follows. Texts are given as they come,
    other values when they are complete.
    """
    yield from literal("function=")
    name = yield from _to_bracket()
    if name not in sink.tools:
        raise Unexpected
    properties = (sink.tools[name].parameters or {}).get("properties")
    sink.begin(name)
    sink.take("{")
    if (yield from behind_space()) != "<":
        raise Unexpected
    tag = yield from _to_bracket()
    separator = ""
    while tag != "/function":
        if not tag.startswith("parameter="):
            raise Unexpected
        key = tag.removeprefix("parameter=")
        sink.take(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        schema = properties.get(key) if isinstance(properties, dict) else None
        if isinstance(schema, dict) and is_text(schema):
            sink.take('"')
            tag = yield from _tagged_value(lambda text: sink.take(json.dumps(text, ensure_ascii=False)[1:-1]))
            sink.take('"')
        else:
            pieces: list[str] = []
            tag = yield from _tagged_value(pieces.append)
            sink.take(_json_of("".join(pieces)))
        separator = ", "
    sink.take("}")
    sink.done()


def _tagged_value(take: Take) -> Reading[str]:
    """A value without the line feeds around it; the tag that follows its end tag."""
    held = ""
    first = yield
    if first != "\n":
        held = first
    while True:
        while held and (found := _END_OF_VALUE.fullmatch(held, partial=True)) is None:
            take(held[0])
            held = held[1:]
        if held and not found.partial:
            tag: str = found[1]
            return tag
        held += yield


def _to_bracket() -> Reading[str]:
    text = ""
    while (character := (yield)) != ">":
        if character in "<\n" or len(text) >= _LONGEST_NAME:
            raise Unexpected
        text += character
    return text


def _json_of(text: str) -> str:
    """A value between tags as JSON: a string where it is none."""
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _PYTHON.get(text) or json.dumps(text, ensure_ascii=False)
    return text.strip()


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether a schema takes strings and nothing else."""
    kinds = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return schema.get("type") == "string" or (isinstance(kinds, list) and all(isinstance(each, str) for each in kinds))


def _no_constant(text: str) -> None:
    raise ValueError(text)
