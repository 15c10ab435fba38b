"""Templates as strangers write them: rendered as transformers does, and never for long, large or outside."""

from __future__ import annotations

import time
from typing import Any

import pytest

from loramux_adapters.chat.sandbox import MAX_SECONDS
from loramux_adapters.chat.template import MAX_SOURCE, CompiledTemplate, same_template
from loramux_adapters.errors import TemplateFailed, TemplateRefuses
from support.tokenizer_families import NAMES, family

SAID = [{"role": "user", "content": "Grüße & <b>bold</b> 'x'"}, {"role": "assistant", "content": " four\n"}]


def grown(start: str, step: str, behind: str = "") -> str:
    """Sixty times `step`, each from what the one before made."""
    loop = f"{{% for i in range(60) %}}{{% set ns.s = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(s={start}) %}}{loop}{behind}"


def rendered(source: str, messages: list[dict[str, Any]] | None = None, **arguments: Any) -> str:
    variables = {"bos_token": "<s>"}
    return CompiledTemplate(source).render(messages or SAID, variables, arguments, generate=True)


@pytest.mark.parametrize(
    "source",
    [
        *sorted({family(name).chat_template for name in NAMES}),
        "{%- for m in messages %}\n    {%- if loop.first %}{{ m.content | trim | upper }}{% endif %}\n{% endfor %}",
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}"
            "{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}"
        ),
        (
            "{% macro say(m) %}{{ m.role ~ ': ' ~ m.content }}{% endmacro %}"
            "{% for m in messages %}{{ say(m) }}{% endfor %}"
        ),
        "{% for m in messages %}{% if m.role != 'user' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ tools is none }}{{ documents is none }}",
        "{{ (messages | selectattr('role', 'equalto', 'user') | list)[0]['content'].split('&')[-1] }}",
        (
            "{{ messages | tojson(indent=2) }}{{ dict(a=1).items() | list }}"
            "{{ '%s' % 'x' }}{{ range(3) | list }}{{ 'ab' * 3 }}"
        ),
        (
            "{{ messages[0].get('name', 'nobody') }}{{ messages[0].nothing }}"
            "{{ messages[-1:] | length }}{{ 7 % 3 }}{{ [1] + [2] }}"
        ),
        "{% set m = 'a' %}{% set m = m + 'b' + m %}{{ m if enable is defined else 'no' }}{{- '\n' -}}",
    ],
)
def test_it_writes_what_it_writes_in_transformers(source: str) -> None:
    tokenizer = family("byte-level BPE")
    try:
        there = tokenizer.apply_chat_template(
            SAID, chat_template=source, tokenize=False, add_generation_prompt=True, bos_token="<s>"
        )
    except Exception:
        pytest.skip("refused there")
    variables = tokenizer.special_tokens_map | {"bos_token": "<s>"}
    assert CompiledTemplate(source).render(SAID, variables, {}, generate=True) == there


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{% for m in messages %}{{ m.content }}{% endfor %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        grown("'x'", "ns.s + ns.s"),
        grown("'x'", "ns.s ~ ns.s"),
        grown("'x'", "ns.s | replace('x', 'xx')"),
        grown("'x'", "ns.s.replace('x', 'xx')"),
        grown("'x'", "[ns.s, ns.s] | join"),
        grown("'x'", "''.join([ns.s, ns.s])"),
        grown("'x'", "[ns.s, ns.s] | map('string') | join"),
        grown("[1]", "ns.s + ns.s", "{{ ns.s }}"),
        grown("[1]", "[ns.s, ns.s]", "{{ ns.s }}"),
        grown("[1]", "[ns.s, ns.s]", "{{ ns.s | tojson }}"),
        grown("[1]", "[ns.s, ns.s] | string"),
        grown("[1]", "'%s%s' % (ns.s, ns.s)"),
        "{% set ns = namespace(n=9) %}{% for i in range(90000) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x' | indent(1000000000) }}",
        "{{ 'x'.center(1000000000) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ 'x'.zfill(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ (1).to_bytes(1000000000, 'big') }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ lipsum(n=1000000000) }}",
        "{{ [1] | batch(1000000000, 'x') | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for m in [messages] recursive %}{{ loop([m]) }}{% endfor %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
        "{% import 'x' as x %}",
        "{% extends 'x' %}",
        "{{ namespace(__class__=1) }}",
        "{{ tick }}{{ environment.x.y }}",
        *(grown("[1]", "[ns.s, ns.s]", behind) for behind in ("", "{{ [ns.s]|sort }}", "{{ ns.s|replace('a', 'b') }}")),
        grown("(1,)", "(ns.s, ns.s)", "{{ {ns.s: 1} }}"),
        grown("{}", "{'a': ns.s, 'b': ns.s}", "{{ raise_exception(ns.s) }}"),
        grown("{}", "dict(a=ns.s, b=ns.s)", "{{ messages[ns.s].x }}"),
        grown("[1]", "([ns.s] * 9)[1:]", "{{ ns.s.index(0) }}"),
        "{% set a = range(90000) | list %}{{ ([a] * 90000) | sum(start=[]) }}",
        "{{ [[1], [2]] | sum(start=[]) }}",
        "{% set n = namespace(x='x' * 4000000) %}{{ ([n] * 90000) | join('', attribute='x') }}",
        "{{ 'x y '.split() * 200000 }}",
        "{{ ('x ' * 2000000).split() }}",
        "{{ ('f' * 4000000) | int(0, 16) }}",
        "{% set a = range(90000) | list %}{{ a | select('in', range(90000, 180000) | list) | list }}",
        "".join(f"{{% set a{n} = '{n}' * 1000000 %}}" for n in range(1000)),
        (
            "{% set ns = namespace(s=0) %}{% for i in range(90000) %}"
            "{% set ns.s = namespace(s=ns.s, t='x' * (4000000 + i)) %}{% endfor %}"
        ),
        grown("messages", "[ns.s]", "{{ ((range(9999) | list,) * 20, ns.s) | tojson(indent=16) }}")
        + grown("range(99999) | list", "[ns.s]", "{{ ns.s | tojson(indent=16) }}"),
    ],
)
def test_no_template_takes_long_grows_large_or_reaches_out(source: str) -> None:
    started = time.thread_time()
    with pytest.raises(TemplateFailed) as caught:
        rendered(source)
    assert time.thread_time() - started < MAX_SECONDS + 2
    assert len(str(caught.value)) < 500 and "__globals__': " not in str(caught.value)


@pytest.mark.parametrize(
    "reach", ["''.__class__", "raise_exception.__globals__", "self.__init__", "messages | attr('__class__')"]
)
def test_what_is_out_of_reach_is_empty_and_cannot_be_gone_on_from(reach: str) -> None:
    assert rendered(f"{{{{ {reach} }}}}") == ""
    with pytest.raises(TemplateFailed):
        rendered(f"{{{{ ({reach}).x }}}}")


def test_what_a_template_makes_is_small_all_the_way_down_and_what_holds_itself_ends() -> None:
    holds_itself = "{% set ns = namespace(a=1) %}{% set ns.a = [ns, ns] %}"
    assert rendered(holds_itself + "{{ ns == ns }}{{ ns|string }}") == "True<Namespace>"
    assert rendered(holds_itself + "{{ ns.a|length }}{% set b, c = [1, 2], (3,) %}{{ b }}{{ c }}") == "2[1, 2](3,)"
    assert rendered("{{ messages|map(attribute='role')|list }}{{ [1, 2.5]|sum }}{{ [{'a': 1}]|sum('a', 2) }}") == (
        "['user', 'assistant']3.53"
    )
    assert rendered("{{ messages|join('+', attribute='role') }}{{ messages|join(d='', attribute='role') }}") == (
        "user+assistantuserassistant"
    )


def test_a_long_conversation_may_be_put_together_step_by_step() -> None:
    said = [{"role": "user", "content": "x" * 400}] * 1000
    written = rendered(
        "{% set ns = namespace(text='', said=[]) %}{% for m in messages %}{% set ns.text = ns.text ~ m.content %}"
        "{% set ns.said = ns.said + [m] %}{% endfor %}{{ ns.text }}{{ ns.said | length }}",
        said,
    )
    assert written == "x" * 400_000 + "1000"


def test_a_failure_names_its_line_and_a_refusal_says_what_the_template_says() -> None:
    with pytest.raises(TemplateFailed, match=r"line 3 of the template"):
        rendered("{{ bos_token }}\n\n{{ messages | nothing }}")
    with pytest.raises(TemplateFailed, match=r"'nothing' is undefined \(line 2 of the template\)"):
        rendered("{{ bos_token }}\n{{ nothing.x }}")
    with pytest.raises(TemplateFailed, match=r"line 2 of the template"):
        rendered("{{ bos_token }}\n{% if %}")
    with pytest.raises(TemplateRefuses, match=r"^roles must alternate$"):
        rendered("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TemplateFailed, match="more than"):
        CompiledTemplate("x" * (MAX_SOURCE + 1))
    with pytest.raises(TemplateFailed, match="too large a program"):
        CompiledTemplate("{{ a }}" * 9000)


def test_what_has_been_thought_is_found_under_the_names_that_templates_know() -> None:
    said = [{"role": "assistant", "content": "", "reasoning": "hm"}]
    assert rendered("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}", said) == "hmhm"


def test_arguments_reach_the_template_and_hide_nothing_of_the_sandbox() -> None:
    assert rendered("{{ enable_thinking }}", enable_thinking=False) == "False"
    bomb = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateFailed, match="turns"):
        rendered(bomb, tick=str, environment="x", joined=str)


def test_templates_are_the_same_where_only_line_ends_differ() -> None:
    assert same_template("a\r\nb\n", "a\nb") and same_template(None, "") and not same_template("a", "a b")
