"""The bodies of calls to /v1/keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model

from loramux_server.access.audit_file import MOST_ENTRIES
from loramux_server.access.caller import Scope
from loramux_server.access.tenant import BOUNDS
from loramux_server.api.completions.request.fields import RequestPart
from loramux_server.api.completions.request.problems import Problems
from loramux_server.api.http.json_object import json_object

MAX_SECONDS = 100 * 366 * 86400
MAX_NOTE = 200

Body = TypeVar("Body", bound=BaseModel)
_Seconds = Annotated[int, Field(ge=1, le=MAX_SECONDS)]
_Scope = Annotated[Scope, Field(strict=False)]  # its name, as JSON has it
_Note = Annotated[str, Field(max_length=MAX_NOTE, pattern=r"^[^\x00-\x1f\x7f]*$")]


class NewKey(RequestPart):
    """A key to be made. It is told in the reply, this one time."""

    tenant: Annotated[
        str | None, Field(description="whose it is; none is the operator's, or that of the tenant whose key asks")
    ] = None
    scopes: Annotated[list[_Scope], Field(min_length=1, max_length=len(Scope), description="what it may do")]
    note: Annotated[_Note | None, Field(description="for people, in lists")] = None
    expires_in: Annotated[_Seconds | None, Field(description="seconds until it is refused; never")] = None


class Rotation(RequestPart):
    """A new key in the place of another, with the same rights."""

    overlap: Annotated[
        int | None, Field(ge=0, le=MAX_SECONDS, description="seconds for which the old one is still taken; 0")
    ] = None


LimitsRequest: type[BaseModel] = create_model(
    "LimitsRequest",
    __doc__="Limits to change; null is none.",
    __base__=RequestPart,
    **{  # type: ignore[call-overload]
        name: (Annotated[int, Field(ge=least, le=most)] | None, None) for name, (least, most) in BOUNDS.items()
    },
)


class AuditQuery(RequestPart):
    """Which entries of the audit log."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False, frozen=True, hide_input_in_errors=True)

    tenant: str | None = None
    subject: str | None = None
    since: Annotated[float, Field(ge=0)] | None = None
    before: Annotated[int, Field(ge=1, le=2**62)] | None = None
    limit: Annotated[int, Field(ge=1, le=MOST_ENTRIES)] = 100


def parse_query(kind: type[Body], fields: Mapping[str, str]) -> Body:
    """Raises RequestError."""
    problems = Problems()
    return problems.validated(kind, problems.known(dict(fields), frozenset(kind.model_fields), {}))


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """Raises RequestError."""
    problems = Problems()
    fields = problems.known(json_object(raw), frozenset(kind.model_fields), {})
    return problems.validated(kind, {name: value for name, value in fields.items() if value is not None})
