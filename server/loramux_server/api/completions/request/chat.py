"""The body of POST /v1/chat/completions: messages, and what a caller may say about how they become a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from loramux_server.api.completions.request.fields import Limit, RequestPart
from loramux_server.api.completions.request.generation import GenerationRequest, objects, parsed
from loramux_server.api.completions.request.options import MAX_LABEL, MESSAGE_OPTIONS, PART_OPTIONS, by_name, unserved
from loramux_server.api.completions.request.problems import Problems, Unsupported
from loramux_server.api.completions.request.tools import (
    MAX_ID,
    CalledFunction,
    Calling,
    CallMade,
    EarlierCalls,
    FunctionChoice,
    Functions,
    Selection,
    ToolChoice,
    Tools,
    calling_of,
)
from loramux_server.api.http.json_object import json_object
from loramux_server.errors import RequestError

MAX_MESSAGES = 2048
MAX_PARTS = 256
MAX_TEMPLATE_VARIABLES = 64

# A template gets these from us, or they are arguments of what renders it.
RESERVED_VARIABLES = frozenset(
    "messages conversation tools documents chat_template add_generation_prompt continue_final_message tokenize "
    "sanitize_control_tokens padding truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs bos_token eos_token unk_token sep_token pad_token cls_token mask_token "
    "additional_special_tokens raise_exception strftime_now".split()
)

_CHAT = unserved("chat")
MESSAGE = by_name(MESSAGE_OPTIONS)
PART = by_name(PART_OPTIONS)


def _parse_content(value: object) -> str:
    """A text, or a list of text parts, which become lines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not 0 < len(value) <= MAX_PARTS:
        raise ValueError(f"must be a string or a list of 1 to {MAX_PARTS} text parts")
    return "\n".join(map(_parse_part, value))


def _parse_part(part: object) -> str:
    """The text of a text part; a refusal in an earlier reply reads as its text."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in ("text", "refusal"):
        refused = Unsupported if isinstance(kind, str) else ValueError
        raise refused("only parts of type 'text' are supported")
    if not isinstance(part.get(kind), str):
        raise ValueError(f"a {kind} part must be {{'type': '{kind}', '{kind}': a string}}")
    for name, value in part.items():
        if name not in ("type", kind) and (name not in PART or not PART[name].takes(value)):
            raise ValueError(f"a {kind} part cannot have {ascii(name[:64])}")
    text: str = part[kind]
    return text


def _parse_variables(value: object) -> object:
    """Variables of a chat template: names that are free there."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_TEMPLATE_VARIABLES:
        raise ValueError(f"must be at most {MAX_TEMPLATE_VARIABLES} variables, not {len(value)}")
    for name in value:
        if name in RESERVED_VARIABLES or name.startswith("_"):
            raise ValueError(f"{ascii(name[:64])} is not a caller's to set")
        if not (name.isascii() and name.isidentifier()):
            raise ValueError(f"{ascii(name[:64])} is no name of a variable")
    return value


class TextPart(RequestPart):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


# What `json_schema_input_type` says is for the API's description; the function before it decides.
Content = Annotated[
    str,
    BeforeValidator(
        _parse_content,
        json_schema_input_type=str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)] | None,
    ),
]
TemplateVariables = Annotated[
    dict[str, Any],
    BeforeValidator(_parse_variables),
    Field(
        max_length=MAX_TEMPLATE_VARIABLES,
        json_schema_extra={
            "propertyNames": {"pattern": "^[A-Za-z][A-Za-z0-9_]*$", "not": {"enum": [*sorted(RESERVED_VARIABLES)]}}
        },
    ),
]


class ChatMessage(RequestPart):
    """One turn. An assistant's earlier reply may have null for its content, and calls in its place."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"role": {"const": "assistant"}}},
            "then": {
                "not": {
                    "required": ["tool_calls", "function_call"],
                    "properties": {"tool_calls": {"type": "array", "minItems": 1}, "function_call": {"type": "object"}},
                }
            },
            "else": {
                "properties": {
                    "content": {"not": {"type": "null"}},
                    **{name: {"type": "null"} for name in ("function_call", "reasoning_content", "reasoning")},
                    "tool_calls": {"anyOf": [{"type": "null"}, {"maxItems": 0}]},
                }
            },
        }
    )
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content
    name: Annotated[str, Field(max_length=MAX_LABEL)] | None = None
    tool_calls: EarlierCalls | None = None
    function_call: CalledFunction | None = None
    tool_call_id: Annotated[str, Field(max_length=MAX_ID)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def calls(self) -> Sequence[CallMade]:
        """What an earlier reply called."""
        if self.function_call is not None:
            return (CallMade(type="function", function=self.function_call),)
        return self.tool_calls or ()

    @property
    def thought(self) -> str | None:
        """What an earlier reply thought before it spoke."""
        return self.reasoning if self.reasoning_content is None else self.reasoning_content

    @property
    def characters(self) -> int:
        """Of all its texts."""
        said = sum(len(call.function.name) + len(str(call.function.arguments)) for call in self.calls)
        return said + len(self.content) + len(self.thought or "")

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        """What only some roles may have."""
        if self.role != "assistant":
            for name in ("tool_calls", "function_call", "reasoning_content", "reasoning"):
                if getattr(self, name) not in (None, []):
                    raise ValueError(f"only a message of the assistant has '{name}'")
        if self.function_call is not None and self.tool_calls:
            raise ValueError("a message has 'tool_calls' or 'function_call', not both")
        return self


class TemplateOptions(RequestPart):
    """What a caller may say about how messages become a prompt."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    continue_final_message: bool | None = None
    tools: Tools | None = None

    @property
    def opens_turn(self) -> bool:
        """Whether the prompt ends where the assistant's turn begins."""
        return self.add_generation_prompt is not False and not self.continue_final_message

    @property
    def calling(self) -> Calling | None:
        """The tools of the reply; None if it may use none."""
        return calling_of([tool.function for tool in self.tools or ()], Selection(), parallel=True, place="tools")

    def check_last_message(self) -> None:
        """Raises RequestError where the last message shall be continued and cannot be."""
        if not self.continue_final_message:
            return
        if self.add_generation_prompt:
            raise RequestError(
                "'continue_final_message' goes on with the last message, and 'add_generation_prompt' begins another: "
                "send one of them",
                param="continue_final_message",
                code="invalid_value",
            )
        last = self.messages[-1]
        if last.role != "assistant" or last.calls:
            raise RequestError(
                "'continue_final_message' goes on with what the assistant says: the last message must be of the "
                "assistant, with content and without calls",
                param="continue_final_message",
                code="invalid_value",
            )

    @property
    def template_variables(self) -> dict[str, Any]:
        """Beside the messages. Templates of reasoning models know an effort as one of two variables."""
        effort = self.reasoning_effort
        told = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        return told | (self.chat_template_kwargs or {})


class ChatRequest(GenerationRequest, TemplateOptions):
    """A conversation to be continued."""

    max_completion_tokens: Limit = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Functions | None = None
    function_call: FunctionChoice | None = None
    include_reasoning: bool | None = None

    @property
    def calling(self) -> Calling | None:
        if self.functions or self.function_call is not None:
            return calling_of(
                self.functions or (),
                self.function_call or Selection(),
                parallel=False,
                place="functions",
                as_functions=True,
            )
        return calling_of(
            [tool.function for tool in self.tools or ()],
            self.tool_choice or Selection(),
            parallel=self.parallel_tool_calls is not False,
            place="tools",
        )

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def longest_reply(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> Self:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("'top_logprobs' is only allowed when 'logprobs' is true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("'max_tokens' and 'max_completion_tokens' differ; give one", param="max_tokens")
        if self.tools and self.functions:
            raise RequestError("'functions' is the old name of 'tools'; send one of them", param="functions")
        self.check_last_message()
        assert self.calling is None or self.calling.tools  # it was looked for, and raises what is wrong with it
        return self


def parse_chat(raw: bytes) -> ChatRequest:
    """Raises RequestError."""
    return chat_request(json_object(raw))


def chat_request(fields: Mapping[str, Any]) -> ChatRequest:
    """Of a body's fields. Raises RequestError."""
    problems = Problems()
    return parsed(ChatRequest, _CHAT, with_messages(fields, problems), problems).check()


def with_messages(fields: Mapping[str, Any], problems: Problems) -> Mapping[str, Any]:
    """The fields of a body, the messages in it less the options of theirs that are taken."""
    if not isinstance(messages := fields.get("messages"), list):
        return fields
    names = frozenset(ChatMessage.model_fields)
    turns = [_with_content(turn) for turn in messages[: MAX_MESSAGES + 1]]
    return {**fields, "messages": objects(turns, MAX_MESSAGES, "messages", names, MESSAGE, problems)}


def _with_content(turn: Any) -> Any:
    """An assistant's earlier reply may be a refusal, or have called a tool and said nothing."""
    if isinstance(turn, dict) and turn.get("role") == "assistant" and turn.get("content") is None:
        refusal = turn.get("refusal")
        return turn | {"content": refusal if isinstance(refusal, str) else ""}
    return turn
