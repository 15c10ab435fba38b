"""What a client says of a reply's shape -> one `Shape`: OpenAI's `response_format`, and vLLM's names for the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, PlainValidator

from loramux_adapters.artifact.reading.strict_json import StrictJSONError, parse_object
from loramux_server.api.completions.request.fields import RequestPart
from loramux_server.api.completions.request.problems import Unsupported
from loramux_server.grammar.shape import Shape

MAX_CHOICE_TEXTS = 1024
_FORMATS = "'text', 'json_object' or 'json_schema'"
_STRUCTURED = ("json", "regex", "choice", "grammar", "json_object")
_INSTEAD = {
    "structural_tag": "use 'json', or 'tools' for calls of functions",
    "whitespace_pattern": "write it into the pattern or the grammar",
}
_UNSHAPED = {"disable_any_whitespace": False, "disable_additional_properties": False}  # taken at these values


class AskedShape(NamedTuple):
    """What a reply shall be, and which parameter says so."""

    shape: Shape
    param: str


def _parse_response_format(value: object) -> Shape | None:
    """OpenAI's object. A schema is always kept to, whatever `strict` says."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str):
        raise ValueError(f"must be an object whose 'type' is {_FORMATS}")
    if kind == "structural_tag":
        raise Unsupported("'structural_tag' is not supported; use 'json_schema', or 'tools' for calls of functions")
    if kind not in ("text", "json_object", "json_schema"):
        raise ValueError(f"its 'type' must be {_FORMATS}")
    if kind == "json_schema" and "schema" in value and "json_schema" not in value:
        raise ValueError(
            "'schema' stands in 'json_schema': {'type': 'json_schema', 'json_schema': {'name': ..., 'schema': {...}}}"
        )
    _refuse_others(value, ("type", "json_schema") if kind == "json_schema" else ("type",))
    if kind == "text":
        return None
    if kind == "json_object":
        return Shape("json_object")
    return _schema_format(value.get("json_schema"))


def _schema_format(value: object) -> Shape:
    if not isinstance(value, dict):
        raise ValueError("with the type 'json_schema' it must have 'json_schema', an object with a 'schema'")
    _refuse_others(value, ("name", "description", "schema", "strict"), "json_schema.")
    for name, kind, words in (("name", str, "a string"), ("description", str, "a string"), ("strict", bool, "a bool")):
        if value.get(name) is not None and not isinstance(value[name], kind):
            raise ValueError(f"'json_schema.{name}' must be {words}")
    if value.get("schema") is None:
        return Shape("json_object")
    return Shape("json_schema", _schema(value["schema"], "'json_schema.schema'"))


def _schema(value: object, where: str = "") -> Any:
    """A JSON schema: an object, or true for any JSON."""
    if not isinstance(value, dict) and value is not True:
        raise ValueError(f"{where} must be a JSON schema, which is an object".strip())
    return value


def _parse_json(value: object) -> Shape | None:
    """A schema as an object, or as text."""
    if isinstance(value, str):
        try:
            value = parse_object(value.encode(), limit=len(value.encode()))
        except StrictJSONError as error:
            raise ValueError(f"must be a JSON schema, but the text {error}") from error
    return None if value is None else Shape("json_schema", _schema(value))


def _parse_regex(value: object) -> Shape | None:
    return None if value is None else Shape("regex", _text(value, "a pattern"))


def _parse_grammar(value: object) -> Shape | None:
    return None if value is None else Shape("lark", _text(value, "a grammar"))


def _parse_choice(value: object) -> Shape | None:
    if value is None:
        return None
    texts = value if isinstance(value, list) else []
    if not 0 < len(texts) <= MAX_CHOICE_TEXTS or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"must be a list of 1 to {MAX_CHOICE_TEXTS} texts that are not empty")
    return Shape("choice", texts)


def _parse_json_object(value: object) -> Shape | None:
    if value is not None and not isinstance(value, bool):
        raise ValueError("should be a valid boolean")
    return Shape("json_object") if value else None


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"must be {what}, a text that is not empty")
    return value


_READERS = {
    "json": _parse_json,
    "regex": _parse_regex,
    "choice": _parse_choice,
    "grammar": _parse_grammar,
    "json_object": _parse_json_object,
}


def _parse_structured_outputs(value: object) -> Shape | None:
    """vLLM's object: one of its five fields says the shape."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    for name, taken in _UNSHAPED.items():
        if value.get(name) not in (None, taken):
            raise Unsupported(f"'{name}' is not supported; write it into the schema or the pattern")
    for name, instead in _INSTEAD.items():
        if value.get(name) is not None:
            raise Unsupported(f"'{name}' is not supported; {instead}")
    _refuse_others(value, (*_STRUCTURED, *_UNSHAPED, *_INSTEAD))
    found: list[Shape] = []
    for name, read in _READERS.items():
        try:
            shape = read(value.get(name))
        except ValueError as error:
            raise ValueError(f"'{name}' {error}") from error
        found += [] if shape is None else [shape]
    if len(found) != 1:
        raise ValueError(f"must have exactly one of {', '.join(_STRUCTURED)}, not {len(found)}")
    return found[0]


def _refuse_others(value: Mapping[str, object], names: tuple[str, ...], place: str = "") -> None:
    for name, one in value.items():
        if name not in names and one is not None:
            raise ValueError(f"{ascii((place + name)[:64])} is none of its fields, which are {', '.join(names)}")


class JsonSchemaFormat(RequestPart):
    """A schema that the reply keeps to, always: `strict` changes nothing."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None
    strict: bool | None = None


class FreeFormat(RequestPart):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(RequestPart):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(RequestPart):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[list[_Text], Field(min_length=1, max_length=MAX_CHOICE_TEXTS)]


def _only(name: str) -> dict[str, Any]:
    """For the description: an object that says its shape in this field."""
    said: dict[str, Any] = {"enum": [True]} if name == "json_object" else {"not": {"type": "null"}}
    return {"properties": {name: said}, "required": [name]}


class StructuredOutputs(RequestPart):
    """The shape of a reply, in vLLM's words: exactly one of the first five."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [*map(_only, _STRUCTURED)]})
    json_: Annotated[dict[str, Any] | _Text | None, Field(alias="json")] = None
    regex: _Text | None = None
    choice: _Texts | None = None
    grammar: _Text | None = None
    json_object: bool | None = None
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None


# What `json_schema_input_type` says is for the API's description; the function before it decides.
# Each is a `Shape` or None, which is not written here: the description would have it too.
_Format = FreeFormat | JsonObjectFormat | SchemaFormat
FormatOption = Annotated[Any, PlainValidator(_parse_response_format, json_schema_input_type=_Format | None)]
JsonOption = Annotated[
    Any, PlainValidator(_parse_json, json_schema_input_type=dict[str, Any] | _Text | Literal[True] | None)
]
RegexOption = Annotated[Any, PlainValidator(_parse_regex, json_schema_input_type=_Text | None)]
ChoiceOption = Annotated[Any, PlainValidator(_parse_choice, json_schema_input_type=_Texts | None)]
GrammarOption = Annotated[Any, PlainValidator(_parse_grammar, json_schema_input_type=_Text | None)]
JsonObjectOption = Annotated[Any, PlainValidator(_parse_json_object, json_schema_input_type=bool | None)]
StructuredOption = Annotated[
    Any, PlainValidator(_parse_structured_outputs, json_schema_input_type=StructuredOutputs | None)
]
