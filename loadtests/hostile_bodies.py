"""JSON bodies made to cost a server far more than they cost their sender. Each deserves a quick 400.

None has more than two megabytes. They are what strangers sent, or could: crowds of small things, depth, numbers that
are slow to read, text that is slow to tokenize, and errors in every part of a long list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

MIB = 2**20
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True)
class HostileBody:
    """`reason` stands in the answer's message."""

    name: str
    path: str
    raw: bytes
    reason: str


def corpus(model: str) -> list[HostileBody]:
    """All of them, for a server whose base has this name."""
    return [
        *_crowds(model),
        *_numbers(model),
        *_texts(model),
        *_broken(model),
        *_conversations(model),
        *_options(model),
    ]


def _body(model: str, rest: str | bytes) -> bytes:
    head = f'{{"model":{json.dumps(model)},'.encode()
    return head + (rest.encode() if isinstance(rest, str) else rest) + b"}"


def _listed(item: str, size: int = 2 * MIB - 200) -> str:
    return "[" + ",".join([item] * (size // (len(item) + 1))) + "]"


def _completion(name: str, model: str, rest: str | bytes, reason: str) -> HostileBody:
    return HostileBody(name, COMPLETIONS, _body(model, rest), reason)


def _chat(name: str, model: str, rest: str | bytes, reason: str) -> HostileBody:
    return HostileBody(name, CHAT, _body(model, rest), reason)


def _crowds(model: str) -> Iterator[HostileBody]:
    keys = ",".join(f'"k{index}":1' for index in range(100_000))
    lists = "lists and objects"
    yield _completion("100,000 unknown keys", model, f'"prompt":"x",{keys}', "strings")
    yield _completion("300 unknown keys", model, f'"prompt":"x",{keys[:3000].rpartition(",")[0]}', "parameters")
    yield _completion("prompt of 500,000 lists", model, '"prompt":' + _listed("[]"), lists)
    yield _completion("prompt of 400,000 full lists", model, '"prompt":' + _listed("[1]"), lists)
    yield _completion("prompt of 600,000 objects", model, '"prompt":' + _listed("{}"), lists)
    yield _completion("prompt of 16,000 lists", model, '"prompt":' + _listed("[1]", 64_000), "at most 64 prompts")
    yield _completion("prompt of 400,000 strings", model, '"prompt":' + _listed('"ab"'), "strings")
    yield _completion("prompt of a million token ids", model, '"prompt":' + _listed("1"), "values")
    yield _completion("prompt of 500,000 fractions", model, '"prompt":' + _listed("1e5"), "values")
    yield _completion("64 prompts of 2,000 ids", model, '"prompt":' + str([[1] * 2000] * 63 + [[1] * 4000]), "context")
    yield _completion(
        "64 prompts of 30,000 characters", model, '"prompt":' + json.dumps(["a b " * 7500] * 64), "context"
    )
    yield _completion("one list in a million", model, '"prompt":' + "[" * 1_000_000 + "]" * 1_000_000, lists)
    yield _completion("10,000 deep", model, '"prompt":' + "[" * 10_000 + "]" * 10_000, "JSON")
    yield _completion("objects 10,000 deep", model, '"prompt":' + '{"a":' * 10_000 + "1" + "}" * 10_000, "JSON")
    yield _completion("100 deep", model, '"prompt":' + "[" * 100 + "]" * 100, "deep")


def _numbers(model: str) -> Iterator[HostileBody]:
    yield _completion("a number of two million digits", model, '"prompt":"x","seed":' + "9" * 2_000_000, "digits")
    yield _completion("a fraction of two million digits", model, '"prompt":"x","top_p":1.' + "9" * 2_000_000, "digits")
    yield _completion("400 numbers of 5,000 digits", model, '"prompt":' + str([10**4299] * 450), "digits")
    yield _completion("a number of 400 digits", model, f'"prompt":"x","seed":{10**400}', "'seed'")
    yield _completion("1e999", model, '"prompt":"x","temperature":1e999', "JSON")
    yield _completion("not a number", model, '"prompt":"x","temperature":NaN', "JSON")
    yield _completion("ids beyond the vocabulary", model, '"prompt":' + str([10**12] * 20_000), "token ids")


def _texts(model: str) -> Iterator[HostileBody]:
    yield _completion("two million letters", model, '"prompt":"' + "a" * 2_000_000 + '"', "context")
    yield _completion("a million words", model, '"prompt":"' + "a " * 1_000_000 + '"', "context")
    yield _completion("two million digits of text", model, '"prompt":"' + "1234567890" * 200_000 + '"', "context")
    yield _completion("300,000 escapes", model, '"prompt":"' + "\\u00e9" * 300_000 + '"', "context")
    yield _completion("a million quotes", model, '"prompt":"' + '\\"' * 1_000_000 + '"', "context")
    yield _completion("a million backslashes", model, '"prompt":"' + "\\\\" * 1_000_000 + '"', "context")
    yield _completion("a million brackets as text", model, '"prompt":"' + "[{,:" * 500_000 + '"', "context")
    yield _completion("half a surrogate pair", model, '"prompt":"' + "a" * 1_000_000 + '\\ud800"', "surrogate")
    yield _completion("invalid UTF-8 at the end", model, b'"prompt":"' + b"a" * 2_000_000 + b'\xff"', "UTF-8")


def _broken(model: str) -> Iterator[HostileBody]:
    yield _completion("a key twice", model, '"prompt":"x","prompt":"y"', "twice")
    yield _completion("a key 30,000 times", model, '"prompt":"x"' + ',"a":1' * 30_000, "twice")
    yield HostileBody("only quotes", COMPLETIONS, b'"' * 2_000_000, "strings")
    yield HostileBody("only commas", COMPLETIONS, b"," * 2_000_000, "values")
    yield HostileBody("zeros", COMPLETIONS, bytes(2_000_000), "JSON")
    yield HostileBody("spaces", COMPLETIONS, b" " * 2_000_000, "JSON")
    yield HostileBody("half a body", COMPLETIONS, _body(model, '"prompt":"' + "a" * 1_000_000)[:-1], "JSON")


def _conversations(model: str) -> Iterator[HostileBody]:
    turn = '{"role":"user","content":"a"}'
    part = '{"type":"text","text":"a"}'
    extra = ",".join(f'"k{index}":1' for index in range(30_000))
    yield _chat("60,000 messages", model, '"messages":' + _listed(turn), "strings")
    yield _chat("100,000 messages of nothing", model, '"messages":' + _listed("{}", 300_000), "lists and objects")
    yield _chat("7,000 messages", model, '"messages":' + _listed(turn, 200_000), "at most 2048")
    yield _chat("2,048 wrong messages", model, '"messages":' + str([5] * 2048), "'messages.0'")
    yield _chat("100,000 parts", model, '"messages":[{"role":"user","content":' + _listed(part) + "}]", "strings")
    yield _chat("8,000 parts", model, '"messages":[{"role":"user","content":' + _listed(part, 200_000) + "}]", "256")
    yield _chat("30,000 keys in a message", model, '"messages":[{"role":"user","content":"a",' + extra + "}]", "fields")
    long = json.dumps([{"role": "user", "content": "a b " * 240}] * 2000)
    yield _chat("2,000 long messages", model, '"messages":' + long, "context")
    variables = ",".join(f'"v{index}":1' for index in range(30_000))
    yield _chat(
        "30,000 template variables", model, f'"messages":[{turn}],"chat_template_kwargs":{{{variables}}}', "variables"
    )


def _options(model: str) -> Iterator[HostileBody]:
    bias = ",".join(f'"{index}":1' for index in range(30_000))
    tools = '{"type":"function","function":{"name":"f"}}'
    yield _completion("logit_bias of 30,000", model, f'"prompt":"x","logit_bias":{{{bias}}}', "'logit_bias'")
    yield _completion("30,000 stop strings", model, '"prompt":"x","stop":' + _listed('"a"', 120_000), "'stop'")
    yield _completion("a stop string of a megabyte", model, '"prompt":"x","stop":"' + "a" * MIB + '"', "'stop'")
    yield _completion(
        "8,000 adapters", model, '"prompt":"x","adapters":' + _listed('{"name":"a"}', 104_000), "'adapters'"
    )
    yield _completion("a label of a megabyte", model, '"prompt":"x","user":"' + "a" * MIB + '"', "'user'")
    yield _completion("a million replies", model, '"prompt":"x","n":1000000', "'n'")
    yield HostileBody("a name of a megabyte", COMPLETIONS, json.dumps({"model": "a" * MIB}).encode(), "'model'")
    yield _completion("an unknown key of a megabyte", model, '"prompt":"x","' + "k" * MIB + '":1', "unknown parameter")
    yield _chat(
        "5,000 tools", model, '"messages":[{"role":"user","content":"a"}],"tools":' + _listed(tools, 200_000), "'tools'"
    )
