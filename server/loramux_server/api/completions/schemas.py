"""Bodies of the generation requests: strict, bounded, and every refusal names its parameter.

A field of `GenerationRequest`, `ChatRequest` or `CompletionRequest` is an option that works. The tables of neutral
values are OpenAI's options that do not: each is taken at the value that asks for nothing, and refused by name at any
other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import from_json

from loramux_server.errors import RequestError

MAX_MESSAGES = 2048
MAX_PARTS = 256
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_MODEL_LENGTH = 512
MAX_ADAPTERS = 8  # of one request
MAX_SCALE = 100.0
MAX_LABEL = 512
INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

Prompt = list[str] | list[list[int]]
Neutral = Callable[[object], bool]  # whether a value (never null) asks for nothing


def _parse_prompt(value: object) -> Prompt:
    """A prompt in any of OpenAI's four forms -> a list of texts or a list of token id lists, none of them empty."""
    prompts = value if isinstance(value, list) and not _is_int(value[0] if value else None) else [value]
    if not prompts or any(prompt in ("", []) for prompt in prompts):
        raise ValueError("must not be empty")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"must be at most {MAX_PROMPTS} prompts")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) == len(prompts):
        return texts
    ids = [prompt for prompt in prompts if isinstance(prompt, list) and all(map(_is_int, prompt))]
    if len(ids) == len(prompts):
        return ids
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")


def _parse_stop(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"must be at most {MAX_STOPS} strings")
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"each string must have 1 to {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _parse_content(value: object) -> str:
    """A text, or a list of text parts, which become lines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or len(value) > MAX_PARTS:
        raise ValueError(f"must be a string or a list of 1 to {MAX_PARTS} text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError("only parts of type 'text' are supported yet")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a text part must be {'type': 'text', 'text': a string}")
        texts.append(part["text"])
    return "\n".join(texts)


def _is_int(value: object) -> bool:
    return type(value) is int


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, hide_input_in_errors=True)


class ChatMessage(_Body):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_parse_content)]


class StreamOptions(_Body):
    include_usage: bool = False


class AdapterPart(_Body):
    """One adapter of a sum: its delta counts `scale` times."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_MODEL_LENGTH)]
    scale: Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)] = 1.0


class GenerationRequest(_Body):
    """What chat and completions have in common. Null stands for the default everywhere."""

    model: Annotated[str, Field(min_length=1, max_length=MAX_MODEL_LENGTH)]
    adapters: Annotated[list[AdapterPart], Field(min_length=1, max_length=MAX_ADAPTERS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_parse_stop)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report beside each token; None for no log probabilities at all."""
        raise NotImplementedError

    def check(self) -> Self:
        """What no single field can tell. Raises RequestError."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("'stream_options' is only allowed when 'stream' is true", param="stream_options")
        return self


class ChatRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def longest_reply(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("'top_logprobs' is only allowed when 'logprobs' is true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise RequestError("'max_tokens' and 'max_completion_tokens' differ; give one", param="max_tokens")
        return super().check()


class CompletionRequest(GenerationRequest):
    prompt: Annotated[Prompt, PlainValidator(_parse_prompt)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


def _equals(*values: object) -> Neutral:
    """One of these values; JSON's true is not 1 here."""
    return lambda given: any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in values)


def _empty(given: object) -> bool:
    return given in ([], {})


def _label(given: object) -> bool:
    """A caller's own label. It has no effect on a reply; nothing is done with it."""
    return isinstance(given, str) and len(given) <= MAX_LABEL


def _labels(given: object) -> bool:
    return isinstance(given, dict) and len(given) <= 16 and all(map(_label, given.values()))


def _never(given: object) -> bool:
    return False


_GENERATION_NEUTRAL: dict[str, Neutral] = {
    "n": _equals(1),
    "frequency_penalty": _equals(0),
    "presence_penalty": _equals(0),
    "repetition_penalty": _equals(1),
    "logit_bias": _empty,
    "user": _label,
    "metadata": _labels,
    "min_tokens": _equals(0),
}

_CHAT_NEUTRAL: Mapping[str, Neutral] = _GENERATION_NEUTRAL | {
    "response_format": _equals({"type": "text"}),
    "tools": _empty,
    "tool_choice": _equals("none"),
    "parallel_tool_calls": _equals(True),
    "functions": _empty,
    "function_call": _equals("none"),
    "modalities": _equals(["text"]),
    "audio": _never,
    "prediction": _never,
    "reasoning_effort": _never,
    "verbosity": _never,
    "moderation": _never,
    "web_search_options": _never,
    "store": _equals(False),
    "service_tier": _equals("auto", "default"),
    "safety_identifier": _label,
    "prompt_cache_key": _label,
    "prompt_cache_retention": _never,
    "prompt_cache_options": _never,
    "chat_template": _never,
    "chat_template_kwargs": _never,
}
_COMPLETION_NEUTRAL: Mapping[str, Neutral] = _GENERATION_NEUTRAL | {
    "best_of": _equals(1),
    "echo": _equals(False),
    "suffix": _equals(""),
}
_STREAM_NEUTRAL: Mapping[str, Neutral] = {"include_obfuscation": _equals(False)}
# What clients send back when they repeat an assistant's message from an earlier reply.
_MESSAGE_NEUTRAL: Mapping[str, Neutral] = {
    "name": _never,
    "refusal": _never,
    "audio": _never,
    "annotations": _empty,
    "tool_calls": _empty,
    "function_call": _never,
    "reasoning_content": _never,
}


def _without_neutral(fields: Mapping[str, Any], table: Mapping[str, Neutral], prefix: str = "") -> dict[str, Any]:
    """The fields that are not in `table`. Raises RequestError for one that is, at any value but null or its neutral."""
    rest = {}
    for name, value in fields.items():
        neutral = table.get(name)
        if neutral is None:
            rest[name] = value
        elif value is not None and not neutral(value):
            raise RequestError(f"'{prefix}{name}' is not supported yet", param=f"{prefix}{name}", code="unsupported")
    return rest


def parse_chat(raw: bytes) -> ChatRequest:
    """Raises RequestError."""
    fields = _without_neutral(_object(raw), _CHAT_NEUTRAL)
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [
            _without_neutral(message, _MESSAGE_NEUTRAL, f"messages.{index}.") if isinstance(message, dict) else message
            for index, message in enumerate(fields["messages"][: MAX_MESSAGES + 1])
        ]
    return _validated(ChatRequest, fields).check()


def parse_completion(raw: bytes) -> CompletionRequest:
    """Raises RequestError."""
    return _validated(CompletionRequest, _without_neutral(_object(raw), _COMPLETION_NEUTRAL)).check()


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError("the request body is not valid JSON") from error
    if not isinstance(value, dict):
        raise RequestError("the request body must be a JSON object")
    if isinstance(value.get("stream_options"), dict):
        value["stream_options"] = _without_neutral(value["stream_options"], _STREAM_NEUTRAL, "stream_options.")
    return value


Parsed = TypeVar("Parsed", bound=GenerationRequest)


def _validated(kind: type[Parsed], fields: Mapping[str, Any]) -> Parsed:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> RequestError:
    """The first thing that is wrong, in OpenAI's terms."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"])
    shown = ascii(param[:128])
    if first["type"] == "extra_forbidden":
        return RequestError(f"unknown parameter {shown}", param=param[:128], code="unknown_parameter")
    if first["type"] == "missing":
        return RequestError(f"missing parameter {shown}", param=param[:128], code="missing_required_parameter")
    if first["type"] == "model_type":
        return RequestError(f"{shown}: should be an object", param=param[:128], code="invalid_value")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return RequestError(f"{shown}: {message[0].lower()}{message[1:]}", param=param[:128], code="invalid_value")
