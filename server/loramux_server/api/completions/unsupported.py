"""Options of OpenAI's API that are not supported: taken at the value that changes nothing, else refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loramux_server.errors import RequestError

Neutral = Callable[[object], bool]  # whether a value (never null) asks for nothing

MAX_LABEL = 512


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


_GENERATION: dict[str, Neutral] = {
    "n": _equals(1),
    "frequency_penalty": _equals(0),
    "presence_penalty": _equals(0),
    "repetition_penalty": _equals(1),
    "logit_bias": _empty,
    "user": _label,
    "metadata": _labels,
    "min_tokens": _equals(0),
}

CHAT: Mapping[str, Neutral] = _GENERATION | {
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
COMPLETION: Mapping[str, Neutral] = _GENERATION | {
    "best_of": _equals(1),
    "echo": _equals(False),
    "suffix": _equals(""),
}
STREAM_OPTIONS: Mapping[str, Neutral] = {"include_obfuscation": _equals(False)}
# What clients send back when they repeat an assistant's message from an earlier reply.
MESSAGE: Mapping[str, Neutral] = {
    "name": _never,
    "refusal": _never,
    "audio": _never,
    "annotations": _empty,
    "tool_calls": _empty,
    "function_call": _never,
    "reasoning_content": _never,
}


def without_neutral(fields: Mapping[str, Any], table: Mapping[str, Neutral], prefix: str = "") -> dict[str, Any]:
    """The fields that are not in `table`. Raises RequestError for one that is, at any value but null or its neutral."""
    rest = {}
    for name, value in fields.items():
        neutral = table.get(name)
        if neutral is None:
            rest[name] = value
        elif value is not None and not neutral(value):
            raise RequestError(f"'{prefix}{name}' is not supported yet", param=f"{prefix}{name}", code="unsupported")
    return rest
