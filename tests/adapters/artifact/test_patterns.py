from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.artifact.patterns import (
    MAX_DEPTH,
    MAX_PATTERNS,
    MAX_SIZE,
    Budget,
    Pattern,
    PatternRefused,
    compiled,
)
from loramux_adapters.errors import AdapterRejected

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "lm_head",
    "q_proj",
    "x.lm_head",
    "language_model.model.layers.3.self_attn.v_proj",
    "language_models.layers.3.self_attn.v_proj",
    "visual.blocks.2.attn.q_proj",
]
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
    r"x\{\}",
    r".*_pro{1}j",
    # with look-around, as ms-swift writes them
    r"^(language_model(?=\.).*\.(q_proj|v_proj))$",
    r"^(?!.*visual).*(q_proj)",
    r"^((?!visual|merger).)*\.(q_proj|v_proj)$",
    r".*(?<!mlp\.)(?:down|q|v)_proj",
    r".*(?<=self_attn\.)\w+",
]


@pytest.mark.parametrize("text", REAL_PATTERNS)
def test_it_matches_what_re_matches(text: str) -> None:
    pattern = Pattern(text)
    for module in [*MODULES, "", "a", "aaa", "x{}"]:
        assert pattern.fullmatch(module) == (re.fullmatch(text, module) is not None), module


PIECES = ["a", "b", ".", r"\.", r"\d", r"\W", r"\w", r"\b", "^", "$", "[ab]", "[^a]", "[a-c.]", r"[\w-]", "[]a]"]
PIECES += ["1", "-", "]", "}", ""]
QUANTIFIERS = ["", "", "", "*", "+", "?", "*?", "+?", "{2}", "{0,2}", "{1,}", "{,3}", "{,}", "{2,3}?", "{0}"]


def quantified(part: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(lambda body, quantifier: body + quantifier, part, st.sampled_from(QUANTIFIERS))


def series_or_options(part: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    parts = st.lists(part, min_size=1, max_size=3)
    return st.one_of(parts.map("".join), parts.map("|".join))


def grouped(body: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(
        lambda opening, inside: f"{opening}{inside})", st.sampled_from(["(", "(?:", "(?=", "(?!", "(?<=", "(?<!"]), body
    )


# Repeats nest at most twice: in three, `re` itself can take for ever.
INNER = series_or_options(quantified(st.sampled_from(PIECES)))
OUTER = series_or_options(st.one_of(INNER, quantified(grouped(INNER))))
PATTERN_TEXTS = series_or_options(st.one_of(OUTER, grouped(OUTER)))


@settings(max_examples=600, deadline=None)
@given(text=PATTERN_TEXTS, modules=st.lists(st.text(alphabet="ab1.-]", max_size=6), min_size=1, max_size=4))
def test_it_agrees_with_re_on_random_patterns_and_texts(text: str, modules: list[str]) -> None:
    try:
        expected = re.compile(text)
    except re.error:
        with pytest.raises(PatternRefused):
            Pattern(text)
        return
    try:
        pattern = Pattern(text)
    except PatternRefused as refused:
        assert "repeat" in str(refused), "only + after {n}, which makes it possessive, is left out of this grammar"
        return
    for module in modules:
        assert pattern.fullmatch(module) == (expected.fullmatch(module) is not None), module


@settings(max_examples=400, deadline=None)
@given(text=st.text(alphabet="()[]{}|*+?^$.\\-,:019adwbBDx=!<P~&", max_size=24))
def test_any_text_is_compiled_or_refused(text: str) -> None:
    try:
        pattern = Pattern(text)
    except PatternRefused as error:
        assert str(error)
        return
    assert re.compile(text)
    for module in MODULES:
        pattern.fullmatch(module)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        # read otherwise by the two libraries, or by one of them only
        (r"(?:q_proj){e<=1}", "{ that starts no repeat"),
        ("x{}", "{ that starts no repeat"),
        ("[[a]b]", "class that"),
        ("[[:alpha:]]", "class that"),
        ("[a--b]", "class that"),
        ("[a&&b]", "class that"),
        ("[a||b]", "class that"),
        ("[a~~b]", "class that"),
        (r"[\b]", "class that"),
        ("a*+", "repeats a repeat"),
        ("a{2}+", "starts no repeat|repeats a repeat"),
        ("(?>a)", "group of the form"),
        ("(?R)", "group of the form"),
        ("(a)(?1)", "group of the form"),
        ("(?|a|b)", "group of the form"),
        ("(?P<name>a)", "group of the form"),
        ("(?<name>a)", "group of the form"),
        ("(?i)a", "group of the form"),
        ("(?V1)a", "group of the form"),
        ("(?e)a", "group of the form"),
        ("(a)?(?(1)b|c)", "group of the form"),
        ("(?#comment)", "group of the form"),
        (r"(a)\1", "escape"),
        (r"\L<names>", "escape"),
        (r"\p{L}", "escape"),
        (r"\x41", "escape"),
        (r"\N{DIGIT ONE}", "escape"),
        (r"\B", "escape"),
        (r"\K", "escape"),
        # malformed
        ("a**", "repeats a repeat"),
        ("*", "malformed: nothing to repeat"),
        ("^*", "malformed"),
        ("a|*", "malformed"),
        ("(", "parenthesis"),
        ("(a", "parenthesis"),
        (")", "parenthesis"),
        ("[a", "class that"),
        ("[", "class that"),
        ("a\\", "backslash"),
        ("[b-a]", "malformed: bad character range"),
        ("a{3,1}", "malformed: min repeat"),
        ("(?<=a*)b", "malformed: look-behind requires fixed-width"),
        ("a\nb", "printable ASCII"),
        ("caf\u00e9", "printable ASCII"),
        # too large
        ("a" * 9000, "over 8,192 characters"),
        ("(" * 50 + ")" * 50, "nests too deeply"),
        ("((a{60}){60}){60}", "over 8,192 characters"),
        ("((((){60}){60}){60}){60}", "over 8,192 characters"),
        ("(" * MAX_DEPTH + "a" + ")+" * MAX_DEPTH, "over 8,192 characters"),
        ("(?=a{999}){999}", "over 8,192 characters"),
        ("a{99999999}", "{ that starts no repeat of at most 999"),
    ],
)
def test_what_could_mean_something_else_or_cannot_be_bounded_is_refused_by_name(text: str, why: str) -> None:
    with pytest.raises(PatternRefused, match=why):
        Pattern(text)


@pytest.mark.parametrize("text", ["(a|a)*[bc]", "(a|aa)+[bc]", "(?=(a|a)*[bc]).*", "((a?){0,999}){0,999}[bc]"])
def test_a_pattern_that_takes_exponential_time_is_given_up_and_named(text: str) -> None:
    pattern = Pattern(text, Budget(seconds=0.05))
    for module in ("a" * 60, "a"):
        with pytest.raises(AdapterRejected, match=re.escape(f"the regular expression {ascii(text)} cannot be matched")):
            pattern.fullmatch(module)


def test_patterns_of_one_config_share_their_size_their_number_and_their_time() -> None:
    budget = Budget()
    Pattern("a" * (MAX_SIZE - 10), budget)
    with pytest.raises(PatternRefused, match="over 8,192 characters of regular expressions, repeats written out"):
        Pattern("b{20}", budget)
    budget = Budget(seconds=0.05)
    plain, hostile = Pattern(".*b", budget), Pattern("(a|a)*[bc]", budget)
    assert plain.fullmatch("ab")
    with pytest.raises(AdapterRejected):
        hostile.fullmatch("a" * 60)
    with pytest.raises(AdapterRejected, match="write simpler regular expressions, or plain module names"):
        plain.fullmatch("ab")
    budget = Budget()
    for _ in range(MAX_PATTERNS):
        budget.check("a*")
    with pytest.raises(PatternRefused, match="more than 512 regular expressions"):
        budget.check("a*")


def test_time_that_other_threads_take_does_not_count() -> None:
    class GivesUpEarly:
        """As the library does when other threads use up its clock."""

        calls = 0

        def match(self, text: str, timeout: float) -> Any:
            self.calls += 1
            if self.calls < 100:
                raise TimeoutError
            return compiled("a").match(text, timeout=timeout)

    pattern: Any = GivesUpEarly()
    assert Budget().match(pattern, "a", "it") is not None
