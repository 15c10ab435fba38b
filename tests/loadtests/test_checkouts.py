"""What the comparison of two checkouts must find, and what it must not mind."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loadtests.checkouts import bits, pairs
from loadtests.checkouts.checkout import Checkout
from loadtests.client import Target
from loadtests.errors import LoadTestError
from loadtests.peers.servers import started

COMPLETION = {
    "id": "cmpl-1",
    "choices": [
        {
            "index": 0,
            "text": " a b",
            "logprobs": {
                "tokens": [" a", " b"],
                "token_logprobs": [-0.5, -1.25],
                "top_logprobs": [{" a": -0.5, " x": -2.0}, {" b": -1.25, " y": -3.0}],
                "text_offset": [0, 2],
            },
            "finish_reason": "length",
        }
    ],
    "usage": {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 0}},
}
REPLY = bits.Reply(
    " a b",
    (
        bits.Token(" a", -0.5, ((" a", -0.5), (" x", -2.0))),
        bits.Token(" b", -1.25, ((" b", -1.25), (" y", -3.0))),
    ),
    "length",
    7,
    2,
)


def chat_events() -> Iterator[dict[str, Any]]:
    """The same reply as a streamed chat: an opening, one event for each token, an ending, the usage."""
    yield {"choices": [{"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]}
    for token in REPLY.tokens:
        tops = [{"token": text, "logprob": logprob, "bytes": []} for text, logprob in token.others]
        entry = {"token": token.text, "logprob": token.logprob, "bytes": [], "top_logprobs": tops}
        choice = {"delta": {"content": token.text}, "logprobs": {"content": [entry]}, "finish_reason": None}
        yield {"choices": [choice], "usage": None}
    yield {"choices": [{"delta": {}, "logprobs": None, "finish_reason": "length"}], "usage": None}
    yield {"choices": [], "usage": COMPLETION["usage"]}


def as_stream(*events: str) -> bytes:
    return b": a comment\n\n" + "".join(f"data: {event}\n\n" for event in events).encode()


# bits


def test_plain_and_streamed_replies_of_both_routes_are_read_as_the_same() -> None:
    assert bits.read_reply(json.dumps(COMPLETION).encode()) == REPLY
    assert bits.read_reply(as_stream(*map(json.dumps, chat_events()), "[DONE]")) == REPLY


def test_a_reply_that_failed_or_stopped_in_the_middle_is_no_reply() -> None:
    with pytest.raises(LoadTestError, match=r"without \[DONE\]"):
        bits.read_reply(as_stream(*map(json.dumps, chat_events())))
    with pytest.raises(LoadTestError, match="the step failed"):
        bits.read_reply(as_stream('{"error": {"message": "the step failed"}}', "[DONE]"))


def changed_token(**fields: object) -> bits.Reply:
    return replace(REPLY, tokens=(REPLY.tokens[0], replace(REPLY.tokens[1], **fields)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (changed_token(text=" c"), "token 1 is ' b' before and ' c' after"),
        (changed_token(logprob=-1.2500000000000002), "[-1.25, -1.25, -3.0] before, [-1.2500000000000002, -1.25, -3.0]"),
        (changed_token(others=((" b", -1.25), (" y", -3.5))), "[-1.25, -1.25, -3.0] before, [-1.25, -1.25, -3.5]"),
        (replace(REPLY, tokens=REPLY.tokens[:1]), "2 tokens before and 1 after"),
        (replace(REPLY, finish="stop"), "finish is 'length' before and 'stop' after"),
        (replace(REPLY, prompt_tokens=8), "prompt_tokens is 7 before and 8 after"),
    ],
)
def test_whatever_differs_is_found_and_told(after: bits.Reply, told: str) -> None:
    question = bits.Question("a voice", bits.CHAT, {})
    verdict = bits.compare([question] * 2, [REPLY, REPLY], [REPLY, after])
    (line,) = verdict.different
    assert line.startswith("a voice: ") and told in line
    assert not verdict.equal and "1 replies differ" in str(verdict)


def test_equal_replies_are_counted_and_nothing_compared_is_not_equal() -> None:
    question = bits.Question("a voice", bits.CHAT, {})
    verdict = bits.compare([question] * 2, [REPLY] * 2, [REPLY] * 2)
    assert verdict.equal and str(verdict) == "2 replies, 4 tokens, 12 log probabilities: all equal"
    silent = replace(REPLY, tokens=())
    assert not bits.compare([question], [silent], [silent]).equal


def test_every_voice_is_asked_in_every_manner_and_each_prompt_plain_and_streamed() -> None:
    asked = bits.questions("the-base", [f"a{number}" for number in range(16)])
    manners = {(it.path, it.body["stream"], it.body["temperature"] > 0) for it in asked}
    assert len(manners) == 8 and len(asked) == 8 * (1 + 16 + 2) == len({it.label for it in asked})
    assert len({json.dumps(it.body.get("messages") or it.body["prompt"]) for it in asked}) == len(asked) / 2
    sums = [it.body["adapters"] for it in asked if "adapters" in it.body]
    assert len(sums) == 16 and {len(parts) for parts in sums} == {2}
    assert all(("seed" in it.body) == (it.body["temperature"] > 0) for it in asked)


# ratios


def test_ratios_are_taken_within_rounds_and_their_median_held_against_the_aim() -> None:
    pair = pairs.Pair("base", "tokens/s", (0.97, 1.03))
    for before, after in ((100.0, 101.0), (50.0, 48.0), (80.0, 80.0)):
        pair.add({"after": after, "before": before})
    assert pair.ratios == [1.01, 0.96, 1.0] and pair.reached
    assert pair.document()["medians"] == {"before": 80.0, "after": 80.0, "ratios": 1.0}
    assert "1.000 (0.960 .. 1.010)  0.97 to 1.03" in pairs.show([pair])
    assert not replace(pair, aim=(1.01, 1.03)).reached and not replace(pair, aim=(0.0, 0.99)).reached


def test_a_start_may_be_sooner_but_not_later() -> None:
    pair = pairs.Pair("ready", "s", (0.0, 1.03), before=[10.0], after=[5.0])
    assert pair.reached and "at most 1.03" in pairs.show([pair])
    assert not replace(pair, after=[11.0]).reached


def test_who_begins_changes_from_round_to_round() -> None:
    order = [side for number in range(4) for side in pairs.in_turn(("before", "after"), number)]
    assert order == ["before", "after", "after", "before"] * 2


def fake_clock(*times: float) -> Callable[[], float]:
    left = iter(times)
    return lambda: next(left)


def test_rounds_end_in_time_but_there_is_always_one() -> None:
    said: list[str] = []
    assert list(pairs.rounds(3, 100.0, said.append, fake_clock(0, 10, 10, 30, 30, 40))) == [0, 1, 2] and not said
    assert list(pairs.rounds(3, 45.0, said.append, fake_clock(0, 10, 10, 30, 30))) == [0, 1]
    assert said == ["1 of 3 rounds are left out, the time is up"]
    assert list(pairs.rounds(2, 0.0, said.append, fake_clock(5, 9, 9))) == [0]


# checkouts and their servers


def test_a_checkout_is_called_by_its_own_command_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("LORAMUX_API_KEY", "secret")
    with pytest.raises(LoadTestError, match="--after-command"):
        Checkout.of("after", tmp_path, None)
    own = tmp_path / ".venv" / "bin" / "loramux"
    own.parent.mkdir(parents=True)
    own.touch()
    program = Checkout.of("after", tmp_path, None).program
    assert program.words == (str(own),) and not {"PYTHONPATH", "LORAMUX_API_KEY"} & program.environ.keys()
    assert Checkout.of("after", tmp_path, "env 'A=b c' loramux").program.words == ("env", "A=b c", "loramux")
    assert Checkout.of("after", tmp_path, "loramux").revision() == "unknown"


def test_a_server_that_runs_other_compiled_code_than_the_checkouts_is_refused(tmp_path: Path) -> None:
    checkout = Checkout.of("after", tmp_path / "loramux", "loramux")
    named = ["loramux/.venv/lib/torch/libtorch_cpu.so", *["loramux/my server/loramux_server/_kernels.so"] * 2]
    maps = "".join(f"7f00-7f01 r-xp 00000000 08:01 42     {tmp_path / name}\n" for name in named)
    maps += "7f02-7f03 rw-p 00000000 00:00 0\n7f04-7f05 rw-p 00000000 00:00 0     [heap]\n"
    assert checkout.compiled_code(maps) == ["my server/loramux_server/_kernels.so"]
    with pytest.raises(LoadTestError, match="`after` runs /y/loramux_adapters/k.so"):
        checkout.compiled_code(maps + "7f06-7f07 r-xp 00000000 08:01 43     /y/loramux_adapters/k.so\n")


def test_a_server_is_ended_when_waiting_for_it_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def interrupted(side: Any, *rest: object) -> None:
        begun.append(side.process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr("loadtests.peers.servers._wait_until_ready", interrupted)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(KeyboardInterrupt):
        with started("x", command, 1, Target("http://a", "b"), lora=False, log=tmp_path / "log", ready="/ready"):
            pass
    with pytest.raises(ProcessLookupError):
        os.kill(begun[0], 0)
