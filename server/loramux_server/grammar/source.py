"""A shape -> what llguidance compiles, and how a reply is looked at when it ends."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from loramux_server.errors import RequestError
from loramux_server.grammar.limits import GrammarLimits
from loramux_server.grammar.patterns import check_pattern
from loramux_server.grammar.reply_check import Normal
from loramux_server.grammar.schema import normal_schema
from loramux_server.grammar.shape import Shape

# Where JSON may have white space: nothing, a space, or a line break and indentation. Never without end: a small model
# that is held to JSON and does not want to write it writes spaces until its tokens are used up.
WHITESPACE = r"\x20|\r?\n(?:\x20{0,40}|\t{0,20})"

_GBNF = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
# Texts, comments and patterns are passed over: what they say is no schema. One without an end goes on to the end:
# looked for again from each of its quotes, that would take the square of its length.
_INLINE_JSON = re.compile(
    r'"(?:\\.|[^"\\])*"?|(?://|\#)[^\n]*|/(?:\\.|[^/\\\n])+/?|(?P<schema>%json\s*(?=\{))', re.DOTALL
)


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """
    Attributes:
        text: for llguidance: its JSON of grammars.
        schema: that the whole reply is valid under; None where the grammar alone says what a reply is.
    """

    text: str
    schema: Normal | None = None


def source_of(shape: Shape, param: str, limits: GrammarLimits) -> GrammarSource:
    """Raises RequestError: the shape cannot be parsed, is too large, or has something that is not supported."""
    if shape.kind == "json_object":
        return _json_source({"type": "object"})
    if shape.kind == "json_schema":
        return _json_source(_satisfiable(shape.value, param, limits))
    if shape.kind == "choice":
        return _choice_source(shape.value, param, limits)
    if not isinstance(shape.value, str):
        raise RequestError(f"'{param}' must be a string", param=param, code="invalid_type")
    if shape.kind == "regex":
        check_pattern(shape.value, param, "the pattern", limits)
        from llguidance import regex_to_lark  # not above: a server that is never asked for a shape does without it

        return _of_lark(f"start: /{regex_to_lark(shape.value, '')}/")
    return _lark_source(shape.value, param, limits)


def _satisfiable(schema: Any, param: str, limits: GrammarLimits) -> Normal:
    normal = normal_schema(schema, param, limits)
    if normal is False:
        raise RequestError("the JSON schema at #: nothing is valid under it", param=param, code="invalid_value")
    return normal


def _json(schema: Normal) -> str:
    """Of Lark: this schema as a rule's body."""
    named = schema if isinstance(schema, dict) else {}
    return "%json " + json.dumps({**named, "x-guidance": {"whitespace_pattern": WHITESPACE}})


def _json_source(schema: Normal) -> GrammarSource:
    return _of_lark(f"start: {_json(schema)}", schema)


def _choice_source(texts: Any, param: str, limits: GrammarLimits) -> GrammarSource:
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(
            f"'{param}' must be a list of at least one text, none of them empty", param=param, code="invalid_value"
        )
    if len(texts) > limits.max_choices or sum(map(len, texts)) > limits.max_bytes:
        raise RequestError(
            f"'{param}' may have {limits.max_choices} texts and {limits.max_bytes} characters at most",
            param=param,
            code="invalid_value",
        )
    quoted = (json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts))
    return _of_lark(f"start: CHOICE\nCHOICE: {' | '.join(quoted)}")


def _lark_source(text: str, param: str, limits: GrammarLimits) -> GrammarSource:
    """llguidance's Lark, its `%json` schemas checked as any other; or GBNF, as xgrammar and llama.cpp take it."""
    if len(text.encode(errors="surrogatepass")) > limits.max_bytes:
        raise RequestError(f"the grammar has more than {limits.max_bytes} bytes", param=param, code="invalid_value")
    if _GBNF.search(text):
        text = _from_gbnf(text, param)
    parts, at = [], 0
    for found in _INLINE_JSON.finditer(text):
        if found["schema"] is None or found.start() < at:
            continue  # or within a schema
        try:
            schema, end = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the grammar's %json: {error}", param=param, code="invalid_value") from error
        normal = _satisfiable(schema, param, limits)
        parts += [text[at : found.start()], _json(normal)]
        at = end
    return _of_lark("".join([*parts, text[at:]]))


def _of_lark(text: str, schema: Normal | None = None) -> GrammarSource:
    """As a list of one grammar: text that begins with a brace would be read as such a list itself.

    A token may come if its text may: where the grammar leaves one text only, llguidance would otherwise spell it out to
    its end, however long, and let come only the first token of how the tokenizer would write it.
    """
    grammar = f'{text}\n%llguidance {{"no_forcing": true}}\n'
    return GrammarSource(json.dumps({"grammars": [{"lark_grammar": grammar}]}), schema)


def _from_gbnf(text: str, param: str) -> str:
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except (GbnfToLarkError, ValueError, KeyError, IndexError, AttributeError, AssertionError, RecursionError) as error:
        raise RequestError(f"the grammar cannot be read as GBNF: {error}", param=param, code="invalid_value") from error
