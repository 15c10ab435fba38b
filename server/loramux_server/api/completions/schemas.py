"""Bodies of the generation requests: strict, bounded, and every refusal names its parameter.

A field of a model here is an option that works; `options` says what becomes of the others. Counts are bounded before
anything is validated, and all that is wrong with a request is told at once, up to a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from loramux_server.api.completions.options import (
    MESSAGE_OPTIONS,
    PART_OPTIONS,
    STREAM_OPTIONS,
    Option,
    by_name,
    unserved,
)
from loramux_server.api.completions.problems import Model, Problems
from loramux_server.api.http.json_object import json_object
from loramux_server.errors import RequestError

MAX_MESSAGES = 2048
MAX_PARTS = 256
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_MODEL_LENGTH = 512
MAX_ADAPTERS = 8  # of one request
MAX_SCALE = 100.0
MAX_TEMPLATE_VARIABLES = 64
INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

# A template gets these from us, or they are arguments of what renders it.
RESERVED_VARIABLES = frozenset(
    "messages conversation tools documents chat_template add_generation_prompt continue_final_message tokenize "
    "sanitize_control_tokens padding truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs bos_token eos_token unk_token sep_token pad_token cls_token mask_token "
    "additional_special_tokens raise_exception strftime_now".split()
)

_CHAT = unserved("chat")
_COMPLETION = unserved("completions")
_TOKENIZE = "add_special_tokens continue_final_message chat_template tools media_io_kwargs mm_processor_kwargs".split()
TOKENIZE_CHAT = {name: _CHAT[name] for name in _TOKENIZE}
TOKENIZE_PROMPT = {"add_special_tokens": _COMPLETION["add_special_tokens"]}
STREAM = by_name(STREAM_OPTIONS)
MESSAGE = by_name(MESSAGE_OPTIONS)
PART = by_name(PART_OPTIONS)

Prompt = list[str] | list[list[int]]


def _parse_prompt(value: object) -> Prompt:
    """A prompt in any of OpenAI's four forms -> a list of texts or a list of token id lists, none of them empty."""
    prompts = value if isinstance(value, list) and not _is_int(value[0] if value else None) else [value]
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"must be at most {MAX_PROMPTS} prompts, not {len(prompts)}")
    if not prompts or any(prompt in ("", []) for prompt in prompts):
        raise ValueError("must not be empty")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) == len(prompts):
        return texts
    ids = [prompt for prompt in prompts if isinstance(prompt, list) and all(map(_is_int, prompt))]
    if len(ids) == len(prompts):
        return ids
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")


def _parse_stop(value: object) -> tuple[str, ...]:
    """Empty strings stop nothing."""
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"must be a string or a list of at most {MAX_STOPS} strings")
    if not all(len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"each string must have at most {MAX_STOP_LENGTH} characters")
    return tuple(stop for stop in stops if stop)


def _parse_limit(value: object) -> object:
    """-1 is how some clients write "as many as fit"."""
    return None if _is_int(value) and value == -1 else value


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
        raise ValueError("only parts of type 'text' are supported")
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


def _is_int(value: object) -> bool:
    return type(value) is int


class RequestPart(BaseModel):
    """An object of a request: strict, and with no field that is not declared."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, hide_input_in_errors=True)


class TextPart(RequestPart):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


ModelName = Annotated[str, Field(min_length=1, max_length=MAX_MODEL_LENGTH)]
# What `json_schema_input_type` says is for the API's description; the function before it decides.
Content = Annotated[
    str,
    BeforeValidator(
        _parse_content,
        json_schema_input_type=str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)] | None,
    ),
]
_Count = Annotated[int, Field(ge=1, le=INT32_MAX)]
Limit = Annotated[_Count | None, BeforeValidator(_parse_limit, json_schema_input_type=Literal[-1] | _Count | None)]
_VARIABLES = Field(
    max_length=MAX_TEMPLATE_VARIABLES,
    json_schema_extra={
        "propertyNames": {"pattern": "^[A-Za-z][A-Za-z0-9_]*$", "not": {"enum": [*sorted(RESERVED_VARIABLES)]}}
    },
)
_StopString = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    tuple[str, ...],
    BeforeValidator(
        _parse_stop,
        json_schema_input_type=_StopString | Annotated[list[_StopString], Field(max_length=MAX_STOPS)] | None,
    ),
]
_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Many = Field(min_length=1, max_length=MAX_PROMPTS)
AnyPrompt = Annotated[
    Prompt,
    PlainValidator(
        _parse_prompt,
        json_schema_input_type=_Text | Annotated[list[_Text], _Many] | _Ids | Annotated[list[_Ids], _Many],
    ),
]


class ChatMessage(RequestPart):
    """One turn. An assistant's earlier reply may have null for its content."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"role": {"const": "assistant"}}},
            "else": {"properties": {"content": {"not": {"type": "null"}}}},
        }
    )
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content

    @property
    def for_template(self) -> dict[str, str]:
        """`developer` is what newer clients call the system."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(RequestPart):
    """How a stream is sent."""

    include_usage: bool | None = None


class AdapterPart(RequestPart):
    """One adapter of a sum: its delta counts `scale` times."""

    name: ModelName
    scale: Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)] = 1.0


class TemplateOptions(RequestPart):
    """What a caller may say about how messages become a prompt."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_parse_variables), _VARIABLES] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    @property
    def opens_turn(self) -> bool:
        """Whether the prompt ends where the assistant's turn begins."""
        return self.add_generation_prompt is not False

    @property
    def template_variables(self) -> dict[str, Any]:
        """Beside the messages. Templates of reasoning models know an effort as one of two variables."""
        effort = self.reasoning_effort
        told = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        return told | (self.chat_template_kwargs or {})


class GenerationRequest(RequestPart):
    """What chat and completions have in common. Null stands for the default everywhere."""

    model: ModelName
    adapters: Annotated[list[AdapterPart], Field(min_length=1, max_length=MAX_ADAPTERS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX)] | None = None
    max_tokens: Limit = None
    stop: Stop = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report beside each token; None for no log probabilities at all."""
        raise NotImplementedError

    def check(self) -> Self:
        """What no single field can tell. Raises RequestError."""
        return self


class ChatRequest(GenerationRequest, TemplateOptions):
    """A conversation to be continued."""

    max_completion_tokens: Limit = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def longest_reply(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("'top_logprobs' is only allowed when 'logprobs' is true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("'max_tokens' and 'max_completion_tokens' differ; give one", param="max_tokens")
        return self


class CompletionRequest(GenerationRequest):
    """A text to be continued, or several."""

    prompt: AnyPrompt
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class TokenizeChatRequest(TemplateOptions):
    """A conversation whose tokens are asked for. No model is the base."""

    model: ModelName | None = None
    return_token_strs: bool | None = None


class TokenizePromptRequest(RequestPart):
    """A text whose tokens are asked for. No model is the base."""

    prompt: str
    model: ModelName | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestPart):
    """Tokens whose text is asked for. No model is the base."""

    tokens: list[int]
    model: ModelName | None = None


def parse_chat(raw: bytes) -> ChatRequest:
    """Raises RequestError."""
    return _parsed(ChatRequest, _CHAT, json_object(raw)).check()


def parse_completion(raw: bytes) -> CompletionRequest:
    """Raises RequestError."""
    return _parsed(CompletionRequest, _COMPLETION, json_object(raw)).check()


def parse_tokenize(raw: bytes) -> TokenizeChatRequest | TokenizePromptRequest:
    """With messages a conversation, else a text. Raises RequestError."""
    fields = json_object(raw)
    if "messages" in fields:
        return _parsed(TokenizeChatRequest, TOKENIZE_CHAT, fields)
    return _parsed(TokenizePromptRequest, TOKENIZE_PROMPT, fields)


def parse_detokenize(raw: bytes) -> DetokenizeRequest:
    """Raises RequestError."""
    return _parsed(DetokenizeRequest, {}, json_object(raw))


def _parsed(kind: type[Model], options: Mapping[str, Option], fields: Mapping[str, Any]) -> Model:
    """The fields of a body that are served; the others must be options that are taken. Raises RequestError."""
    problems = Problems()
    fields = problems.known(fields, frozenset(kind.model_fields), options)
    if isinstance(streaming := fields.get("stream_options"), dict):
        names = frozenset(StreamOptions.model_fields)
        fields["stream_options"] = problems.known(streaming, names, STREAM, "stream_options.")
    if isinstance(adapters := fields.get("adapters"), list):
        names = frozenset(AdapterPart.model_fields)
        fields["adapters"] = _objects(adapters, MAX_ADAPTERS, "adapters", names, {}, problems)
    if isinstance(messages := fields.get("messages"), list):
        names = frozenset(ChatMessage.model_fields)
        turns = [_with_content(turn) for turn in messages[: MAX_MESSAGES + 1]]
        fields["messages"] = _objects(turns, MAX_MESSAGES, "messages", names, MESSAGE, problems)
    return problems.validated(kind, fields)


def _objects(
    items: list[Any],
    limit: int,
    place: str,
    names: frozenset[str],
    options: Mapping[str, Option],
    problems: Problems,
) -> list[Any]:
    """Items of a list that are objects, less the options that are taken; one more than the limit, to be refused."""
    return [
        problems.known(item, names, options, f"{place}.{index}.") if isinstance(item, dict) else item
        for index, item in enumerate(items[: limit + 1])
    ]


def _with_content(turn: Any) -> Any:
    """An assistant's earlier reply may be a refusal, or have called a tool and said nothing."""
    if isinstance(turn, dict) and turn.get("role") == "assistant" and turn.get("content") is None:
        refusal = turn.get("refusal")
        return turn | {"content": refusal if isinstance(refusal, str) else ""}
    return turn
