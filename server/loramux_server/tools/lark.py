"""Grammars of calls, in llguidance's dialect of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from loramux_server.tools.call_bodies import is_text
from loramux_server.tools.calls import AddedTokens, Tool

# as templates write JSON, and as models have seen it: json.dumps with nothing said
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Form(NamedTuple):
    """How calls are written: before, then each call with `between` between them, then behind.

    A call is opening + name + naming + arguments + closing.

    Attributes:
        tags: arguments stand between tags of their own (`<parameter=key>`), not as JSON.
    """

    opening: str
    naming: str
    closing: str
    before: str = ""
    between: str = ""
    behind: str = ""
    tags: bool = False


class Thought(NamedTuple):
    """Thinking that the prompt has opened: the reply first ends it."""

    start: str
    end: str


def lark_of(
    form: Form, tools: Sequence[Tool], added: AddedTokens, *, several: bool, thought: Thought | None = None
) -> str:
    """The grammar of one call of these tools, or of `several`."""
    rules: list[str] = []
    write = LarkWriter(added)
    any_call = "call"
    more = f" ({write(form.between)} {any_call})*" if several else ""
    first = ""
    if thought is not None:
        first = "thought "
        rules += write.until("thought", "THINKING", thought.end, behind=r" /[ \n]{0,4}/")
    rules.insert(0, f"start: {first}{write(form.before)} {any_call}{more} {write(form.behind)}")
    rules.append(f"{any_call}: {' | '.join(f'call_{place}' for place in range(len(tools)))}")
    for place, tool in enumerate(tools):
        rule = f"arguments_{place}"
        head, tail = write(form.opening + tool.name + form.naming), write(form.closing)
        rules.append(f"call_{place}: {head} {rule} {tail}")
        none = {"additionalProperties": False}
        schema = {"type": "object", **(none if tool.parameters is None else tool.parameters)}
        rules += _tagged(write, rule, schema) if form.tags else [f"{rule}: {_json(schema)}"]
    return "%llguidance {}\n" + "\n".join(rules) + "\n"


class LarkWriter:
    """Text as Lark: strings, and added tokens by their numbers."""

    def __init__(self, added: AddedTokens) -> None:
        self._ids = added.ids
        self._hidden = added.hidden
        tokens = sorted((text for text in added.ids if text.strip()), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def __call__(self, text: str) -> str:
        written, at = [], 0
        for found in self._token.finditer(text):
            written += [_string(text[at : found.start()]), f"<[{self._ids[found[0]]}]>"]
            at = found.end()
        return " ".join(piece for piece in (*written, _string(text[at:])) if piece != '""')

    def until(self, rule: str, terminal: str, end: str, *, behind: str = "") -> list[str]:
        """Rules for any text up to its end tag, and the tag. Tokens that are shown may stand in the text."""
        if end not in self._ids:
            return [f"{rule}: {rule}_text{behind}", rf"{rule}_text[lazy]: /(.|\n)*/ {_string(end)}"]
        shown = [f"<[{number}]>" for text, number in self._ids.items() if text != end and text not in self._hidden]
        return [f"{rule}: ({' | '.join((terminal, *shown))})* {self(end)}{behind}", rf"{terminal}: /(.|\n)+/"]


def _tagged(write: LarkWriter, rule: str, schema: Mapping[str, Any]) -> list[str]:
    """Each argument between tags of its own, in the schema's order."""
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    required = schema.get("required", [])
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts, rules = [], []
    for place, (key, wanted) in enumerate(properties.items()):
        one, end = f"{rule}_{place}", "\n</parameter>\n"
        wanted = wanted if isinstance(wanted, dict) else {}
        # the key as a string: a caller's text is no special token
        head = " ".join(filter(None, (write("<parameter="), key and _string(key), write(">\n"))))
        choices = wanted.get("enum", [wanted["const"]] if "const" in wanted else None)
        if is_text(wanted) and choices is not None:
            rules.append(f"{one}: {head} ({' | '.join(map(_string, choices))}) {write(end)}")
        elif is_text(wanted):
            rules += [f"{one}: {head} {one}_value", *write.until(f"{one}_value", f"VALUE_{rule.upper()}_{place}", end)]
        else:
            rules.append(f"{one}: {head} {_json({**wanted, **definitions})} {write(end)}")
        parts.append(one if key in required else f"{one}?")
    return [f"{rule}: {' '.join(parts) or _string('')}", *rules]


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _COMPACT}, ensure_ascii=False)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
