from __future__ import annotations

import re
from pathlib import Path

import pytest

from loramux_adapters.errors import AdapterError, StoreUnavailable, TrainingError
from loramux_server.api.http.errors import _TABLE, answer_to
from loramux_server.errors import CommandFailed, LoramuxError
from loramux_server.metrics.gauges import GaugeReadings
from support.fakes_api import BASE_NAME, CONTEXT, VERSION, Server, make_server, record_of
from support.raw_call import RawCall


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


# models


@pytest.mark.anyio
async def test_models_are_the_base_and_the_adapters(server: Server) -> None:
    async with server.client() as client:
        reply = await client.get("/v1/models")
    common = {"object": "model", "created": 1_700_000_000, "owned_by": "loramux", "max_model_len": CONTEXT}
    assert reply.json() == {
        "object": "list",
        "data": [
            {"id": BASE_NAME, "root": "ba5e" * 16, "parent": None} | common,
            {"id": "pirate", "root": VERSION, "parent": BASE_NAME} | common,
        ],
    }


@pytest.mark.anyio
async def test_an_adapter_that_has_the_bases_name_is_not_listed_beside_it(server: Server) -> None:
    server.store.known[BASE_NAME] = record_of(BASE_NAME, "0" * 64)
    async with server.client() as client:
        reply = await client.get("/v1/models")
    assert [model["id"] for model in reply.json()["data"]] == [BASE_NAME, "pirate"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("model", "root"),
    [
        (BASE_NAME, "ba5e" * 16),
        ("pirate", VERSION),
        (f"{BASE_NAME}:pirate", VERSION),
        (f"pirate@{VERSION[:9]}", VERSION),
        ("org/pirate", VERSION),
        (f"{BASE_NAME}:org/pirate@{VERSION[:9]}", VERSION),
    ],
)
async def test_a_model_is_shown_under_each_of_its_spellings(server: Server, model: str, root: str) -> None:
    server.store.known["org/pirate"] = record_of("org/pirate", VERSION)
    async with server.client() as client:
        reply = await client.get(f"/v1/models/{model}")
    assert (reply.status_code, reply.json()["id"], reply.json()["root"]) == (200, model, root)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "model", ["nobody", "pirate@00000000", "../../etc/passwd", "a/b", "a/b@00000000", "%00", "%0a"]
)
async def test_an_unknown_model_is_404(server: Server, model: str) -> None:
    async with server.client() as client:
        reply = await client.get(f"http://localhost/v1/models/{model}")
    assert (reply.status_code, reply.json()["error"]["code"]) in ((404, "model_not_found"), (404, "not_found"))


# operations


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("alive", "ready", "health_status", "ready_status"),
    [(True, True, 200, 200), (True, False, 200, 503), (False, False, 503, 503)],
)
async def test_health_asks_for_a_restart_and_readiness_for_patience(
    server: Server, alive: bool, ready: bool, health_status: int, ready_status: int
) -> None:
    server.engine.alive, server.engine.ready = alive, ready
    async with server.client() as client:
        assert (await client.get("/health")).status_code == health_status
        assert (await client.get("/ready")).status_code == ready_status


@pytest.mark.anyio
async def test_metrics_can_be_scraped(server: Server) -> None:
    server.store.known["haiku"] = record_of("haiku", "0" * 64)
    await server.post("/v1/completions", {"model": "pirate", "prompt": "x"})
    async with server.client() as client:
        reply = await client.get("/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "loramux_adapters_registered 2.0" in reply.text
    assert 'loramux_requests_total{adapter="pirate",outcome="stop"} 1.0' in reply.text


@pytest.mark.anyio
async def test_metrics_can_be_scraped_while_the_store_cannot_be_read(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.metrics.registered({"pirate"})
    server.store.failure = StoreUnavailable("the database is locked")
    async with server.client() as client:
        reply = await client.get("/metrics")
    assert reply.status_code == 200
    assert "loramux_adapters_registered 1.0" in reply.text
    assert "the database is locked" in caplog.text


@pytest.mark.anyio
async def test_the_same_measurements_have_vllms_names_too(server: Server) -> None:
    server.metrics.read_gauges_from(
        lambda: GaugeReadings(waiting=2, slot_rows=64, device_versions={VERSION}, waiting_by_adapter={"haiku": 2})
    )
    await server.post("/v1/completions", {"model": "pirate", "prompt": "x"})
    async with server.client() as client:
        reply = await client.get("/metrics/vllm")
        server.store.failure = StoreUnavailable("the database is locked")
        without_store = await client.get("/metrics/vllm")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert f'vllm:num_requests_waiting{{model_name="{BASE_NAME}"}} 2.0' in reply.text
    assert f'vllm:request_success_total{{finished_reason="stop",model_name="{BASE_NAME}"}} 1.0' in reply.text
    assert 'running_lora_adapters="pirate",waiting_lora_adapters="haiku"' in reply.text
    assert without_store.status_code == 200
    assert "lora_requests_info" not in without_store.text and "vllm:num_requests_waiting" in without_store.text


# what the router refuses, and what every response has in common


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/redoc", 404), ("POST", "/", 405), ("GET", "/v1//models", 404),
        ("POST", "/v1/load_lora_adapter", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/v1/models", 405),
        ("PATCH", "/v1/adapters/pirate", 405), ("HEAD", "/v1/completions", 405), ("OPTIONS", "/v1/models", 405),
    ],
)  # fmt: skip
async def test_unknown_paths_and_methods_are_refused_in_openais_shape(
    server: Server, method: str, path: str, status: int
) -> None:
    async with server.client() as client:
        reply = await client.request(method, path)
    assert reply.status_code == status
    if method != "HEAD":
        assert reply.json()["error"].keys() == {"message", "type", "param", "code"}
    assert ("allow" in reply.headers) == (status == 405)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "methods"),
    [("/v1/adapters/pirate", {"GET", "PUT", "DELETE"}), ("/v1/adapters/pirate/pin", {"POST", "DELETE"})],
)
async def test_a_refused_method_is_told_all_that_the_path_takes(server: Server, path: str, methods: set[str]) -> None:
    async with server.client() as client:
        assert set((await client.request("PATCH", path)).headers["allow"].split(", ")) == methods


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("call", "methods", "refused"),
    [
        ("archive", {"GET"}, ["PUT", "DELETE"]),
        ("pin", {"POST", "DELETE"}, ["GET", "PUT"]),
        ("rollback", {"POST"}, ["GET", "PUT", "DELETE"]),
    ],
)
async def test_a_call_on_an_adapter_is_no_adapters_name(
    server: Server, call: str, methods: set[str], refused: list[str]
) -> None:
    async with server.client() as client:
        for method in refused:
            reply = await client.request(method, f"/v1/adapters/pirate/{call}")
            assert (reply.status_code, set(reply.headers["allow"].split(", "))) == (405, methods)


@pytest.mark.anyio
@pytest.mark.parametrize("given", [b"trace-1:a.b_c", b"x" * 128])
async def test_a_callers_own_request_id_is_kept(server: Server, given: bytes) -> None:
    async with server.client() as client:
        reply = await client.get("/health", headers={b"x-request-id": given})
    assert reply.headers["x-request-id"] == given.decode()


@pytest.mark.anyio
@pytest.mark.parametrize("given", [b"", b"a b", b"a\r\nx: y", b"\xff", b"x" * 129, b"<script>", b"a\x00"])
async def test_a_request_id_that_could_do_harm_is_replaced(server: Server, given: bytes) -> None:
    call = RawCall(server.app, "GET", "/v1/nothing", headers=[(b"x-request-id", given)])
    await call.task
    headers = dict(call.sent[0]["headers"])
    assert re.fullmatch(b"req-[0-9a-f]{32}", headers[b"x-request-id"])


@pytest.mark.anyio
@pytest.mark.parametrize(
    "headers", [[(b"x", b"y" * 10**7)], [(b"x-%d" % n, b"y") for n in range(10**4)], [(b"y" * 40_000, b"")]]
)
async def test_a_huge_header_is_431(server: Server, headers: list[tuple[bytes, bytes]]) -> None:
    call = RawCall(server.app, "GET", "/health", headers=headers)
    await call.task
    assert call.sent[0]["status"] == 431


@pytest.mark.anyio
async def test_a_huge_path_is_431(server: Server) -> None:
    call = RawCall(server.app, "GET", "/v1/models/" + "x" * 40_000)
    await call.task
    assert call.sent[0]["status"] == 431


# the table of errors


def tree_of(root: type[Exception]) -> set[type[Exception]]:
    return {root}.union(*(tree_of(kind) for kind in root.__subclasses__()))


def test_every_error_that_a_request_can_raise_has_its_row() -> None:
    rows = {kind for kind, *_ in _TABLE}
    at_start_only = {
        "ConfigError",
        "BaseModelError",
        "CommandFailed",
        "LoramuxError",
        "AdapterError",
        "Refusal",
        "TokenizerMissing",
        "IndexLost",
        "DeviceMissing",
        "VectorsNotServed",  # a kind of AdapterRejected, whose row it has
        "GrammarFailed",  # the engine ends its sequence with this message
        "CannotCapture",  # the engine runs the step without a graph
    }
    kinds = {kind for kind in tree_of(LoramuxError) | tree_of(AdapterError) if kind.__module__.endswith("errors")}
    kinds -= tree_of(TrainingError) | tree_of(CommandFailed)  # of commands, which no request starts
    assert {kind.__name__ for kind in kinds - rows} <= at_start_only


def test_what_is_no_error_of_ours_says_nothing_of_itself() -> None:
    answer = answer_to(ValueError("at 0x7f00 in /srv/model.py"))
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert "0x" not in str(answer.body) and "/srv" not in str(answer.body)
