"""The same measurements under vLLM's names, for routers that know only those.

Nothing is counted here. What has no counterpart in this server (preemptions) is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from loramux_adapters.lora.slots import SMALLEST_RANK, bucket_of

if TYPE_CHECKING:
    from loramux_adapters.store.store import AdapterRecord
    from loramux_server.metrics.gauges import GaugeReadings
    from loramux_server.metrics.metrics import Metrics

_GAUGES = {
    "loramux_requests_running": "vllm:num_requests_running",
    "loramux_requests_waiting": "vllm:num_requests_waiting",
    "loramux_kv_usage_ratio": "vllm:kv_cache_usage_perc",
}
_HISTOGRAMS = {
    "loramux_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "loramux_inter_token_seconds": "vllm:time_per_output_token_seconds",
    "loramux_request_duration_seconds": "vllm:e2e_request_latency_seconds",
    "loramux_queue_time_seconds": "vllm:request_queue_time_seconds",
}
_SUMS = {
    "loramux_prompt_tokens": "vllm:prompt_tokens",
    "loramux_generated_tokens": "vllm:generation_tokens",
    "loramux_prefix_cache_queries": "vllm:prefix_cache_queries",
    "loramux_prefix_cache_hits": "vllm:prefix_cache_hits",
}
_FINISHED = ("stop", "length", "abort")  # outcomes that are a success in vLLM's count


@dataclass(frozen=True, slots=True)
class LoraRequests:
    """What vllm:lora_requests_info says.

    Attributes:
        most: adapters that fit on the device at the same time, whichever of the registered ones they are.
        running: names whose current version is on the device, in use or not: a request for them waits for no copy.
        waiting: names that waiting requests asked for.
    """

    most: int
    running: Collection[str]
    waiting: Collection[str]

    @classmethod
    def of(cls, gauges: GaugeReadings, records: Sequence[AdapterRecord]) -> LoraRequests:
        widest = max((bucket_of(record.rank) for record in records), default=SMALLEST_RANK)
        on_device = [record.name for record in records if record.version in gauges.device_versions]
        waiting = {name for adapter in gauges.waiting_by_adapter if adapter for name in adapter.split("+")}
        return cls(gauges.slot_rows // widest, on_device, waiting)


def render_vllm(metrics: Metrics, model_name: str, adapters: LoraRequests | None, now: float) -> bytes:
    """The text format, content type as of `/metrics`.

    `adapters` None, when the store cannot be read, leaves vllm:lora_requests_info out. `now`: unix seconds.
    """
    return generate_latest(_Renamed(metrics, model_name, adapters, now))


class _Renamed(Collector):
    def __init__(self, metrics: Metrics, model_name: str, adapters: LoraRequests | None, now: float) -> None:
        self._metrics = metrics
        self._model_name = model_name
        self._adapters = adapters
        self._now = now

    def collect(self) -> Iterator[Metric]:
        for family in self._metrics.families():
            if family.name in _GAUGES:
                yield self._gauge(_GAUGES[family.name], family)
            elif family.name in _HISTOGRAMS:
                yield self._histogram(_HISTOGRAMS[family.name], family)
            elif family.name in _SUMS:
                yield self._sum(_SUMS[family.name], family)
            elif family.name == "loramux_requests":
                yield self._successes(family)
        if self._adapters is not None:
            yield self._lora_requests(self._adapters)

    def _gauge(self, name: str, family: Metric) -> Metric:
        renamed = GaugeMetricFamily(name, family.documentation, labels=["model_name"])
        for sample in family.samples:
            renamed.add_metric([self._model_name], sample.value)
        return renamed

    def _histogram(self, name: str, family: Metric) -> Metric:
        renamed = HistogramMetricFamily(name, family.documentation, labels=["model_name"])
        for sample in family.samples:
            labels = {"model_name": self._model_name} | sample.labels
            renamed.add_sample(sample.name.replace(family.name, name), labels, sample.value)
        return renamed

    def _sum(self, name: str, family: Metric) -> Metric:
        renamed = CounterMetricFamily(name, family.documentation.partition(",")[0], labels=["model_name"])
        renamed.add_metric([self._model_name], sum(sample.value for sample in family.samples))
        return renamed

    def _successes(self, family: Metric) -> Metric:
        text = "HTTP generation requests that ended without an error"
        renamed = CounterMetricFamily("vllm:request_success", text, labels=["model_name", "finished_reason"])
        for outcome in _FINISHED:
            counts = [sample.value for sample in family.samples if sample.labels["outcome"] == outcome]
            renamed.add_metric([self._model_name, outcome], sum(counts))
        return renamed

    def _lora_requests(self, adapters: LoraRequests) -> Metric:
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters on the device and asked for; the value is the time of this answer",
            labels=["model_name", "max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        names = [",".join(sorted(group)) for group in (adapters.running, adapters.waiting)]
        family.add_metric([self._model_name, str(adapters.most), *names], self._now)
        return family
