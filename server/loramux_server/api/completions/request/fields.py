"""What the bodies of generation requests are made of: strict parts, bounded counts, and types of single fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_IDS = 128
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_ALLOWED_IDS = 2**17
MAX_WORDS = 256
MAX_WORD_LENGTH = 256
MAX_CHOICES = 128  # of one request: replies to one prompt, times prompts
MAX_MODEL_LENGTH = 512
INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


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
    return None if is_int(value) and value == -1 else value


def _parse_whole(value: object) -> object:
    """1.0 is a whole number in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _parse_biases(value: object) -> tuple[tuple[int, float], ...] | None:
    """Token ids are names of fields in JSON, so they come as strings."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError('must be an object of token ids and numbers, as in {"42": -100}')
    if len(value) > MAX_BIASES:
        raise ValueError(f"must have at most {MAX_BIASES} tokens, not {len(value)}")
    found: dict[int, float] = {}
    for name, bias in value.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise ValueError(f"{ascii(name[:64])} is no token id")
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise ValueError(f"the bias of {name} must be a number from {-MAX_BIAS:.0f} to {MAX_BIAS:.0f}")
        if int(name) in found:
            raise ValueError(f"the token {int(name)} is there twice")
        found[int(name)] = float(bias)
    return tuple(found.items())


def is_int(value: object) -> bool:
    return type(value) is int


class RequestPart(BaseModel):
    """An object of a request: strict, and with no field that is not declared."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, hide_input_in_errors=True)


ModelName = Annotated[str, Field(min_length=1, max_length=MAX_MODEL_LENGTH)]
# What `json_schema_input_type` says is for the API's description; the function before it decides.
_Count = Annotated[int, Field(ge=1, le=INT32_MAX)]
_CountOrNone = Annotated[int, Field(ge=0, le=INT32_MAX)]
Limit = Annotated[_Count | None, BeforeValidator(_parse_limit, json_schema_input_type=Literal[-1] | _Count | None)]
LimitOrNone = Annotated[
    _CountOrNone | None, BeforeValidator(_parse_limit, json_schema_input_type=Literal[-1] | _CountOrNone | None)
]
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES), BeforeValidator(_parse_whole)]
Tokens = Annotated[int, Field(ge=0, le=INT32_MAX), BeforeValidator(_parse_whole)]
_StopString = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    tuple[str, ...],
    BeforeValidator(
        _parse_stop,
        json_schema_input_type=_StopString | Annotated[list[_StopString], Field(max_length=MAX_STOPS)] | None,
    ),
]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
_BIASES: dict[str, Any] = {"maxProperties": MAX_BIASES, "propertyNames": {"pattern": "^[0-9]{1,10}$"}}
_BiasObject = Annotated[dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]], Field(json_schema_extra=_BIASES)]
Biases = Annotated[
    tuple[tuple[int, float], ...] | None, BeforeValidator(_parse_biases, json_schema_input_type=_BiasObject | None)
]
Word = Annotated[str, Field(min_length=1, max_length=MAX_WORD_LENGTH)]
