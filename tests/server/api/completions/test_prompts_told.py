"""What a reply tells of its prompt: its text, its log probabilities, its ids; and how a prompt is made."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from loramux_server.base.infill import Infill
from support.fakes_api import BASE_NAME, CONTEXT, Server, make_server, usage_of
from support.raw_call import events_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": BASE_NAME, "messages": [{"role": "user", "content": "hi"}]} | fields


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": BASE_NAME, "prompt": "Say"} | fields


async def choice_of(server: Server, **fields: Any) -> dict[str, Any]:
    reply = await server.post(COMPLETIONS, completion(**fields))
    assert reply.status_code == 200, reply.text
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


@pytest.mark.anyio
async def test_an_echo_begins_with_the_prompt_and_its_log_probabilities(server: Server) -> None:
    choice = await choice_of(server, echo=True, logprobs=1, max_tokens=2)
    assert choice["text"] == "SayHe"
    assert choice["logprobs"] == {
        "tokens": ["S", "a", "y", "H", "e"],
        "token_logprobs": [None, -1.0, -2.0, -0.5, -0.5],
        "top_logprobs": [None, {"A": -1.0, "a": -1.0}, {"A": -1.0, "y": -2.0}, {"A": -1.0, "H": -0.5},
                         {"A": -1.0, "e": -0.5}],
        "text_offset": [0, 1, 2, 3, 4],
    }  # fmt: skip


@pytest.mark.anyio
async def test_an_echo_without_log_probabilities_asks_for_none(server: Server) -> None:
    assert await choice_of(server, echo=True, max_tokens=2) == {
        "index": 0, "text": "SayHe", "logprobs": None, "finish_reason": "length", "stop_reason": None,
    }  # fmt: skip
    assert server.engine.sequences[0].params.prompt_logprobs is None


@pytest.mark.anyio
async def test_a_prompt_may_be_all_that_is_asked_for(server: Server) -> None:
    choice = await choice_of(server, echo=True, logprobs=0, max_tokens=0)
    assert (choice["text"], choice["finish_reason"]) == ("Say", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    choice = await choice_of(server, prompt=[65, 66, 67], echo=True, max_tokens=0)
    assert (choice["text"], choice["logprobs"]) == ("ABC", None)
    params = server.engine.sequences[1].params
    assert (params.max_tokens, params.prompt_logprobs, params.prompt_logprobs_from) == (0, 0, 3), "nothing is scored"
    whole = await server.post(COMPLETIONS, completion(prompt="x" * CONTEXT, echo=True, max_tokens=0))
    assert whole.status_code == 200 and whole.json()["usage"] == usage_of(CONTEXT, 0)
    refused = await server.post(COMPLETIONS, completion(max_tokens=0))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
    assert (await server.post(CHAT, chat(max_tokens=0))).status_code == 400


@pytest.mark.anyio
async def test_a_streamed_echo_comes_with_the_first_text(server: Server) -> None:
    asked = {"echo": True, "logprobs": 1, "max_tokens": 3, "return_token_ids": True}
    whole = await choice_of(server, **asked)
    events = events_of(await server.post(COMPLETIONS, completion(**asked, stream=True)))[:-1]
    choices = [event["choices"][0] for event in events]
    assert choices[0]["text"] == "SayH" and choices[0]["prompt_token_ids"] == [*b"Say"]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    lists = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert {name: sum((one[name] for one in lists), []) for name in lists[0]} == whole["logprobs"]
    ids = [token for choice in choices for token in choice.get("token_ids", [])]
    assert ids == whole["token_ids"] == [*b"Hel"]
    assert all("prompt_token_ids" not in choice for choice in choices[1:])


@pytest.mark.anyio
async def test_an_echo_is_the_text_that_was_sent_and_offsets_are_places_in_it(server: Server) -> None:
    """Tokens that a base expects around a text stand before it, and special tokens are written out."""
    encode = server.tokenizer.encode
    server.tokenizer.encode = lambda text, **options: [256, *encode(text, **options)]  # type: ignore[method-assign]
    choice = await choice_of(server, prompt="né!", echo=True, logprobs=0, max_tokens=1)
    assert choice["text"] == "né!H"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 2, 3]
    choice = await choice_of(server, prompt=[65, 257, 66], echo=True, logprobs=0, max_tokens=1)
    assert choice["text"] == "A<end>BH"
    assert choice["logprobs"]["text_offset"] == [0, 1, 6, 7]


@pytest.mark.anyio
async def test_what_lm_eval_sends_is_answered_as_it_reads_it(server: Server) -> None:
    """`local-completions` scores texts so (lm_eval/models/openai_completions.py): it takes the last entry off."""
    prompts = [[*b"question answer"], [*b"q a"]]
    context = [9, 2]
    body = completion(prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    for reply in (b"H", b""):  # a token, or the end at once
        server.engine.replies[None] = reply
        choices = (await server.post(COMPLETIONS, body)).json()["choices"]
        for choice, prompt, length in zip(sorted(choices, key=itemgetter("index")), prompts, context, strict=True):
            found = choice["logprobs"]["token_logprobs"][length:-1]
            top = choice["logprobs"]["top_logprobs"][length:-1]
            assert found == [-float(place) for place in range(length, len(prompt))]
            assert all(value <= max(beside.values()) for value, beside in zip(found, top, strict=True))
            assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1


@pytest.mark.anyio
async def test_a_reply_without_an_echo_has_no_entry_of_its_end_token(server: Server) -> None:
    choice = await choice_of(server, logprobs=0)
    assert "".join(choice["logprobs"]["tokens"]) == "Hello world"


@pytest.mark.anyio
async def test_log_probabilities_of_a_prompt_have_vllms_shape(server: Server) -> None:
    choice = await choice_of(server, prompt_logprobs=1, max_tokens=1)
    assert choice["prompt_logprobs"] == [
        None,
        {"97": {"logprob": -1.0, "rank": None, "decoded_token": "a"},
         "65": {"logprob": -1.0, "rank": 1, "decoded_token": "A"}},
        {"121": {"logprob": -2.0, "rank": None, "decoded_token": "y"},
         "65": {"logprob": -1.0, "rank": 1, "decoded_token": "A"}},
    ]  # fmt: skip
    body = (await server.post(CHAT, chat(prompt_logprobs=0, max_tokens=1, return_token_ids=True))).json()
    prompt = [*b"user:hi\nassistant:"]
    assert body["prompt_token_ids"] == prompt and len(body["prompt_logprobs"]) == len(prompt)
    assert [*body["prompt_logprobs"][1]] == [str(prompt[1])]
    assert body["choices"][0]["token_ids"] == [*b"H"] and "prompt_logprobs" not in body["choices"][0]
    refused = await server.post(COMPLETIONS, completion(prompt_logprobs=1, stream=True))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")
    assert (await server.post(COMPLETIONS, completion(prompt_logprobs=21))).status_code == 400


@pytest.mark.anyio
async def test_an_echo_and_a_prompts_log_probabilities_have_their_own_numbers(server: Server) -> None:
    choice = await choice_of(server, echo=True, logprobs=0, prompt_logprobs=2, max_tokens=1)
    assert server.engine.sequences[0].params.prompt_logprobs == 2
    assert choice["logprobs"]["top_logprobs"][1] == {"a": -1.0}
    assert len(choice["prompt_logprobs"][1]) == 3


@pytest.mark.anyio
async def test_token_ids_of_a_reply_have_the_end_token_too(server: Server) -> None:
    choice = await choice_of(server, return_token_ids=True)
    assert choice["token_ids"] == [*b"Hello world", 257] and choice["prompt_token_ids"] == [*b"Say"]
    events = events_of(await server.post(CHAT, chat(stream=True, return_token_ids=True)))[:-1]
    assert events[0]["prompt_token_ids"] == [*b"user:hi\nassistant:"]
    assert [t for event in events for t in event["choices"][0].get("token_ids", [])] == [*b"Hello world", 257]


@pytest.mark.anyio
async def test_tokens_may_be_named_by_their_ids(server: Server) -> None:
    choice = await choice_of(server, logprobs=1, max_tokens=1, return_tokens_as_token_ids=True)
    assert choice["logprobs"]["tokens"] == ["token_id:72"]
    assert choice["logprobs"]["top_logprobs"] == [{"token_id:65": -1.0, "token_id:72": -0.5}]
    reply = await server.post(CHAT, chat(logprobs=True, max_tokens=1, return_tokens_as_token_ids=True))
    (entry,) = reply.json()["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("token_id:72", [72])


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"truncate_prompt_tokens": 4}, b"6789"),
        ({"truncate_prompt_tokens": 4, "truncation_side": "left"}, b"6789"),
        ({"truncate_prompt_tokens": 4, "truncation_side": "right"}, b"0123"),
        ({"truncate_prompt_tokens": 10}, b"0123456789"),
        ({"truncate_prompt_tokens": -1}, b"0123456789"),
        ({"truncate_prompt_tokens": -1, "max_tokens": CONTEXT - 2}, b"89"),
        ({"truncation_side": "left"}, b"0123456789"),
    ],
)
async def test_a_prompt_is_cut_only_where_a_request_says_so(
    server: Server, fields: dict[str, Any], expected: bytes
) -> None:
    assert (await server.post(COMPLETIONS, completion(prompt="0123456789", **fields))).status_code == 200
    assert server.engine.sequences[0].prompt == [*expected]


@pytest.mark.anyio
async def test_an_echo_of_a_prompt_that_was_cut_is_what_is_left(server: Server) -> None:
    choice = await choice_of(server, prompt="0123456789", truncate_prompt_tokens=2, echo=True, max_tokens=1, logprobs=0)
    assert choice["text"] == "89H" and choice["logprobs"]["text_offset"] == [0, 1, 2]
    refused = await server.post(COMPLETIONS, completion(truncate_prompt_tokens=0))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.anyio
async def test_a_text_may_come_without_what_a_base_expects_around_it(server: Server) -> None:
    await server.post(COMPLETIONS, completion(add_special_tokens=False))
    assert not server.tokenizer.around
    await server.post("/tokenize", {"prompt": "x", "add_special_tokens": True})
    assert server.tokenizer.around
    await server.post("/tokenize", {"prompt": "x", "add_special_tokens": False})
    assert not server.tokenizer.around


@pytest.mark.anyio
async def test_a_gap_is_filled_where_the_base_has_tokens_for_it(server: Server) -> None:
    refused = await server.post(COMPLETIONS, completion(suffix="end"))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "suffix")
    server.tokenizer.infill = Infill((1, "{before}", 2, "{after}", 3), frozenset({4}))
    choice = await choice_of(server, suffix="end")
    assert choice["text"] == "Hello world"
    sequence = server.engine.sequences[0]
    assert sequence.prompt == [1, *b"Say", 2, *b"end", 3]
    assert sequence.params.stop_token_ids == {4, 257}
    await choice_of(server, suffix="end", prompt=[65])
    assert server.engine.sequences[1].prompt == [1, 65, 2, *b"end", 3]
    await choice_of(server, suffix="")
    assert server.engine.sequences[2].prompt == [*b"Say"] and server.engine.sequences[2].params.stop_token_ids == {257}
    assert (await server.post(COMPLETIONS, completion(suffix="end", echo=True))).status_code == 400
    assert (await server.post(COMPLETIONS, completion(suffix="x" * CONTEXT))).status_code == 400


@pytest.mark.anyio
async def test_a_salt_keeps_prompts_apart(server: Server) -> None:
    for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}):
        await server.post(COMPLETIONS, completion(**salt))
    groups = [sequence.cache_group for sequence in server.engine.sequences]
    assert groups[0] == "" and len({*groups}) == 3
    assert (await server.post(COMPLETIONS, completion(cache_salt=""))).status_code == 400


@pytest.mark.anyio
async def test_a_log_probability_that_is_not_known_is_null_in_json(server: Server) -> None:
    reply = await server.post(COMPLETIONS, completion(prompt=[[65]], echo=True, logprobs=2, max_tokens=0))
    assert reply.json()["choices"][0]["logprobs"] == {
        "tokens": ["A"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0],
    }  # fmt: skip
    assert "NaN" not in reply.text
