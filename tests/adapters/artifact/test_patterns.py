from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.artifact.patterns import MAX_TEXT, MAX_VISITS, Effort, Pattern, PatternRefused
from loramux_adapters.errors import AdapterRejected

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "q_proj", "x.lm_head"]
REAL_PATTERNS = [
    r"model\.layers\.\d+\.self_attn\.(q|k|v)_proj",
    r".*\.(q_proj|v_proj)$",
    r"^model\.layers\.[0-9]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj))$",
    r"(?:.*?(?:language|text|model).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)",
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))",
    r"layers\.(0|1[0-5])\..*",
    r".*[^a-z_]proj",
    r"(.*\.)?lm_head",
    r"[\w.]+_proj|lm_head",
    r"a{,}",
    r"x{}",
    r".*_pro{1}j",
]


@pytest.mark.parametrize("text", REAL_PATTERNS)
def test_it_matches_what_re_matches(text: str) -> None:
    pattern = Pattern(text)
    for module in [*MODULES, "", "a", "aaa", "x{}"]:
        assert pattern.fullmatch(module) == (re.fullmatch(text, module) is not None), module


PIECES = ["a", "b", ".", r"\.", r"\d", r"\w", r"\b", "^", "$", "[ab]", "[^a]", "[a-c.]", "1", "-", "]", "x{}"]
QUANTIFIERS = ["", "", "", "*", "+", "?", "*?", "{2}", "{0,2}", "{1,}", "{,3}", "{,}"]
PATTERN_TEXTS = st.recursive(
    st.builds(lambda piece, quantifier: piece + quantifier, st.sampled_from(PIECES), st.sampled_from(QUANTIFIERS)),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map("|".join),
        st.builds(lambda body, quantifier: f"({body}){quantifier}", inner, st.sampled_from(QUANTIFIERS)),
        inner.map(lambda body: f"(?:{body})"),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(text=PATTERN_TEXTS, module=st.text(alphabet="ab1.-", max_size=6))
def test_it_agrees_with_re_on_random_patterns_and_texts(text: str, module: str) -> None:
    try:
        expected = re.fullmatch(text, module) is not None
    except re.error:
        with pytest.raises(PatternRefused):
            Pattern(text)
        return
    assert Pattern(text).fullmatch(module) == expected


@settings(max_examples=400, deadline=None)
@given(text=st.text(alphabet="()[]{}|*+?^$.\\-,:019adwbBDx=!<P", max_size=24))
def test_any_text_is_compiled_or_refused(text: str) -> None:
    try:
        pattern = Pattern(text)
    except PatternRefused as error:
        assert str(error)
        return
    for module in MODULES:
        pattern.fullmatch(module)


@pytest.mark.parametrize(
    "text",
    [
        "(?=a)a",
        "(?!x).*",
        "(?<=a)b",
        "(?P<name>a)",
        "(?i)a",
        r"(a)\1",
        r"\x41",
        r"\p",
        r"\B",
        "a" * 2000,
        "(" * 50 + ")" * 50,
        "((a{60}){60}){60}",
        "((((){60}){60}){60}){60}",
        "a{99999999}",
        "a**",
        "a*+",
        "*",
        "(",
        ")",
        "[a",
        "[",
        "a\\",
        "[b-a]",
        "a{3,1}",
        "a\nb",
        "caf\u00e9",
    ],
)
def test_what_is_outside_the_subset_is_refused(text: str) -> None:
    with pytest.raises(PatternRefused):
        Pattern(text)


@pytest.mark.parametrize("text", ["(a+)+b", "(a|a)*b", "(.*.*)*x", "(a?){60}a{60}b", ".*.*.*.*.*.*.*.*.*.*x"])
def test_patterns_that_ruin_a_backtracking_matcher_cost_little(text: str) -> None:
    pattern = Pattern(text)
    started = time.perf_counter()
    assert not pattern.fullmatch("a" * 200)
    assert time.perf_counter() - started < 1.0


def test_patterns_of_one_config_share_what_they_may_cost() -> None:
    effort = Effort()
    for _ in range(MAX_TEXT // 1000):
        Pattern("[" + "a" * 998 + "]", effort)
    with pytest.raises(PatternRefused, match="over 8,192 characters of regular expressions"):
        Pattern("a?" * 500, effort)
    effort = Effort()
    for _ in range(2):
        Pattern("(abcdefghijklmnopqrstuvwxyz){60}", effort)
    with pytest.raises(PatternRefused, match="over 4,096 steps of regular expressions"):
        Pattern("(abcdefghijklmnopqrstuvwxyz){60}", effort)


def test_a_pattern_that_costs_too_much_is_refused_when_it_is_matched() -> None:
    modules = [f"model.layers.{layer}.mlp.{name}" for layer in range(80) for name in ("gate_proj", "up_proj")]
    effort = Effort()
    pattern = Pattern(".?" * 500 + "Z", effort)
    with pytest.raises(AdapterRejected, match="take more than 120,000 steps to match the modules"):
        for module in modules:
            pattern.fullmatch(module)
    effort = Effort()
    plain = Pattern(r"model\.layers\.\d+\.(self_attn|mlp)\.(?:.*_proj)", effort)
    assert all(plain.fullmatch(module) for module in modules)
    assert MAX_VISITS - effort.visits < 5000
    left = effort.visits
    assert all(plain.fullmatch(module) for module in modules)
    assert effort.visits == left, "what was matched before is free"
