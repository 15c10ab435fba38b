"""`adapters` of a request: several adapters, each with a factor, for one reply."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from loramux_adapters.artifact.own_tokens import OwnToken, OwnTokens
from loramux_adapters.errors import AdapterNotFound, StoreUnavailable
from loramux_server.api.completions.request.chat import parse_chat
from loramux_server.engine.scheduling.sequence import AdapterUse
from loramux_server.errors import RequestError
from support.adapter_files import MINIMAL_CONFIG
from support.fakes_api import BASE_NAME, VERSION, FakeTokenizer, Server, make_server, record_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OTHER = hashlib.sha256(b"other").hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Server:
    server = make_server(tmp_path)
    server.store.known["other"] = record_of("other", OTHER, rank=16)
    for name in ("pirate+other", "other+pirate"):
        server.engine.replies[name] = b"Arr"
    server.engine.replies["other"] = b"Well"
    return server


def chat(*adapters: dict[str, Any], **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": BASE_NAME, "messages": messages, "adapters": list(adapters)} | fields


PIRATE, THE_OTHER = {"name": "pirate", "scale": 0.7}, {"name": "other", "scale": -0.5}


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_of_two_adapters_reaches_the_engine_and_says_which_versions_answered(
    server: Server, stream: bool
) -> None:
    reply = await server.post(CHAT, chat(PIRATE, {"name": f"other@{OTHER[:8]}", "scale": -0.5}, stream=stream))
    assert reply.status_code == 200 and ("Arr" in reply.text or stream)
    assert reply.headers["x-loramux-adapter-version"] == f"pirate@{VERSION},other@{OTHER}"
    (sequence,) = server.engine.sequences
    uses = {AdapterUse(VERSION, 8, 1000, 0.7), AdapterUse(OTHER, 16, 1000, -0.5)}
    assert set(sequence.adapters) == uses
    assert sequence.adapter == "pirate+other"
    assert server.store.leased == 0


@pytest.mark.anyio
async def test_completions_take_them_too_and_the_order_of_the_list_does_not_reach_the_engine(server: Server) -> None:
    for adapters in ([PIRATE, THE_OTHER], [THE_OTHER, PIRATE]):
        body = {"model": BASE_NAME, "prompt": ["a", "b"], "adapters": adapters}
        assert (await server.post(COMPLETIONS, body)).status_code == 200
    assert len({sequence.adapters for sequence in server.engine.sequences}) == 1
    assert len(server.engine.sequences) == 4


@pytest.mark.anyio
async def test_a_list_of_one_is_that_adapter_and_its_scale_is_one_unless_given(server: Server) -> None:
    await server.post(CHAT, chat({"name": "pirate"}))
    await server.post(CHAT, chat(model="pirate") | {"adapters": None})
    first, second = server.engine.sequences
    assert first.adapters == second.adapters == (AdapterUse(VERSION, 8, 1000, 1.0),)
    assert first.adapter == second.adapter == "pirate"


@pytest.mark.anyio
async def test_an_adapter_at_scale_zero_is_named_in_the_reply_and_costs_the_engine_nothing(server: Server) -> None:
    reply = await server.post(CHAT, chat(PIRATE, {"name": "other", "scale": 0}))
    assert reply.headers["x-loramux-adapter-version"] == f"pirate@{VERSION},other@{OTHER}"
    assert server.engine.sequences[0].adapters == (AdapterUse(VERSION, 8, 1000, 0.7),)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        (chat(PIRATE, model="pirate"), 400, "model", "'model' names the base"),
        (chat(PIRATE, model=f"{BASE_NAME}:pirate"), 400, "model", "'model' names the base"),
        (chat(PIRATE, model="no//such"), 404, "model", "does not exist"),
        (chat(), 400, "adapters", "at least 1"),
        (chat(*[{"name": f"a{index}"} for index in range(9)]), 400, "adapters", "at most 8"),
        (chat(PIRATE, {"name": "pirate", "scale": 1}), 400, "adapters.1.name", "pirate is listed twice"),
        (chat(PIRATE, {"name": f"pirate@{VERSION[:9]}"}), 400, "adapters.1.name", "pirate is listed twice"),
        (chat(PIRATE, {"name": f"{BASE_NAME}:pirate"}), 400, "adapters.1.name", "pirate is listed twice"),
        (chat({"name": BASE_NAME}), 400, "adapters.0.name", "the base itself"),
        (chat(PIRATE, {"name": "nobody"}), 404, None, "no adapter"),
        (chat(PIRATE, {"name": "other@00000000"}), 404, None, "digest prefix"),
        (chat(PIRATE, {"name": "../other"}), 404, "adapters.1.name", "does not exist"),
        (chat(PIRATE, {"name": "a+b"}), 404, "adapters.1.name", "does not exist"),
        (chat(PIRATE, {"name": ""}), 400, "adapters.1.name", "at least 1"),
        (chat(PIRATE, {"scale": 1}), 400, "adapters.1.name", "missing"),
        (chat(PIRATE, {"name": "other", "scale": 100.5}), 400, "adapters.1.scale", "less than or equal to 100"),
        (chat(PIRATE, {"name": "other", "scale": -101}), 400, "adapters.1.scale", "greater than or equal to -100"),
        (chat(PIRATE, {"name": "other", "scale": "1"}), 400, "adapters.1.scale", "valid number"),
        (chat(PIRATE, {"name": "other", "scale": True}), 400, "adapters.1.scale", "valid number"),
        (chat(PIRATE, {"name": "other", "weight": 1}), 400, "adapters.1.weight", "unknown"),
        (chat() | {"adapters": "pirate"}, 400, "adapters", "list"),
        (chat() | {"adapters": ["pirate"]}, 400, "adapters.0", "object"),
    ],
)
async def test_what_cannot_be_summed_is_refused_and_says_why(
    server: Server, fields: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    reply = await server.post(CHAT, fields)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert server.engine.sequences == [] and server.store.leased == 0


def scaled(scale: str) -> bytes:
    """A body with this text for a scale, which need not be JSON."""
    body = json.dumps(chat({"name": "a", "scale": "SCALE"}))
    return body.replace('"SCALE"', scale).encode()


@pytest.mark.parametrize("scale", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_scale_that_is_not_finite_is_refused(scale: str) -> None:
    with pytest.raises(RequestError):
        parse_chat(scaled(scale))


@given(st.floats(-100, 100))
def test_every_scale_in_range_is_taken_as_it_is(scale: float) -> None:
    (part,) = parse_chat(scaled(repr(scale))).adapters or []
    assert part.scale == scale


@pytest.mark.anyio
@pytest.mark.parametrize("failure", [AdapterNotFound("gone"), StoreUnavailable("disk"), RuntimeError("bug")])
async def test_if_one_lease_fails_the_others_are_given_back(server: Server, failure: Exception) -> None:
    acquire = server.store.acquire

    def failing(name: str, version_prefix: str | None = None) -> Any:
        if name == "other":
            assert server.store.leased == 1
            raise failure
        return acquire(name, version_prefix)

    server.store.acquire = failing  # type: ignore[method-assign]
    reply = await server.post(CHAT, chat(PIRATE, THE_OTHER))
    assert reply.status_code >= 400
    assert server.store.leased == 0


@pytest.mark.anyio
async def test_all_leases_are_held_while_the_request_runs_and_given_back_if_it_is_refused(server: Server) -> None:
    held: list[int] = []
    plain = server.engine.submit

    def submit(*sequences: Any) -> Any:
        held.append(server.store.leased)
        return plain(*sequences)

    server.engine.submit = submit  # type: ignore[method-assign]
    await server.post(CHAT, chat(PIRATE, THE_OTHER))
    assert held == [2] and server.store.leased == 0
    reply = await server.post(CHAT, chat(PIRATE, THE_OTHER, max_tokens=10**6))
    assert reply.status_code == 400 and server.store.leased == 0


@pytest.mark.anyio
async def test_a_sum_counts_once_under_composed(server: Server) -> None:
    await server.post(CHAT, chat(PIRATE, THE_OTHER))
    await server.post(CHAT, chat(PIRATE))
    assert server.metric('loramux_requests_total{adapter="composed",outcome="stop"}') == 1
    assert server.metric('loramux_requests_total{adapter="pirate",outcome="stop"}') == 1
    assert server.metric('loramux_requests_total{adapter="other",outcome="stop"}') == 0


def published(server: Server, version: str, rows: int, own: bytes | None = None) -> None:
    """Files of a version that saved an embedding of so many rows whole."""
    directory = server.store.directory(version)
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(MINIMAL_CONFIG | {"modules_to_save": ["embed_tokens"]}))
    name = "base_model.model.model.embed_tokens.weight"
    save_file({name: torch.zeros(rows, 2)}, directory / "adapter_model.safetensors")
    if own is not None:
        (directory / "own_tokens.json").write_bytes(own)


KNOWN = FakeTokenizer.vocab_size
CALL, ASK = (OwnTokens((OwnToken(KNOWN, text),)).dump() for text in ("<call>", "<ask>"))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("rows", "own", "refused"),
    [
        ((KNOWN, KNOWN), (None, None), None),
        ((KNOWN + 1, KNOWN), (CALL, None), None),
        ((KNOWN + 1, KNOWN + 1), (CALL, CALL), None),
        ((KNOWN + 1, KNOWN + 1), (CALL, ASK), "add different tokens"),
        ((KNOWN + 1, KNOWN + 1), (CALL, None), "other came without the files of its tokenizer"),
        ((KNOWN + 1, KNOWN + 9), (None, None), "pirate came without the files of its tokenizer"),
    ],
)
async def test_adapters_that_add_tokens_answer_together_only_if_these_are_known_to_be_the_same(
    server: Server, rows: tuple[int, int], own: tuple[bytes | None, bytes | None], refused: str | None
) -> None:
    for version, its_rows, its_own in zip((VERSION, OTHER), rows, own, strict=True):
        published(server, version, its_rows, its_own)
    reply = await server.post(CHAT, chat(PIRATE, THE_OTHER))
    if refused is None:
        assert reply.status_code == 200, reply.text
    else:
        error = reply.json()["error"]
        assert (reply.status_code, error["param"], error["code"]) == (400, "adapters", "invalid_value")
        assert refused in error["message"] and "pirate and other" in error["message"]
    assert (await server.post(CHAT, chat(PIRATE, THE_OTHER | {"scale": 0}))).status_code == 200, "it adds nothing"
    assert (await server.post(CHAT, chat(PIRATE))).status_code == 200
    server.store.known["other"] = record_of("other", VERSION)
    assert (await server.post(CHAT, chat(PIRATE, THE_OTHER))).status_code == 200, "two names of one version"
    assert server.store.leased == 0


@pytest.mark.anyio
async def test_an_adapter_with_the_factor_0_lends_a_prompt_no_tokens(server: Server) -> None:
    published(server, VERSION, KNOWN + 1, CALL)
    body = {"model": BASE_NAME, "prompt": [1, KNOWN]}
    assert (await server.post(COMPLETIONS, body | {"adapters": [PIRATE]})).status_code == 200
    assert (await server.post(COMPLETIONS, body | {"adapters": [PIRATE | {"scale": 0}]})).status_code == 400
