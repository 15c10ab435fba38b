"""The body of POST /v1/responses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PlainValidator

from loramux_server.api.completions.request.chat import MAX_MESSAGES, MAX_PARTS, TemplateVariables
from loramux_server.api.completions.request.fields import INT32_MAX, INT64_MAX, INT64_MIN, Limit, ModelName, RequestPart
from loramux_server.api.completions.request.generation import MAX_ADAPTERS, MOST_ALTERNATIVES, AdapterPart, objects
from loramux_server.api.completions.request.problems import Problems, Unsupported
from loramux_server.api.completions.request.tools import MAX_ID, MAX_TOOLS, Parameters, ToolName
from loramux_server.api.http.json_object import json_object
from loramux_server.api.responses.options import (
    BESIDE,
    ITEM_OPTIONS,
    MAX_LABEL,
    MAX_LABELS,
    PART_OPTIONS,
    REASONING_OPTIONS,
    STREAM_OPTIONS,
    TEXT_OPTIONS,
    TOOL_OPTIONS,
)
from loramux_server.errors import RequestError

_TAG = re.compile(
    r"(input\.\d{1,4}|text\.format)\.(?:message|function_call_output|function_call|reasoning|text|json_object|json_schema)"
    r"(?![\w])"
)
MAX_KEY = 64  # characters of a name in `metadata`

CallId = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
LOGPROBS = "message.output_text.logprobs"
MAX_INCLUDED = 16
# The others ask for what no response from here has: reasoning is in plain text, and no tools or images are served.
Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class InputText(RequestPart):
    """A part of what somebody says."""

    type: Literal["input_text", "output_text"]
    text: str


class SaidRefusal(RequestPart):
    """A refusal in an earlier response; it reads as its text."""

    type: Literal["refusal"]
    refusal: str


def _parse_said(value: object) -> str:
    """A text, or a list of text parts, which become lines, as in chat completions."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) > MAX_PARTS:
        raise ValueError(f"must be a string or a list of at most {MAX_PARTS} text parts")
    return "\n".join(map(_parse_part, value))


def _parse_part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in ("input_text", "output_text", "refusal"):
        refused = Unsupported if isinstance(kind, str) else ValueError
        raise refused("only parts of type 'input_text', 'output_text' and 'refusal' are supported")
    field = "refusal" if kind == "refusal" else "text"
    if not isinstance(part.get(field), str):
        raise ValueError(f"a part of type '{kind}' must have '{field}', a string")
    for name, value in part.items():
        if name not in ("type", field) and (name not in PART_OPTIONS or not PART_OPTIONS[name].takes(value)):
            raise ValueError(f"a part of type '{kind}' cannot have {ascii(name[:64])}")
    text: str = part[field]
    return text


# What `json_schema_input_type` says is for the API's description; the function before it decides.
Said = Annotated[
    str,
    BeforeValidator(
        _parse_said,
        json_schema_input_type=str | Annotated[list[InputText | SaidRefusal], Field(max_length=MAX_PARTS)],
    ),
]


class InputMessage(RequestPart):
    """One turn."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Said


class InputCall(RequestPart):
    """A call of an earlier response."""

    type: Literal["function_call"]
    call_id: CallId
    name: CallId
    arguments: str


class CallOutput(RequestPart):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Said


class InputReasoning(RequestPart):
    """What was thought before an earlier response; `content` reaches templates that have a place for it."""

    type: Literal["reasoning"]
    summary: list[dict[str, Any]] | None = None
    content: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None


ITEMS: Mapping[str, type[RequestPart]] = {
    "message": InputMessage,
    "function_call": InputCall,
    "function_call_output": CallOutput,
    "reasoning": InputReasoning,
}
Item = Annotated[InputMessage | InputCall | CallOutput | InputReasoning, Field(discriminator="type")]


def _parse_input(value: object) -> object:
    """A text is a message of the user."""
    return [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else value


class FunctionTool(RequestPart):
    """A function that the model may call."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Parameters | None = None
    strict: bool | None = None


class ToolSelection(NamedTuple):
    """`tool_choice`, as it was sent, and as chat completions have it."""

    sent: Any
    chat: Any


class ChosenTool(RequestPart):
    """The tool that is to be called."""

    type: Literal["function"]
    name: str


class AllowedTool(RequestPart):
    """The only tools that may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenTool], Field(min_length=1, max_length=MAX_TOOLS)]


def _parse_choice(value: object) -> ToolSelection:
    if value in ("auto", "none", "required"):
        return ToolSelection(value, value)
    if isinstance(value, dict) and value.get("type") == "function" and value.keys() == {"type", "name"}:
        return ToolSelection(value, _chat_tool(value))
    if isinstance(value, dict) and value.get("type") == "allowed_tools" and value.keys() == {"type", "mode", "tools"}:
        tools = value["tools"]
        if isinstance(tools, list) and all(
            isinstance(tool, dict) and tool.keys() == {"type", "name"} and tool["type"] == "function" for tool in tools
        ):
            allowed = {"mode": value["mode"], "tools": [_chat_tool(tool) for tool in tools]}
            return ToolSelection(value, {"type": "allowed_tools", "allowed_tools": allowed})
    raise ValueError(
        "must be 'auto', 'none', 'required', {'type': 'function', 'name': ...} or {'type': 'allowed_tools', 'mode': "
        "'auto' or 'required', 'tools': [...]}"
    )


def _chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool["name"]}}


class PlainFormat(RequestPart):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class NamedSchemaFormat(RequestPart):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=MAX_ID)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class TextConfig(RequestPart):
    """What the text of the response shall be."""

    format: Annotated[PlainFormat | NamedSchemaFormat, Field(discriminator="type")] | None = None


class ReasoningConfig(RequestPart):
    """How much a base that thinks shall think."""

    effort: Effort | None = None


class NoStreamOptions(RequestPart):
    """How a stream is sent; there is one way."""


Label64 = Annotated[str, Field(max_length=MAX_KEY)]
Label512 = Annotated[str, Field(max_length=MAX_LABEL)]


class ResponsesRequest(RequestPart):
    """A conversation to be continued. Null stands for the default everywhere."""

    model: ModelName
    input: Annotated[
        list[Item],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
        BeforeValidator(_parse_input, json_schema_input_type=str | list[Item]),
        Field(description="the whole conversation, or a text that the user says"),
    ]
    instructions: Annotated[str | None, Field(description="what stands first, before all messages")] = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: (
        Annotated[
            ToolSelection,
            PlainValidator(
                _parse_choice,
                json_schema_input_type=Literal["auto", "none", "required"] | ChosenTool | AllowedTool,
            ),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: Annotated[TextConfig | None, Field(description="the shape of the reply")] = None
    reasoning: Annotated[ReasoningConfig | None, Field(description="how much a base that thinks shall think")] = None
    max_output_tokens: Annotated[Limit, Field(description="of the reply, thoughts included")] = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    include: Annotated[list[Included] | None, Field(max_length=MAX_INCLUDED, description="what is told besides")] = None
    top_logprobs: Annotated[
        Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None,
        Field(description="the likeliest tokens beside each of a message; asks for log probabilities by itself"),
    ] = None
    metadata: Annotated[
        Annotated[dict[Label64, Label512], Field(max_length=MAX_LABELS)] | None,
        Field(description="the caller's labels, sent back with the response"),
    ] = None
    stream: bool | None = None
    stream_options: Annotated[NoStreamOptions | None, Field(description="streams are sent in one way")] = None
    # ours
    adapters: Annotated[list[AdapterPart], Field(min_length=1, max_length=MAX_ADAPTERS)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX)] | None = None
    chat_template_kwargs: TemplateVariables | None = None

    @property
    def tells_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)


def parse_response(raw: bytes) -> ResponsesRequest:
    """Raises RequestError."""
    problems = Problems()
    fields = problems.known(json_object(raw), frozenset(ResponsesRequest.model_fields), BESIDE)
    if isinstance(fields.get("input"), list):
        fields["input"] = [
            _item(item, index, problems) for index, item in enumerate(fields["input"][: MAX_MESSAGES + 1])
        ]
    if isinstance(fields.get("tools"), list):
        names = frozenset(FunctionTool.model_fields)
        fields["tools"] = objects(fields["tools"], MAX_TOOLS, "tools", names, TOOL_OPTIONS, problems)
    for name, kind, options in (
        ("text", TextConfig, TEXT_OPTIONS),
        ("reasoning", ReasoningConfig, REASONING_OPTIONS),
        ("stream_options", NoStreamOptions, STREAM_OPTIONS),
    ):
        if isinstance(inner := fields.get(name), dict):
            fields[name] = problems.known(inner, frozenset(kind.model_fields), options, f"{name}.")
    try:
        return problems.validated(ResponsesRequest, fields)
    except RequestError as error:
        raise RequestError(
            _untagged(str(error)), param=_untagged(error.param or "") or None, code=error.code
        ) from error


def _untagged(text: str) -> str:
    """Places without the kind of what stands there, which pydantic names too."""
    return _TAG.sub(r"\1", text)


def _item(item: Any, index: int, problems: Problems) -> Any:
    """An item less the options of its that are taken. A message may leave out its type."""
    if not isinstance(item, dict):
        return item
    item = item if "type" in item or "role" not in item else {"type": "message", **item}
    kind = ITEMS.get(item["type"]) if isinstance(item.get("type"), str) else None
    if kind is None:
        return item
    if kind is CallOutput:  # what it is the output of, its call says
        item = {name: value for name, value in item.items() if name != "name"}
    return problems.known(item, frozenset(kind.model_fields), ITEM_OPTIONS, f"input.{index}.")
