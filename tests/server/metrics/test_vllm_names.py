from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from loramux_server.metrics.gauges import GaugeReadings
from loramux_server.metrics.metrics import Metrics
from loramux_server.metrics.vllm_names import LoraRequests, render_vllm
from support.fakes_api import record_of

NOW = 1_700_000_000.5
V1, V2, OLD = ("1" * 64, "2" * 64, "0" * 64)
FAMILIES = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:lora_requests_info": "gauge",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:request_success": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
}


def used() -> Metrics:
    metrics = Metrics()
    metrics.read_gauges_from(lambda: GaugeReadings(3, 4, 5, 0, 20))
    metrics.prefix_looked_up(16, 40)
    metrics.first_token(0.2)
    metrics.inter_token(0.03)
    metrics.inter_token(0.05)
    metrics.queued(0.01)
    metrics.request_started("pirate")
    metrics.tokens("pirate", 10, 1)
    metrics.tokens(None, 5, 2)
    for adapter, outcome in (("pirate", "stop"), (None, "stop"), (None, "abort"), (None, "error"), (None, "rejected")):
        metrics.request_finished(adapter, outcome, 0.5)
    return metrics


def rendered(metrics: Metrics, adapters: LoraRequests | None) -> str:
    return render_vllm(metrics, "base", adapters, NOW).decode()


def samples(text: str) -> dict[str, float]:
    """Without the label that all have: name{label="value",...} -> value."""
    lines = [line.replace('model_name="base"', "") for line in text.splitlines() if not line.startswith("#")]
    pairs = [line.rpartition(" ") for line in lines]
    return {name.replace(",}", "}").replace("{,", "{").removesuffix("{}"): float(value) for name, _, value in pairs}


def test_every_family_has_vllms_name_and_type_and_the_models_name() -> None:
    families = list(text_string_to_metric_families(rendered(used(), LoraRequests(4, [], []))))
    assert {family.name: family.type for family in families} == FAMILIES
    for family in families:
        assert family.documentation and family.samples
        assert all(sample.labels["model_name"] == "base" for sample in family.samples)


def test_values_are_those_of_our_own_metrics() -> None:
    values = samples(rendered(used(), None))
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 4,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prompt_tokens_total": 15,
        "vllm:generation_tokens_total": 3,
        'vllm:request_success_total{finished_reason="stop"}': 2,
        'vllm:request_success_total{finished_reason="length"}': 0,
        'vllm:request_success_total{finished_reason="abort"}': 1,
        "vllm:time_to_first_token_seconds_sum": 0.2,
        "vllm:time_per_output_token_seconds_count": 2,
        'vllm:time_per_output_token_seconds_bucket{le="0.03"}': 1,
        "vllm:prefix_cache_queries_total": 40,
        "vllm:prefix_cache_hits_total": 16,
        "vllm:request_queue_time_seconds_sum": 0.01,
        "vllm:e2e_request_latency_seconds_count": 4,
    }
    assert {name: values[name] for name in expected} == expected
    assert not any("error" in name or "rejected" in name for name in values)


def test_asking_again_counts_nothing_twice() -> None:
    metrics = used()
    first = rendered(metrics, None)
    metrics.render()
    assert rendered(metrics, None) == first


def test_adapters_are_running_while_their_current_version_is_on_the_device() -> None:
    records = [record_of("pirate", V1, rank=8), record_of("haiku", V2, rank=9), record_of("twin", V1, rank=8)]
    waiting: dict[str | None, int] = {"haiku": 1, "haiku+pirate": 2, None: 1}
    readings = GaugeReadings(slot_rows=100, device_versions={V1, OLD}, waiting_by_adapter=waiting)
    adapters = LoraRequests.of(readings, records)
    assert adapters.most == 6, "rank 9 takes 16 rows"
    text = rendered(Metrics(), adapters)
    lines = [line for line in text.splitlines() if line.startswith("vllm:lora_requests_info")]
    assert lines == [
        'vllm:lora_requests_info{max_lora="6",model_name="base",running_lora_adapters="pirate,twin",'
        'waiting_lora_adapters="haiku,pirate"} 1.7000000005e+09'
    ]


def test_without_adapters_the_smallest_slot_counts() -> None:
    adapters = LoraRequests.of(GaugeReadings(slot_rows=100), [])
    assert (adapters.most, adapters.running, adapters.waiting) == (12, [], set())
