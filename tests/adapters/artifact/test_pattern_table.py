from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.artifact.pattern_table import PatternTable
from loramux_adapters.artifact.patterns import Budget, PatternRefused
from loramux_adapters.errors import AdapterRejected


def test_the_first_key_that_matches_the_end_of_the_path_counts() -> None:
    table = PatternTable({"q_proj": 1, r"layers\.0\..*": 2, "self_attn.k_proj": 3, "^lm_head": 4, "model.norm": 5})
    assert table.match("model.layers.0.self_attn.q_proj", 0) == 1
    assert table.match("model.layers.0.self_attn.v_proj", 0) == 2
    assert table.match("model.layers.1.self_attn.k_proj", 0) == 3
    assert table.match("model.layers.1.xself_attn.k_proj", 0) == 0
    assert table.match("lm_head", 0) == 4
    assert table.match("x.lm_head", 0) == 0
    assert dict(table)["q_proj"] == table["q_proj"] == 1


@settings(max_examples=200, deadline=None)
@given(key=st.text(alphabet="ab._", min_size=1, max_size=4), module=st.text(alphabet="ab._", max_size=6))
def test_a_plain_key_matches_as_the_expression_it_is(key: str, module: str) -> None:
    for spelling in (key, f"^{key}", key.replace(".", r"\."), f"{key}$"):
        expected = re.match(rf"(.*\.)?({spelling})$", module) is not None
        assert PatternTable({spelling: True}).match(module, False) == expected


def test_a_key_cannot_close_the_group_that_is_put_around_it() -> None:
    with pytest.raises(PatternRefused, match="parenthesis"):
        PatternTable({"a)|(b": 1})


def test_a_table_of_many_expressions_is_refused_and_one_of_many_names_is_not() -> None:
    with pytest.raises(PatternRefused, match="key .* takes the config over 8,192 characters"):
        PatternTable({f"(x|y)+{'a' * 500}{i}": 1 for i in range(20)})
    table = PatternTable({f"model.layers.{i}.mlp.up_proj": i for i in range(2000)})
    assert table.match("model.layers.1999.mlp.up_proj", -1) == 1999


LAYERS = 80
MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in range(LAYERS)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]


@pytest.mark.parametrize(
    "keys",
    [
        MODULES,
        [f"^{module}" for module in MODULES],
        [re.escape(module) + "$" for module in MODULES],
        [f"model.layers.{layer}.*" for layer in range(LAYERS)],
        [rf"layers\.{layer}\..*" for layer in range(LAYERS)],
        [rf".*layers\.{layer}\..*" for layer in range(LAYERS)],
        ["q_proj", r".*\.mlp\.(up|gate)_proj", r"layers\.(0|1[0-5])\..*", "down_proj"],
    ],
    ids=lambda keys: keys[0],
)
def test_tables_that_people_write_are_taken_and_matched_as_re_matches_them(keys: list[str]) -> None:
    table = PatternTable({key: order for order, key in enumerate(keys)})
    compiled = [re.compile(rf"(.*\.)?({key})$") for key in keys]
    for module in MODULES[:: 1 + len(keys) // 24]:
        expected = next((order for order, one in enumerate(compiled) if one.match(module)), -1)
        assert table.match(module, -1) == expected


KEYS = [
    "a",
    "b",
    "^a",
    "a.b",
    r"a\.b",
    "a.*",
    ".*b",
    "(a|b)",
    "a|b",
    "(?:(a)|(b))",
    r".*(?<!\.)b",
    "(?!a).*",
    "ab$",
    "",
    "^(lm)?",
]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["q_proj", "(?i)Q_PROJ"], r"key '\(\?i\)Q_PROJ' has a group of the form"),
        ([f"a*{i}" for i in range(513)], r"key 'a\*512' is one of more than 512 regular expressions"),
        ([f"(a?b?c?d?){{64}}{i}" for i in range(16)], "8,192 characters of regular expressions, repeats written out"),
        ([f"{i:b}".rjust(8, "0").replace("1", ".") for i in range(256)], "32 kinds of plain keys"),
        (["." * i for i in range(1, 4096)], "32 kinds of plain keys"),
    ],
)
def test_a_hostile_table_is_refused_by_its_key(keys: list[str], says: str) -> None:
    with pytest.raises(PatternRefused, match=says):
        PatternTable({key: 1 for key in keys})


def test_a_table_that_takes_exponential_time_is_given_up_and_named() -> None:
    table = PatternTable({"q_proj": 1, "(a|a)*[bc]": 2}, Budget(seconds=0.05), name="rank_pattern")
    assert table.match("model.q_proj", 0) == 1
    with pytest.raises(AdapterRejected, match="rank_pattern cannot be matched in time"):
        table.match("a" * 60, 0)


@settings(max_examples=200, deadline=None)
@given(
    keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=5, unique=True),
    module=st.lists(st.sampled_from(["a", "b", "ab", "", "lm"]), max_size=4).map(".".join),
)
def test_plain_keys_and_expressions_are_tried_in_the_order_of_the_table(keys: list[str], module: str) -> None:
    table = PatternTable({key: order for order, key in enumerate(keys)})
    expected = next((order for order, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", module)), -1)
    assert table.match(module, -1) == expected
