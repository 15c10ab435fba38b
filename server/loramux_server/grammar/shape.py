"""What a reply shall be, in a client's terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Shape:
    """
    Attributes:
        kind: what `value` is. "json_object": nothing (None), any JSON object; "json_schema": a JSON schema, parsed;
            "regex": a pattern that the whole reply matches; "choice": a list of texts, one of which is the reply;
            "lark": a grammar in llguidance's dialect of Lark.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "lark"]
    value: Any = None
