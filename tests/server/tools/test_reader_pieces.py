"""Replies in pieces: where they are cut changes nothing, and the work stays in proportion."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_server.tools.calls import AddedTokens
from support.tool_replies import FORMATS, NO_CALLS, THINK, WEATHER, WRITTEN, read

SNIPPETS = [
    *NO_CALLS,
    *WRITTEN.values(),
    WEATHER,
    "<think>",
    "</think>",
    "\n",
    " ",
    "; ",
    "text",
    "{",
    '"',
    "\\",
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<|tool_call|>",
    "```json",
    "```",
    '{"name": "time", "arguments": ',
    '{"arguments": {"a": "\\ud83d\\ude00"}, "name": "time"}',
    '"{\\"a\\": \\"\\\\ud83d\\ude00\\"}"',
    "<function=time>",
    "<parameter=city>",
    "</parameter>",
    "</function>",
    "\U0001f600",
]
ADDED = AddedTokens({"[TOOL_CALLS]": 1, "[ARGS]": 2}, frozenset(("[TOOL_CALLS]", "[ARGS]")))


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(FORMATS),
    snippets=st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=5), max_size=6),
    cuts=st.lists(st.integers(0, 10_000), max_size=30),
    opened=st.booleans(),
    parallel=st.booleans(),
    hidden=st.booleans(),
)
def test_any_pieces_give_the_same(
    name: str, snippets: list[str], cuts: list[int], opened: bool, parallel: bool, hidden: bool
) -> None:
    text = "".join(snippets)
    options: dict[str, Any] = {
        "reasoning": THINK,
        "opened": opened,
        "parallel": parallel,
        "added": ADDED if hidden else None,
    }
    whole = read(name, [text], **options)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})

    assert read(name, [text[a:b] for a, b in itertools.pairwise(places)], **options) == whole
    assert read(name, list(text), **options) == whole


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from([*'ab \n<>{}[]";,`', "tool_call", "think", "name"]), max_size=30).map("".join))
def test_where_there_is_no_call_nothing_is_lost(text: str) -> None:
    for name in FORMATS:
        got = read(name, [text])
        assert (got.content, got.calls) == (text, [])


def seconds_of(name: str, text: str) -> float:
    started = time.thread_time()
    got = read(name, [text[at : at + 7] for at in range(0, len(text), 7)])
    assert got.content == text
    return time.thread_time() - started


@pytest.mark.parametrize("unit", ['{"arguments": ', "<tool_call>", '<tool_call>{"', "{\n", "```json{", "\n"])
def test_the_work_is_in_proportion_to_the_reply(unit: str) -> None:
    for name in ("hermes", "json"):
        short, long = (min(seconds_of(name, unit * times) for _ in range(3)) for times in (200, 2000))

        assert long < 50 * short, name  # in proportion it is 10 times, in proportion to the square 100
