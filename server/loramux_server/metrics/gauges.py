"""Gauges, and the counts beside them, that are read at each scrape and kept nowhere: how full everything is now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

POOLS = ("base", "adapter_device", "adapter_host", "adapter_tokens", "kv", "overhead")
LOOKUPS = tuple((tier, result) for tier in ("device", "host") for result in ("hit", "miss"))


@dataclass(frozen=True, slots=True)
class GaugeReadings:
    """How full everything is at one moment; asked for once per scrape.

    Attributes:
        running, waiting: sequences that hold KV blocks, and sequences in the queue.
        kv_blocks_used, kv_blocks_kept, kv_blocks: blocks of the KV cache, in use, kept for prompts that begin alike,
            and in all.
        adapters_device, adapters_host: adapter versions resident there.
        pool_bytes: bytes held, by pool (`POOLS`).
        base_bytes: size of the resident base model.
        slot_rows: rank rows of the device's adapter memory.
        device_versions: the versions resident there.
        waiting_by_adapter: sequences in the queue, by the name they asked for, several joined by "+"; None: the base.
        lookups: (tier, "hit" or "miss") -> how often an adapter was needed there, since the start.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_kept: int = 0
    kv_blocks: int = 0
    adapters_device: int = 0
    adapters_host: int = 0
    pool_bytes: Mapping[str, int] = field(default_factory=dict)
    base_bytes: int = 0
    slot_rows: int = 0
    device_versions: Collection[str] = ()
    waiting_by_adapter: Mapping[str | None, int] = field(default_factory=dict)
    lookups: Mapping[tuple[str, str], int] = field(default_factory=dict)


class GaugeCollector(Collector):
    """Asks `source` for one consistent snapshot at each scrape; `label` gives an adapter's label value."""

    def __init__(self, label: Callable[[str | None], str]) -> None:
        self.source: Callable[[], GaugeReadings] = GaugeReadings
        self._label = label

    def describe(self) -> Iterable[Metric]:
        return self._families(GaugeReadings())

    def collect(self) -> Iterator[Metric]:
        yield from self._families(self.source())

    def _families(self, readings: GaugeReadings) -> list[Metric]:
        usage = readings.kv_blocks_used / readings.kv_blocks if readings.kv_blocks else 0.0
        pools = GaugeMetricFamily("loramux_pool_bytes", "Memory held, by pool", labels=["pool"])
        for pool in POOLS:
            pools.add_metric([pool], readings.pool_bytes.get(pool, 0))
        lookups = CounterMetricFamily(
            "loramux_adapter_lookups",
            "Adapters needed in a tier (device: by a sequence that starts; host: by one that waits), by what was found",
            labels=["tier", "result"],
        )
        for tier, result in LOOKUPS:
            lookups.add_metric([tier, result], readings.lookups.get((tier, result), 0))
        waiting = GaugeMetricFamily(
            "loramux_adapter_requests_waiting", "Sequences in the queue, by adapter", labels=["adapter"]
        )
        by_label: Counter[str] = Counter()
        for adapter, count in readings.waiting_by_adapter.items():
            by_label[self._label(adapter)] += count
        for label, count in by_label.items():
            waiting.add_metric([label], count)
        return [
            lookups,
            waiting,
            GaugeMetricFamily("loramux_requests_running", "Sequences in the batch", value=readings.running),
            GaugeMetricFamily("loramux_requests_waiting", "Sequences in the queue", value=readings.waiting),
            GaugeMetricFamily("loramux_kv_blocks_used", "KV cache blocks in use", value=readings.kv_blocks_used),
            GaugeMetricFamily(
                "loramux_kv_blocks_kept",
                "KV cache blocks that no sequence uses, kept for prompts that begin alike",
                value=readings.kv_blocks_kept,
            ),
            GaugeMetricFamily("loramux_kv_blocks", "KV cache blocks in all", value=readings.kv_blocks),
            GaugeMetricFamily("loramux_kv_usage_ratio", "Share of the KV cache in use, 0 to 1", value=usage),
            GaugeMetricFamily(
                "loramux_adapters_device", "Adapter versions on the device", value=readings.adapters_device
            ),
            GaugeMetricFamily("loramux_adapters_host", "Adapter versions in host memory", value=readings.adapters_host),
            GaugeMetricFamily(
                "loramux_base_memory_bytes", "Size of the resident base model", value=readings.base_bytes
            ),
            pools,
        ]
