"""What is wrong with a request, all of it at once: found within bounds, told within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from loramux_adapters.artifact.reading.strict_json import quoted
from loramux_server.api.completions.request.options import Option
from loramux_server.did_you_mean import suggest
from loramux_server.errors import RequestError

MAX_TOLD = 20  # problems that one answer spells out
MAX_SHOWN = 128  # characters of a name that a stranger wrote
MAX_FIELDS = 64  # of an object inside a request
_HINTED = 3  # problems; looking for what was meant takes its time
_MAX_HINTED_NAME = 40  # characters

Model = TypeVar("Model", bound=BaseModel)


class Unsupported(ValueError):
    """Of a value that others serve and this server does not; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Problem:
    """`param` is the place, as in `messages.0.content`."""

    message: str
    param: str
    code: str = "invalid_value"


@dataclass(slots=True)
class Problems:
    """Collects them. The first to be found decides the answer's `param` and `code`."""

    found: list[Problem] = field(default_factory=list)

    def known(
        self, fields: Mapping[str, Any], names: frozenset[str], options: Mapping[str, Option], place: str = ""
    ) -> dict[str, Any]:
        """The fields with these names. Any other is one of `options` at a value that it takes, or a problem.

        `place` goes before the names of fields, as in `messages.0.`.
        """
        if place and len(fields) > MAX_FIELDS:
            self._add(f"'{place[:-1]}' has {len(fields)} fields; at most {MAX_FIELDS} are taken", place[:-1])
            return {}
        rest = {}
        for name, value in fields.items():
            if name in names:
                rest[name] = value
            elif (option := options.get(name)) is None:
                param = (place + name)[:MAX_SHOWN]
                hint = suggest(name, names) if len(self.found) < _HINTED and len(name) <= _MAX_HINTED_NAME else ""
                self._add(f"unknown parameter {quoted(param)}{hint}", param, "unknown_parameter")
            elif not option.takes(value):
                self._add(option.refusal(place), place + name, "unsupported_parameter")
        return rest

    def validated(self, kind: type[Model], fields: Mapping[str, Any]) -> Model:
        """A model of these fields. Raises RequestError with all that was found by then, and is wrong with them."""
        try:
            model = kind.model_validate(fields)
        except ValidationError as error:
            self.found += map(_problem, error.errors(include_url=False, include_input=False))
        self.raise_any()
        return model

    def raise_any(self) -> None:
        """Raises RequestError if anything was found."""
        if not self.found:
            return
        told = "; ".join(problem.message for problem in self.found[:MAX_TOLD])
        more = f"; and {len(self.found) - MAX_TOLD} more" if len(self.found) > MAX_TOLD else ""
        raise RequestError(told + more, param=self.found[0].param, code=self.found[0].code)

    def _add(self, message: str, param: str, code: str = "invalid_value") -> None:
        self.found.append(Problem(message, param, code))


def _problem(error: Mapping[str, Any]) -> Problem:
    """One error of pydantic's in OpenAI's terms."""
    param = ".".join(str(part) for part in error["loc"])[:MAX_SHOWN]
    shown = quoted(param)
    if error["type"] == "missing":
        return Problem(f"missing parameter {shown}", param, "missing_required_parameter")
    if error["type"] == "model_type":
        return Problem(f"{shown}: should be an object", param)
    if error["type"] == "extra_forbidden":
        return Problem(f"unknown parameter {shown}", param, "unknown_parameter")
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    raised = error.get("ctx", {}).get("error")
    code = "unsupported_value" if isinstance(raised, Unsupported) else "invalid_value"
    return Problem(f"{shown}: {message[0].lower()}{message[1:]}", param, code)
