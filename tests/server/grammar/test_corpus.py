"""A corpus of 300 schemas: each is held, or refused by name, and what random walks write under it is valid."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import jsonschema
import pytest
from jsonschema.validators import validator_for

from loramux_server.errors import RequestError
from loramux_server.grammar.shape import Shape
from support.grammar_walks import Walk, family_tokenizer, grammars_of
from support.schemas import corpus
from support.tokenizer_families import embedded

CORPUS = list(corpus())
HELD = [(name, schema) for name, schema in CORPUS if not name.startswith("refused")]
TOKENIZER = "embedded" if embedded() is not None else "byte-level BPE"


def test_the_corpus_has_300_schemas_each_another() -> None:
    assert len({name for name, _ in CORPUS}) == 300
    assert len({json.dumps(schema) for _, schema in CORPUS}) > 290


@pytest.mark.parametrize("tenth", range(10))
def test_replies_under_each_schema_are_valid(tenth: int) -> None:
    for number, (name, schema) in list(enumerate(HELD))[tenth::10]:
        grammar = grammars_of(TOKENIZER).of(Shape("json_schema", schema), "response_format")
        walk = Walk(family_tokenizer(TOKENIZER), grammar, number, max_tokens=900)
        assert walk.ended, (name, walk.text)
        exact: Any = json.loads(json.dumps(schema), parse_float=Decimal)
        validator = validator_for(schema, default=jsonschema.Draft202012Validator)(exact)
        problems = list(validator.iter_errors(json.loads(walk.text, parse_float=Decimal)))
        assert problems == [], (name, walk.text)


@pytest.mark.parametrize("name", [name for name, _ in CORPUS if name.startswith("refused")])
def test_what_cannot_be_held_is_refused(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        grammars_of(TOKENIZER).of(Shape("json_schema", dict(CORPUS)[name]), "response_format")

    assert "#/properties/wrong" in str(caught.value)
