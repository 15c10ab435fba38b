"""The official client against the app: it must not notice a difference."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import openai
import pytest

from loramux_server.api.http.dependencies import Keys
from loramux_server.errors import ServerBusy
from support.fakes_api import BASE_NAME, Server, make_server

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path, keys=Keys("secret"))


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx2.ASGITransport(server.app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport) as http:
        yield openai.AsyncOpenAI(api_key="secret", base_url="http://server/v1", http_client=http, max_retries=0)


@pytest.mark.anyio
async def test_chat(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model="pirate", messages=MESSAGES, logprobs=True, top_logprobs=1)
    choice = reply.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Arr, matey", "stop")
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert choice.logprobs.content[0].token == "A"
    again = await client.chat.completions.create(
        model=BASE_NAME, messages=[*MESSAGES, choice.message.to_dict(), *MESSAGES]  # type: ignore[list-item]
    )  # fmt: skip
    assert again.usage is not None and again.usage.completion_tokens == 11


@pytest.mark.anyio
async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="pirate", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Arr, matey"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 10


@pytest.mark.anyio
async def test_several_replies_with_their_prompt(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(
        model=BASE_NAME, prompt="Say", max_tokens=3, n=2, best_of=3, echo=True, logprobs=1, presence_penalty=0.5,
        logit_bias={"65": -100}, extra_body={"repetition_penalty": 1.1, "min_tokens": 1},
    )  # fmt: skip
    assert [choice.text for choice in reply.choices] == ["SayHel", "SayHel"]
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == [*"SayHel"] and logprobs.text_offset == [*range(6)]
    assert logprobs.token_logprobs is not None and logprobs.token_logprobs[0] is None
    assert reply.usage is not None and reply.usage.prompt_tokens == 3 and reply.usage.completion_tokens == 9
    chat = await client.chat.completions.create(model=BASE_NAME, messages=MESSAGES, n=2, stop="wor")
    assert [choice.message.content for choice in chat.choices] == ["Hello ", "Hello "]
    assert (chat.choices[0].model_extra or {})["stop_reason"] == "wor"


@pytest.mark.anyio
async def test_completions(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model=BASE_NAME, prompt=["a", "b"], max_tokens=3, stop=["zz"], logprobs=1)
    assert [choice.text for choice in reply.choices] == ["Hel", "Hel"]
    stream = await client.completions.create(model=BASE_NAME, prompt=[1, 2], max_tokens=3, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hel"


@pytest.mark.anyio
async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [BASE_NAME, "pirate"]
    assert (await client.models.retrieve("pirate")).owned_by == "loramux"


@pytest.mark.anyio
async def test_errors_are_of_the_clients_own_classes(server: Server, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        await client.chat.completions.create(model=BASE_NAME, messages=MESSAGES, n=129)
    assert unsupported.value.param == "n"
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()
    server.engine.refusal = ServerBusy("the queue is full")
    with pytest.raises(openai.InternalServerError) as busy:
        await client.chat.completions.create(model=BASE_NAME, messages=MESSAGES, stream=True)
    assert busy.value.status_code == 503


@pytest.mark.anyio
async def test_an_error_in_mid_stream_is_raised(server: Server, client: openai.AsyncOpenAI) -> None:
    server.engine.error_after = 4
    stream = await client.chat.completions.create(model="pirate", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="the step of this request failed"):
        async for _ in stream:
            pass
