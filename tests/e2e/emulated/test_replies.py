"""Replies of a server whose steps run in Triton on a late device: alone and in company, whole, streamed and cut off."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from e2e.emulated.conftest import RANKS, Place
from loramux_adapters import nf4
from loramux_server.kernels.gpu.step.answers import StepAnswers
from loramux_server.kernels.gpu.step.decoder import GpuDecoder
from support.emulated_server import EmulatedServer
from support.replies import Reply, streamed, whole
from support.tiny_models import tiny_tokenizer

GREEDY = {"max_tokens": 5, "temperature": 0, "logprobs": 3, "ignore_eos": True}
LONG = "A prompt of more tokens than one step takes, so it comes in chunks."


def scaled(*parts: tuple[str, float]) -> dict[str, Any]:
    return {"model": "tiny", "adapters": [{"name": name, "scale": scale} for name, scale in parts]}


def body_of(kind: dict[str, Any] | str, prompt: str, **more: Any) -> dict[str, Any]:
    return {**GREEDY, **(kind if isinstance(kind, dict) else {"model": kind}), "prompt": prompt, **more}


def told(server: EmulatedServer, body: dict[str, Any]) -> dict[str, Any]:
    """The one choice of a reply."""
    with server.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def test_the_server_runs_whole_steps_of_ours_and_checked_them(server: EmulatedServer) -> None:
    assert server.said("a reply is the same, bit for bit") and not server.said("NO kernels of our own")
    told(server, body_of("tiny", "started"))
    kinds = {kind for kind, _ in server.device.started[-20:]}
    assert {"copy", "replay"} <= kinds, "decode steps are pinned copies and graphs"


def test_a_mixed_batch_gives_the_bits_of_each_request_alone(server: EmulatedServer) -> None:
    kinds = ["tiny", *RANKS, scaled(("eight", 0.7), ("thirty-two", -0.5))]
    bodies = [body_of(kind, f"Number {index} says") for index, kind in enumerate(kinds)]
    bodies.append(body_of("sixteen", "drawn", temperature=0.8, seed=5, top_p=0.9))
    bodies.append(body_of("tiny", LONG))
    alone = [told(server, body) for body in bodies]
    assert len({str(choice["logprobs"]["token_logprobs"]) for choice in alone}) == len(bodies)
    steps, adapters = (server.metric(f"loramux_batch_adapters_{what}") for what in ("count", "sum"))
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: told(server, body), bodies))
    steps = server.metric("loramux_batch_adapters_count") - steps
    adapters = server.metric("loramux_batch_adapters_sum") - adapters
    assert adapters / steps > 1.2, "batches were not mixed"
    assert together == alone


def test_a_stream_says_what_a_whole_reply_says(server: EmulatedServer) -> None:
    for body in (body_of("tiny", "abc"), body_of("eight", "abc", temperature=1.0, seed=3)):
        assert streamed(server, body).reply == whole(server, body).reply


def test_a_chat_says_the_same_streamed_and_whole_to_the_public_client(server: EmulatedServer) -> None:
    asked: dict[str, Any] = {
        "model": "sixteen",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 5,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    with openai.OpenAI(api_key="unused", base_url=f"{server.url}/v1", max_retries=0, timeout=120) as client:
        plain = client.chat.completions.create(**asked)
        stream = client.chat.completions.create(**asked, stream=True)
        pieces = [event.choices[0].delta.content or "" for event in stream if event.choices]
    assert "".join(pieces) == plain.choices[0].message.content


@pytest.mark.parametrize("more", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {}], ids=str)
def test_a_seed_draws_the_same_again(server: EmulatedServer, more: dict[str, Any]) -> None:
    drawn = body_of("tiny", "draw", temperature=1.5, seed=11, max_tokens=3, **more)
    first = told(server, drawn)
    assert told(server, drawn) == first
    if not more:
        assert told(server, drawn | {"seed": 12}) != first


def test_a_prompt_that_is_known_gives_the_same_reply(server: EmulatedServer) -> None:
    body = body_of("eight", LONG + " Once.")
    with server.client() as client:
        first, second = (client.post("/v1/completions", json=body).json() for _ in range(2))
    cached = [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in (first, second)]
    assert cached[0] == 0 and cached[1] >= 48
    assert first["choices"] == second["choices"]


def test_a_client_that_leaves_frees_everything(server: EmulatedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    own, steps, has_left = GpuDecoder.start, count(), threading.Event()

    def start(decoder: GpuDecoder, *step: Any) -> StepAnswers:
        if next(steps) >= 4:  # the reply must not end sooner
            assert has_left.wait(20)
        return own(decoder, *step)

    monkeypatch.setattr(GpuDecoder, "start", start)
    body = body_of("thirty-two", "leaves", max_tokens=60, stream=True)
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()  # kept: one that nobody holds closes the connection
        next(lines)
        server.wait_for("loramux_requests_running", 1, 20)
    has_left.set()
    server.wait_for("loramux_requests_running", 0, 20)
    server.wait_for("loramux_kv_blocks_used", 0, 20)
    assert next(steps) < 60


@pytest.mark.parametrize("name", ["tiny", "sixteen"])
def test_greedy_tokens_are_transformers_own_in_fp32(server: EmulatedServer, place: Place, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(place.base, dtype=torch.float32)
    lora = load_file(place.adapter(name, rank=16, seed=16) / "adapter_model.safetensors") if name in RANKS else {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in path:
            module.weight.data = nf4.dequantize(*nf4.quantize(module.weight.data))
            if lora:
                a, b = (lora[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
                module.weight.data += b @ a  # alpha is the rank
    tokenizer = tiny_tokenizer()
    ids, expected = tokenizer.encode("What is said, and then goes on"), []
    prompt = list(ids)
    with torch.no_grad():
        for _ in range(6):
            scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            best, second = scores.topk(2).values.tolist()
            if best - second < 0.1:  # rounding may turn it
                break
            ids.append(int(scores.argmax()))
            expected.append(best)
    assert expected, "no clear margin"
    choice = told(server, body_of(name, tokenizer.decode(prompt), max_tokens=len(expected)))
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=0.05)


def test_what_a_reply_streams_while_a_long_prompt_comes_in_does_not_change(server: EmulatedServer) -> None:
    short, long = body_of("sixteen", "short", max_tokens=8), body_of("thirty-two", LONG + " Twice.", max_tokens=2)
    alone = streamed(server, short).reply, told(server, long)
    with ThreadPoolExecutor(1) as pool:
        beside: list[Any] = []

        def begin(response: Any) -> None:
            beside.append(pool.submit(told, server, long))

        during: Reply = streamed(server, short, begin).reply
        assert (during, beside[0].result()) == alone


def test_metrics_tell_what_is_there(server: EmulatedServer) -> None:
    told(server, body_of("eight", "counted"))
    built = server.built
    assert built is not None
    held = server.device.memory().held
    pools = {pool: server.metric("loramux_pool_bytes", pool=pool) for pool in ("base", "adapter_device", "kv")}
    assert all(value > 0 for value in pools.values()) and sum(pools.values()) < held
    assert server.metric("loramux_adapters_device") == len(built.client.stats().resident)
    assert server.adapters()["eight"]["tier"] == "device"
