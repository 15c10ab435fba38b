"""Several replies to one prompt: how many, which, with what seeds, and what they count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loramux_server.api.completions.sampling import seed_of
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from support.fakes_api import BASE_NAME, Server, make_server, usage_of
from support.raw_call import events_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": BASE_NAME, "messages": [{"role": "user", "content": "hi"}]} | fields


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": BASE_NAME, "prompt": "Say"} | fields


@pytest.mark.anyio
async def test_n_replies_share_a_prompt_which_counts_once(server: Server) -> None:
    body = (await server.post(CHAT, chat(n=3, seed=5))).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {"Hello world"}
    assert body["usage"] == usage_of(len("user:hi\nassistant:"), 33)
    first, *others = server.engine.sequences
    assert first.shares_prompt_with is None
    assert all(one.shares_prompt_with == first.id and one.prompt == first.prompt for one in others)
    assert len({one.id for one in server.engine.sequences}) == 3


@pytest.mark.anyio
async def test_replies_to_several_prompts_come_prompt_by_prompt(server: Server) -> None:
    reply = await server.post(COMPLETIONS, completion(prompt=["a", "bb"], n=2, max_tokens=2))
    assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1, 2, 3]
    assert reply.json()["usage"] == usage_of(3, 8)
    sequences = sorted(server.engine.sequences, key=lambda one: int(one.id.rpartition("-")[2]))
    assert [len(one.prompt) for one in sequences] == [1, 1, 2, 2]
    ids = [one.id for one in sequences]
    assert [one.shares_prompt_with for one in sequences] == [None, ids[0], None, ids[2]]


@pytest.mark.anyio
async def test_a_seed_gives_each_reply_its_own_and_the_first_the_one_it_has_alone(server: Server) -> None:
    for body in (completion(n=3, seed=7), completion(seed=7), completion(n=3), completion(n=2, seed=7)):
        await server.post(COMPLETIONS, body)
    seeds = [one.params.seed for one in server.engine.sequences]
    assert len({*seeds[:3]}) == 3 and seeds[0] == seeds[3] == 7
    assert seeds[4:7] == [None] * 3 and seeds[7:] == seeds[:2]


def test_seeds_of_further_replies_stay_64_bits_and_are_no_neighbours() -> None:
    seeds = [seed_of(seed, place) for seed in (-(2**63), 2**63 - 1, 0, 1) for place in range(128)]
    assert len({*seeds}) == len(seeds) and all(seed is not None and -(2**63) <= seed < 2**63 for seed in seeds)


@pytest.mark.anyio
async def test_streams_of_n_replies_say_what_whole_ones_say(server: Server) -> None:
    whole = (await server.post(CHAT, chat(n=2, max_tokens=5))).json()
    events = events_of(await server.post(CHAT, chat(n=2, max_tokens=5, stream=True)))
    texts = ["", ""]
    finishes: list[str | None] = [None, None]
    for event in events[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        finishes[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert finishes == ["length"] * 2
    roles = [event["choices"][0]["index"] for event in events[:-1] if "role" in event["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1]


@pytest.mark.anyio
async def test_the_best_replies_are_those_whose_tokens_are_likeliest(server: Server) -> None:
    likelihoods = [-1.0, -0.25, -0.5, -2.0]

    def logprob(sequence: EngineSequence) -> float:
        return likelihoods[int(sequence.id.rpartition("-")[2])]

    server.engine.logprob_of = logprob
    reply = await server.post(COMPLETIONS, completion(best_of=4, n=2, logprobs=0, max_tokens=3, return_token_ids=True))
    choices = reply.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert [choice["logprobs"]["token_logprobs"] for choice in choices] == [[-0.25] * 3, [-0.5] * 3]
    assert reply.json()["usage"] == usage_of(3, 12)
    reply = await server.post(COMPLETIONS, completion(best_of=2, prompt=["a", "b"]))
    choices = reply.json()["choices"]
    assert [choice["logprobs"] for choice in choices] == [None, None], "nobody asked for them"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 129}, "n"), ({"n": 65, "prompt": ["a", "b"]}, "n"), ({"best_of": 65, "prompt": ["a", "b"]}, "best_of"),
        ({"n": 3, "best_of": 2}, "best_of"), ({"best_of": 2, "stream": True}, "best_of"),
    ],
)  # fmt: skip
async def test_how_many_is_bounded(server: Server, fields: dict[str, Any], param: str) -> None:
    reply = await server.post(COMPLETIONS, completion(**fields))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert server.engine.sequences == []
    assert (await server.post(COMPLETIONS, completion(n=2, best_of=2, stream=True))).status_code == 200


@pytest.mark.anyio
async def test_a_stream_may_tell_the_usage_so_far(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = events_of(await server.post(COMPLETIONS, completion(stream=True, stream_options=options, n=2)))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 22
    assert last["usage"] == usage_of(3, 22)
