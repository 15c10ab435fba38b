from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loramux_server.engine.scheduling.sequence import AdapterUse
from loramux_server.errors import ServerBusy
from support.fakes_api import BASE_NAME, CONTEXT, VERSION, Server, make_server, usage_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": BASE_NAME, "messages": [{"role": "user", "content": "hi"}]} | fields


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": BASE_NAME, "prompt": "Say"} | fields


@pytest.mark.anyio
async def test_a_chat_reply_has_openais_shape(server: Server) -> None:
    reply = await server.post(CHAT, chat())
    body = reply.json()
    assert reply.status_code == 200
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    prompt = len("user:hi\nassistant:")
    assert body == {
        "object": "chat.completion",
        "model": BASE_NAME,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello world", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": usage_of(prompt, 11),
    }


@pytest.mark.anyio
async def test_a_completion_has_openais_shape(server: Server) -> None:
    reply = await server.post(COMPLETIONS, completion(max_tokens=5))
    body = reply.json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": BASE_NAME,
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": usage_of(3, 5),
    }


@pytest.mark.anyio
async def test_replies_say_how_long_they_waited_and_who_answered(server: Server) -> None:
    reply = await server.post(CHAT, chat())
    assert reply.headers["x-loramux-queue-ms"] == "2.0"
    assert reply.headers["x-loramux-ttft-ms"] == "10.0"
    assert reply.headers["x-loramux-adapter-version"] == "base"
    assert reply.headers["x-request-id"].startswith("req-")
    reply = await server.post(CHAT, chat(model="pirate"))
    assert reply.headers["x-loramux-adapter-version"] == VERSION


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        (BASE_NAME, None), ("pirate", "pirate"), (f"{BASE_NAME}:pirate", "pirate"), (f"pirate@{VERSION[:8]}", "pirate"),
        (f"pirate@{VERSION}", "pirate"), (f"{BASE_NAME}:pirate@{VERSION[:12]}", "pirate"),
    ],
)  # fmt: skip
async def test_a_model_has_several_spellings(server: Server, model: str, adapter: str | None) -> None:
    reply = await server.post(CHAT, chat(model=model))
    assert reply.status_code == 200 and reply.json()["model"] == model
    sequence = server.engine.sequences[0]
    assert sequence.adapter == adapter
    assert sequence.adapters == ((AdapterUse(VERSION, 8, 1000),) if adapter else ())
    assert server.store.leased == 0


@pytest.mark.anyio
@pytest.mark.parametrize(
    "model",
    [
        "nobody", "other-base:pirate", f"{BASE_NAME}:", f"{BASE_NAME}:{BASE_NAME}", "pirate@", "pirate@1234567",
        "pirate@" + "0" * 8, "pirate@" + VERSION[:8].upper(), "pirate@" + VERSION + "0", "../pirate", "pirate/../x",
        "/etc/passwd", "http://169.254.169.254/x", "file:///etc/passwd", "hf://a/b", "pirate\x00", "pi rate",
        "pirate@@", "ｐirate", "%2e%2e", "." * 5, "x" * 64, "pirate:" + BASE_NAME,
    ],
)  # fmt: skip
async def test_a_model_that_does_not_exist_is_404(server: Server, model: str) -> None:
    reply = await server.post(CHAT, chat(model=model))
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "model_not_found")
    assert server.engine.sequences == []


@pytest.mark.anyio
async def test_sampling_options_reach_the_engine(server: Server) -> None:
    options = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": -7, "max_tokens": 9}
    await server.post(CHAT, chat(**options, logprobs=True, top_logprobs=3))
    params = server.engine.sequences[0].params
    assert {name: getattr(params, name) for name in options} == options
    assert params.logprobs == 3
    assert params.stop_token_ids == {257}


@pytest.mark.anyio
async def test_defaults_are_openais(server: Server) -> None:
    await server.post(CHAT, chat())
    await server.post(COMPLETIONS, completion())
    in_chat, in_completion = (sequence.params for sequence in server.engine.sequences)
    assert (in_chat.temperature, in_chat.top_p, in_chat.top_k, in_chat.min_p) == (1.0, 1.0, 0, 0.0)
    assert (in_chat.seed, in_chat.logprobs) == (None, None)
    assert in_chat.max_tokens == CONTEXT - len("user:hi\nassistant:")
    assert in_completion.max_tokens == 16


@pytest.mark.anyio
async def test_a_chat_that_names_no_length_is_not_given_the_whole_context(tmp_path: Path) -> None:
    server = make_server(tmp_path, reply=20)
    for body in (chat(), chat(max_tokens=40), chat(messages=[{"role": "user", "content": "x" * (CONTEXT - 30)}])):
        assert (await server.post(CHAT, body)).status_code == 200
    lengths = [sequence.params.max_tokens for sequence in server.engine.sequences]
    assert lengths[:2] == [20, 40] and 0 < lengths[2] < 20


@pytest.mark.anyio
async def test_a_temperature_too_small_to_divide_by_is_greedy(server: Server) -> None:
    await server.post(CHAT, chat(temperature=1e-300, top_k=-1))
    params = server.engine.sequences[0].params
    assert (params.temperature, params.top_k) == (0.0, 0)


@pytest.mark.anyio
async def test_an_end_token_can_be_ignored(server: Server) -> None:
    reply = await server.post(CHAT, chat(ignore_eos=True, max_tokens=12))
    assert server.engine.sequences[0].params.stop_token_ids == frozenset()
    assert reply.json()["choices"][0]["finish_reason"] == "length"
    assert reply.json()["usage"]["completion_tokens"] == 12


@pytest.mark.anyio
async def test_several_prompts_give_several_choices_in_order(server: Server) -> None:
    reply = await server.post(COMPLETIONS, completion(prompt=["a", "bb", "ccc"], max_tokens=5))
    body = reply.json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "Hello"),
        (1, "Hello"),
        (2, "Hello"),
    ]
    assert body["usage"] == usage_of(6, 15)
    assert sorted(len(sequence.prompt) for sequence in server.engine.sequences) == [1, 2, 3]
    assert len({sequence.id for sequence in server.engine.sequences}) == 3


@pytest.mark.anyio
async def test_several_prompts_are_refused_before_any_has_begun(server: Server) -> None:
    asked: list[int] = []

    def full(*sequences: Any) -> Any:
        asked.append(len(sequences))
        raise ServerBusy("full", retry_after=7)

    server.engine.submit = full  # type: ignore[method-assign]
    reply = await server.post(COMPLETIONS, completion(prompt=["a", "bb", "ccc"]))
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "7")
    assert asked == [3] and not server.engine.sequences and not server.engine.aborted
    assert server.metric('loramux_requests_total{adapter="base",outcome="rejected"}') == 1


@pytest.mark.anyio
async def test_a_prompt_can_be_token_ids(server: Server) -> None:
    await server.post(COMPLETIONS, completion(prompt=[[1, 2], [0, 257]]))
    assert [sequence.prompt for sequence in server.engine.sequences] == [[1, 2], [0, 257]]


@pytest.mark.anyio
@pytest.mark.parametrize("prompt", [[258], [-1], [1, 10**30], [[1], [258]]])
async def test_token_ids_outside_the_vocabulary_are_400(server: Server, prompt: object) -> None:
    reply = await server.post(COMPLETIONS, completion(prompt=prompt))
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "prompt"
    assert "0 to 257" in reply.json()["error"]["message"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("prompt", "max_tokens", "status"),
    [
        (CONTEXT - 1, 1, 200),
        (CONTEXT - 1, 2, 400),
        (CONTEXT, 1, 400),
        (100, 28, 200),
        (100, 29, 400),
        (5, 2**31 - 1, 400),
    ],
)
async def test_prompt_and_reply_must_fit_the_context(server: Server, prompt: int, max_tokens: int, status: int) -> None:
    reply = await server.post(COMPLETIONS, completion(prompt="x" * prompt, max_tokens=max_tokens))
    assert reply.status_code == status
    if status == 400:
        error = reply.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert str(CONTEXT) in error["message"] and str(prompt) in error["message"]


@pytest.mark.anyio
async def test_a_chat_longer_than_the_context_is_400(server: Server) -> None:
    reply = await server.post(CHAT, chat(messages=[{"role": "user", "content": "x" * CONTEXT}]))
    assert reply.status_code == 400
    assert (reply.json()["error"]["param"], reply.json()["error"]["code"]) == ("messages", "context_length_exceeded")


@pytest.mark.anyio
async def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(server: Server) -> None:
    halves = [{"role": "user", "content": "x" * (CONTEXT // 2)}, {"role": "user", "content": "x" * (CONTEXT // 2 + 1)}]
    for path, body in ((CHAT, chat(messages=halves)), (COMPLETIONS, completion(prompt="x" * (CONTEXT + 1)))):
        reply = await server.post(path, body)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
        assert f"{CONTEXT} characters" in error["message"] and f"has {CONTEXT + 1};" in error["message"]
    assert server.tokenizer.encoded == []


@pytest.mark.anyio
async def test_a_stop_string_ends_the_reply_and_its_sequence(server: Server) -> None:
    reply = await server.post(CHAT, chat(model="pirate", stop=[", m", "zzz"]))
    choice = reply.json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Arr", "stop")
    assert reply.json()["usage"]["completion_tokens"] == len("Arr, m")
    assert server.engine.aborted == [server.engine.sequences[0].id]
    assert server.engine.running == set()
    assert server.metric('loramux_requests_total{adapter="pirate",outcome="stop"}') == 1
    assert server.metric("loramux_aborts_total") == 0


@pytest.mark.anyio
async def test_chat_log_probabilities_have_openais_shape(server: Server) -> None:
    reply = await server.post(CHAT, chat(logprobs=True, top_logprobs=2, max_tokens=2))
    content = reply.json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["H", "e"]
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "A", "logprob": -1.0, "bytes": [65]},
            {"token": "B", "logprob": -2.0, "bytes": [66]},
        ],
    }


@pytest.mark.anyio
async def test_completion_log_probabilities_have_openais_shape(server: Server) -> None:
    server.engine.replies[None] = "é!".encode()
    reply = await server.post(COMPLETIONS, completion(logprobs=1))
    assert reply.json()["choices"][0]["logprobs"] == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9", "!"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"A": -1.0, "bytes:\\xc3": -0.5}, {"A": -1.0, "bytes:\\xa9": -0.5}, {"A": -1.0, "!": -0.5}],
        "text_offset": [0, 0, 1],
    }


@pytest.mark.anyio
async def test_log_probabilities_of_a_stop_string_do_not_show(server: Server) -> None:
    reply = await server.post(COMPLETIONS, completion(logprobs=0, stop="lo"))
    choice = reply.json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("Hel", ["H", "e", "l"])
