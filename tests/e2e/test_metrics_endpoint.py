"""/metrics of the real process: everything promised is there, and the numbers are those of what was sent."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx

from support.real_adapters import ADAPTERS
from support.real_server import BASE, RealServer, eventually
from support.replies import whole

PROMISED = {
    *["loramux_requests_total", "loramux_prompt_tokens_total", "loramux_generated_tokens_total"],
    *["loramux_time_to_first_token_seconds_bucket", "loramux_inter_token_seconds_bucket"],
    *["loramux_request_duration_seconds_bucket", "loramux_queue_time_seconds_bucket"],
    *["loramux_batch_size_bucket", "loramux_batch_adapters_bucket", "loramux_step_duration_seconds_bucket"],
    *["loramux_requests_running", "loramux_requests_waiting"],
    *["loramux_kv_blocks", "loramux_kv_blocks_used", "loramux_kv_usage_ratio"],
    *["loramux_adapters_registered", "loramux_adapters_host", "loramux_adapters_device"],
    *["loramux_slot_loads_total", "loramux_adapter_evictions_total", "loramux_adapter_load_seconds_bucket"],
    *["loramux_pool_bytes", "loramux_base_memory_bytes", "loramux_aborts_total"],
    *["loramux_event_loop_pause_seconds_bucket", "loramux_event_loop_longest_pause_seconds"],
    *["process_resident_memory_bytes", "process_open_fds", "python_info"],
}
BASE_LABEL = "base"
MIB = 2**20

Scrape = dict[str, dict[tuple[tuple[str, str], ...], float]]


def ask(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "One, two, three,", "max_tokens": 5, "temperature": 0, "logprobs": 0, **more}


def grown(before: Scrape, after: Scrape, name: str, **labels: str) -> float:
    def total(scrape: Scrape) -> float:
        return sum(value for key, value in scrape.get(name, {}).items() if labels.items() <= dict(key).items())

    return total(after) - total(before)


def assert_no_counter_went_back(before: Scrape, after: Scrape) -> None:
    for name, series in before.items():
        if name.endswith(("_total", "_count", "_sum", "_bucket")):
            for labels, value in series.items():
                assert after[name][labels] >= value, (name, labels)


def test_everything_promised_is_there_and_plausible(server: RealServer) -> None:
    whole(server, ask(ADAPTERS[0]))
    scrape = server.scrape()
    assert not PROMISED - scrape.keys()
    foreign = [name for name in scrape if not name.startswith(("loramux_", "process_", "python_"))]
    assert not foreign
    assert server.metric("loramux_adapters_registered") == len(ADAPTERS)
    assert 0 <= server.metric("loramux_event_loop_longest_pause_seconds")
    assert 1 <= server.metric("loramux_adapters_device")
    assert 1 <= server.metric("loramux_adapters_host")
    assert 60 * MIB < server.metric("loramux_base_memory_bytes") < 200 * MIB
    assert server.metric("loramux_pool_bytes", pool="base") == server.metric("loramux_base_memory_bytes")
    assert server.metric("loramux_pool_bytes", pool="kv") <= 256 * MIB
    assert 0 < server.metric("loramux_pool_bytes", pool="adapter_device") <= 640 * MIB
    assert 0 < server.metric("loramux_pool_bytes", pool="adapter_host") <= 1024 * MIB
    pools = sum(scrape["loramux_pool_bytes"].values())
    assert server.metric("process_resident_memory_bytes") > pools / 2
    assert 0 < server.metric("loramux_slot_loads_total")
    loads = grown({}, scrape, "loramux_adapter_load_seconds_count", tier="device")
    assert loads == grown({}, scrape, "loramux_slot_loads_total")


def test_routers_find_the_same_under_the_names_they_know(server: RealServer) -> None:
    whole(server, ask(ADAPTERS[5]))
    ours, theirs = server.scrape(), server.scrape("/metrics/vllm")
    assert all(name.startswith("vllm:") for name in theirs)
    for name, same in (("generated", "generation"), ("prompt", "prompt")):
        assert sum(ours[f"loramux_{name}_tokens_total"].values()) == sum(theirs[f"vllm:{same}_tokens_total"].values())
    assert [*theirs["vllm:num_requests_running"].values()] == [0]
    ((labels, when),) = theirs["vllm:lora_requests_info"].items()
    assert ADAPTERS[5] in dict(labels)["running_lora_adapters"].split(",")
    assert abs(when - time.time()) < 60


def test_counts_are_those_of_what_was_sent(server: RealServer) -> None:
    first, second = ADAPTERS[0], ADAPTERS[1]
    text = whole(server, ask(first)).reply.text
    with server.client() as client:
        prompt = client.post("/v1/completions", json=ask(BASE)).json()["usage"]["prompt_tokens"]
        before = server.scrape()
        for body in (ask(BASE), ask(first), ask(first), ask(second, prompt=["One, two, three,"] * 3)):
            assert client.post("/v1/completions", json=body).status_code == 200
        stopped = client.post("/v1/completions", json=ask(first, stop=text[3:6])).json()
        assert stopped["choices"][0]["finish_reason"] == "stop"
        for body in (ask("nobody"), ask(first, max_tokens=0), ask(first, max_tokens=4000), ask(BASE, n=0)):
            assert client.post("/v1/completions", json=body).status_code in (400, 404)
    server.wait_for("loramux_requests_running", 0)
    after = server.scrape()

    requests = {
        (BASE_LABEL, "length"): 1,
        (first, "length"): 2,
        (first, "stop"): 1,
        (second, "length"): 1,
        (first, "rejected"): 1,
        ("unknown", "rejected"): 3,
    }
    for (adapter, outcome), count in requests.items():
        assert grown(before, after, "loramux_requests_total", adapter=adapter, outcome=outcome) == count
    assert grown(before, after, "loramux_requests_total") == sum(requests.values())
    assert grown(before, after, "loramux_request_duration_seconds_count") == 5
    assert grown(before, after, "loramux_queue_time_seconds_count") == 7, "one for each sequence"
    assert grown(before, after, "loramux_time_to_first_token_seconds_count") == 7
    for adapter, sequences in ((BASE_LABEL, 1), (first, 3), (second, 3)):
        assert grown(before, after, "loramux_prompt_tokens_total", adapter=adapter) == sequences * prompt
    assert grown(before, after, "loramux_generated_tokens_total", adapter=BASE_LABEL) == 5
    assert grown(before, after, "loramux_generated_tokens_total", adapter=second) == 15
    assert 10 <= grown(before, after, "loramux_generated_tokens_total", adapter=first) <= 15
    generated = grown(before, after, "loramux_generated_tokens_total")
    assert grown(before, after, "loramux_inter_token_seconds_count") == generated - 7
    assert grown(before, after, "loramux_batch_size_sum") >= generated
    assert grown(before, after, "loramux_aborts_total") == 0
    assert_no_counter_went_back(before, after)


def test_no_counter_goes_back_when_an_adapter_is_deleted(server: RealServer, adapter_dirs: Any) -> None:
    earlier = server.scrape()
    assert server.upload("passing", adapter_dirs[ADAPTERS[3]]).status_code == 201
    whole(server, ask("passing"))
    before = server.scrape()
    assert grown(earlier, before, "loramux_generated_tokens_total", adapter="passing") == 5
    with server.client() as client:
        assert client.delete("/v1/adapters/passing").status_code == 200
    after = server.scrape()
    assert_no_counter_went_back(before, after)
    assert grown(before, after, "loramux_adapters_registered") == -1


def test_a_client_that_leaves_frees_its_sequence(server: RealServer) -> None:
    for stream in (True, False):
        before = server.scrape()
        body = ask(ADAPTERS[1], max_tokens=900, stream=stream, ignore_eos=True)
        if stream:
            with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()  # kept: when it goes, the connection goes
                assert next(lines).startswith("data: {")
                server.wait_for("loramux_requests_running", 1)
        else:
            with server.client() as client:
                leaver = threading.Thread(target=_gives_up, args=(client, body))
                leaver.start()
                server.wait_for("loramux_requests_running", 1, seconds=10)
                leaver.join()
        for name in ("loramux_requests_running", "loramux_kv_blocks_used"):
            server.wait_for(name, 0, seconds=2)
        server.wait_for("loramux_aborts_total", grown({}, before, "loramux_aborts_total") + 1)
        after = server.scrape()
        assert grown(before, after, "loramux_requests_total", adapter=ADAPTERS[1], outcome="abort") == 1
        assert grown(before, after, "loramux_sequences_cancelled_total") == 1
        eventually(lambda: server.adapters()[ADAPTERS[1]]["requests"], 0)
        assert grown(before, after, "loramux_generated_tokens_total") < body["max_tokens"] * 2 / 3


def _gives_up(client: httpx.Client, body: dict[str, Any]) -> None:
    try:
        client.post("/v1/completions", json=body, timeout=1.5)
    except httpx.ReadTimeout:
        return
    raise AssertionError("the reply came sooner than expected")
