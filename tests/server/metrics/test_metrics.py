from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loramux_server.engine.engine import EngineMetrics
from loramux_server.metrics.gauges import POOLS, GaugeReadings
from loramux_server.metrics.metrics import Metrics


def samples(metrics: Metrics) -> dict[str, float]:
    """name{label="value",...} -> value, as it is written."""
    lines = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def use_everything(metrics: Metrics) -> None:
    metrics.step_done(4, 2, 0.05)
    metrics.queued(0.01)
    metrics.first_token(0.2)
    metrics.inter_token(0.03)
    metrics.request_started("pirate")
    metrics.tokens("pirate", 10, 1)
    metrics.tokens(None, 5, 2)
    metrics.prefix_looked_up(16, 40)
    metrics.slot_loaded(0.002)
    metrics.evicted(3)
    metrics.aborted()
    metrics.host_cache().loaded(0.1)
    metrics.host_cache().evicted()
    metrics.request_finished("pirate", "stop", 1.5)
    metrics.request_finished(None, "abort", 0.5)
    metrics.request_finished(None, "rejected", 0.0)
    metrics.request_refused()
    metrics.registered({"pirate", "haiku"})
    metrics.stored(versions=5, corrupt=1, pinned=2)
    metrics.verified("unverified")
    metrics.watch_failed()


def test_the_engine_can_use_it() -> None:
    metrics: EngineMetrics = Metrics()
    metrics.step_done(1, 0, 0.1)


def test_every_event_is_counted_under_its_name() -> None:
    metrics = Metrics()
    use_everything(metrics)
    values = samples(metrics)
    expected = {
        'loramux_requests_total{adapter="pirate",outcome="stop"}': 1,
        'loramux_requests_total{adapter="base",outcome="abort"}': 1,
        'loramux_requests_total{adapter="base",outcome="rejected"}': 1,
        'loramux_requests_total{adapter="unknown",outcome="rejected"}': 1,
        'loramux_prompt_tokens_total{adapter="pirate"}': 10,
        'loramux_generated_tokens_total{adapter="pirate"}': 1,
        'loramux_generated_tokens_total{adapter="base"}': 2,
        "loramux_aborts_total": 1,
        "loramux_sequences_cancelled_total": 1,
        "loramux_prefix_cache_queries_total": 40,
        "loramux_prefix_cache_hits_total": 16,
        "loramux_slot_loads_total": 1,
        'loramux_adapter_evictions_total{tier="device"}': 3,
        'loramux_adapter_evictions_total{tier="host"}': 1,
        'loramux_adapter_load_seconds_count{tier="device"}': 1,
        'loramux_adapter_load_seconds_sum{tier="host"}': 0.1,
        "loramux_batch_size_sum": 4,
        "loramux_batch_adapters_sum": 2,
        "loramux_step_duration_seconds_count": 1,
        "loramux_queue_time_seconds_sum": 0.01,
        "loramux_time_to_first_token_seconds_sum": 0.2,
        "loramux_inter_token_seconds_sum": 0.03,
        "loramux_request_duration_seconds_count": 2,
        "loramux_request_duration_seconds_sum": 2.0,
        "loramux_adapters_registered": 2,
        "loramux_adapters_pinned": 2,
        "loramux_adapter_versions": 5,
        "loramux_adapter_versions_corrupt": 1,
        'loramux_adapter_verifications_total{outcome="unverified"}': 1,
        'loramux_adapter_verifications_total{outcome="rejected"}': 0,
        "loramux_watch_failures_total": 1,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_gauges_are_asked_for_at_each_scrape() -> None:
    metrics = Metrics()
    readings = GaugeReadings(
        3, 4, 5, 7, 20, 2, 6, {"base": 100, "kv": 50}, base_bytes=99, lookups={("host", "miss"): 7}
    )
    metrics.read_gauges_from(lambda: readings)
    values = samples(metrics)
    expected = {
        "loramux_requests_running": 3,
        "loramux_requests_waiting": 4,
        "loramux_kv_blocks_used": 5,
        "loramux_kv_blocks_kept": 7,
        "loramux_kv_blocks": 20,
        "loramux_kv_usage_ratio": 0.25,
        "loramux_adapters_device": 2,
        "loramux_adapters_host": 6,
        "loramux_base_memory_bytes": 99,
        'loramux_pool_bytes{pool="base"}': 100,
        'loramux_pool_bytes{pool="adapter_host"}': 0,
        'loramux_adapter_lookups_total{result="miss",tier="host"}': 7,
        'loramux_adapter_lookups_total{result="hit",tier="device"}': 0,
    }
    assert {name: values[name] for name in expected} == expected
    assert sum(name.startswith("loramux_pool_bytes") for name in values) == len(POOLS)


def test_who_waits_is_counted_by_adapter_under_the_labels_there_are() -> None:
    metrics = Metrics(adapter_labels=1)
    metrics.request_started("a")
    waiting: dict[str | None, int] = {None: 1, "a": 2, "b": 3, "c": 4, "a+b": 5}
    metrics.read_gauges_from(lambda: GaugeReadings(waiting=15, waiting_by_adapter=waiting))
    values = samples(metrics)
    found = {
        label: values[f'loramux_adapter_requests_waiting{{adapter="{label}"}}'] for label in ("base", "a", "other")
    }
    assert found == {"base": 1, "a": 2, "other": 7}
    assert values['loramux_adapter_requests_waiting{adapter="composed"}'] == 5


def test_two_servers_in_one_process_do_not_share_counts() -> None:
    first, second = Metrics(), Metrics()
    first.aborted()
    assert samples(second)["loramux_sequences_cancelled_total"] == 0


def test_a_deleted_adapter_gives_its_label_to_the_next() -> None:
    metrics = Metrics(adapter_labels=1)
    metrics.request_started("a")
    metrics.tokens("a", 1, 1)
    metrics.adapter_deleted("a")
    metrics.request_started("b")
    metrics.tokens("b", 1, 1)
    values = samples(metrics)
    assert values['loramux_generated_tokens_total{adapter="b"}'] == 1
    assert values['loramux_generated_tokens_total{adapter="other"}'] == 1
    assert 'loramux_generated_tokens_total{adapter="a"}' not in values


UNITS = re.compile(
    "milliseconds|microseconds|nanoseconds|minutes|hours|days|weeks|bits|kilobytes|megabytes|gigabytes|kibibytes|"
    "mebibytes|percent|percentage|s|ms|us|ns|sec|b|kb|mb|gb|tb|pb|m|h|d"
)


def test_names_pass_the_rules_of_promtool() -> None:
    metrics = Metrics()
    use_everything(metrics)
    text = metrics.render().decode()
    families = list(text_string_to_metric_families(text))
    assert {family.name.split("_")[0] for family in families} == {"loramux", "process", "python"}
    for family in families:
        assert family.documentation
        if not family.name.startswith("loramux_"):
            continue
        name = family.name
        assert re.fullmatch("[a-z0-9_]+", name)
        words = name.split("_")
        assert not any(UNITS.fullmatch(word) for word in words), name
        assert not {"counter", "gauge", "histogram", "summary", "total", "created"} & set(words), name
        assert words[-1] not in ("count", "sum", "bucket"), name
        assert family.type in ("counter", "gauge", "histogram")
        if {"seconds", "bytes", "ratio"} & set(words):
            assert words[-1] in ("seconds", "bytes", "ratio"), name


def test_there_is_no_series_of_creation_times() -> None:
    metrics = Metrics()
    use_everything(metrics)
    assert b"_created" not in metrics.render()
