"""What a request says about tools: those it offers, which of them must be called, and calls that were made before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from loramux_server.api.completions.request.fields import RequestPart
from loramux_server.errors import RequestError
from loramux_server.tools.calls import Tool

MAX_TOOLS = 128
MAX_CALLS = 128  # of one message
MAX_NAME = 64
MAX_SCHEMA = 64 * 2**10  # characters of one function's `parameters` as JSON
MAX_ID = 512
NAME_PATTERN = r"^[A-Za-z0-9_.\-]{1,64}$"

Mode = Literal["auto", "none", "required"]


class Selection(NamedTuple):
    """What `tool_choice` comes to.

    Attributes:
        named: the one function that is to be called.
        allowed: the only ones that may be; None allows all.
    """

    mode: Mode = "auto"
    named: str | None = None
    allowed: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Calling:
    """The tools of one reply.

    Attributes:
        tools: those that may be called, at least one.
        mode: whether a call must come, and nothing else.
        named: the one function that is called; None leaves the choice to the model.
        parallel: more than one call may come.
        as_functions: asked for, and so answered, by the names that came before tools.
    """

    tools: tuple[Tool, ...]
    mode: Literal["auto", "required"] = "auto"
    named: str | None = None
    parallel: bool = True
    as_functions: bool = False


def _bounded_schema(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("type", "object") != "object":
        raise ValueError('must be a JSON schema of an object ("type": "object"): arguments have names')
    if (length := len(json.dumps(value, ensure_ascii=False))) > MAX_SCHEMA:
        raise ValueError(f"is a schema of {length} characters; at most {MAX_SCHEMA} are taken")
    return value


def _parse_choice(value: object) -> Selection:
    """`tool_choice` in any of its forms."""
    if value in ("auto", "none", "required"):
        return Selection(value)
    if isinstance(value, dict) and value.get("type") == "function":
        return Selection("required", _function_name(value))
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        return _allowed(value)
    raise ValueError(
        "must be 'auto', 'none', 'required', {'type': 'function', 'function': {'name': ...}} or {'type': "
        "'allowed_tools', 'allowed_tools': {'mode': 'auto' or 'required', 'tools': [...]}}"
    )


def _function_name(value: object) -> str:
    """Of {'type': 'function', 'function': {'name': ...}}."""
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if (
        not isinstance(value, dict)
        or value.keys() != {"type", "function"}
        or value["type"] != "function"
        or not isinstance(function, dict)
        or function.keys() != {"name"}
        or not isinstance(name, str)
    ):
        raise ValueError("names a function like this: {'type': 'function', 'function': {'name': ...}}")
    return name


def _allowed(value: dict[str, Any]) -> Selection:
    allowed = value.get("allowed_tools")
    if (
        value.keys() != {"type", "allowed_tools"}
        or not isinstance(allowed, dict)
        or allowed.keys() != {"mode", "tools"}
    ):
        raise ValueError("'allowed_tools' must be an object with 'mode' and 'tools'")
    mode, tools = allowed["mode"], allowed["tools"]
    if mode not in ("auto", "required") or not isinstance(tools, list) or not 0 < len(tools) <= MAX_TOOLS:
        raise ValueError(f"'allowed_tools' has a mode, 'auto' or 'required', and 1 to {MAX_TOOLS} tools")
    return Selection(mode, None, tuple(map(_function_name, tools)))


def _parse_function_choice(value: object) -> Selection:
    """`function_call`, what `tool_choice` was before."""
    if value in ("auto", "none"):
        return Selection(value)
    if isinstance(value, dict) and value.keys() == {"name"} and isinstance(value["name"], str):
        return Selection("required", value["name"])
    raise ValueError("must be 'auto', 'none' or {'name': ...}")


def _no_type_is_function(value: object) -> object:
    """Some clients leave out the one type that there is."""
    return {"type": "function", **value} if isinstance(value, dict) else value


ToolName = Annotated[str, Field(pattern=NAME_PATTERN, description=f"1 to {MAX_NAME} letters, digits, `_`, `-` and `.`")]
Parameters = Annotated[
    dict[str, Any],
    AfterValidator(_bounded_schema),
    Field(json_schema_extra={"properties": {"type": {"const": "object"}}}),
]


class FunctionPart(RequestPart):
    """A function that the model may call."""

    name: ToolName
    description: str | None = None
    parameters: Parameters | None = None
    strict: bool | None = None

    @property
    def tool(self) -> Tool:
        return Tool(self.name, self.description or "", self.parameters, bool(self.strict))


def _wrapped(value: object) -> object:
    """Other calls and vendors have a function without what is around it here."""
    if isinstance(value, dict) and "function" not in value and "name" in value:
        raise ValueError(
            "a function stands in 'function': {'type': 'function', 'function': {'name': ..., 'description': ..., "
            "'parameters': {...}}}"
        )
    return value


def _only_function(value: object) -> object:
    if value != "function":
        raise ValueError(f"only tools of the type 'function' are served, not {ascii(value)[:MAX_NAME]}")
    return value


class ToolPart(RequestPart):
    """A tool that the model may use; all are functions."""

    type: Annotated[Literal["function"], BeforeValidator(_only_function)]
    function: FunctionPart


class FunctionName(RequestPart):
    """Which function."""

    name: str


class NamedTool(RequestPart):
    """The tool that is to be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(RequestPart):
    """The only tools that may be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(RequestPart):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


# What `json_schema_input_type` says is for the API's description; the function before it decides.
ToolChoice = Annotated[
    Selection,
    PlainValidator(_parse_choice, json_schema_input_type=Mode | NamedTool | AllowedToolsChoice),
]
FunctionChoice = Annotated[
    Selection,
    PlainValidator(_parse_function_choice, json_schema_input_type=Literal["auto", "none"] | FunctionName),
]
Tools = Annotated[list[Annotated[ToolPart, BeforeValidator(_wrapped)]], Field(max_length=MAX_TOOLS, fail_fast=True)]
Functions = Annotated[list[FunctionPart], Field(max_length=MAX_TOOLS, fail_fast=True)]


class CalledFunction(RequestPart):
    """What an earlier reply called: `arguments` are JSON in a text, as replies have them."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_ID)]
    arguments: str | dict[str, Any] = ""


class CallMade(RequestPart):
    """A call of an earlier reply."""

    id: Annotated[str, Field(max_length=MAX_ID)] | None = None
    type: Literal["function"]
    function: CalledFunction


EarlierCalls = Annotated[
    list[Annotated[CallMade, BeforeValidator(_no_type_is_function)]], Field(max_length=MAX_CALLS, fail_fast=True)
]


def calling_of(
    functions: Sequence[FunctionPart], choice: Selection, *, parallel: bool, place: str, as_functions: bool = False
) -> Calling | None:
    """The tools that a reply may use; None if it may use none.

    Args:
        place: the name of the option that lists the functions.
    Raises:
        RequestError: two functions have one name, or the choice is none of them.
    """
    by_name: dict[str, FunctionPart] = {}
    for index, function in enumerate(functions):
        if function.name in by_name:
            inner = "name" if as_functions else "function.name"
            raise RequestError(
                f"'{place}': two functions have the name {function.name}; a call could be of either",
                param=f"{place}.{index}.{inner}",
                code="invalid_value",
            )
        by_name[function.name] = function
    option = "function_call" if as_functions else "tool_choice"
    if choice.mode == "required" and not by_name:
        raise RequestError(
            f"'{option}' asks for a call, and '{place}' lists nothing", param=option, code="invalid_value"
        )
    allowed = (choice.named,) if choice.named is not None else choice.allowed
    for name in allowed or ():
        if name not in by_name:
            raise RequestError(
                f"'{option}' names {ascii(name[:MAX_NAME])}, which is not in '{place}'",
                param=option,
                code="invalid_value",
            )
    if choice.mode == "none" or not by_name:
        return None
    kept = [function for name, function in by_name.items() if allowed is None or name in allowed]
    return Calling(
        tuple(function.tool for function in kept),
        choice.mode,
        choice.named,
        parallel and choice.named is None and not as_functions,
        as_functions,
    )
