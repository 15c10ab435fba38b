"""What the server measures, in Prometheus' terms: names, units, buckets, and one method per event."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from loramux_server.metrics.adapter_counters import AdapterCounters
from loramux_server.metrics.connections import ConnectionCollector
from loramux_server.metrics.gauges import GaugeCollector, GaugeReadings
from loramux_server.wire.connections import ConnectionReadings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds. The low ends are a small model on a GPU, the high ends a full queue on a CPU.
_FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_STEP = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_QUEUE = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_MASK = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0)
_LOAD = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PAUSE = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_SEQUENCES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024)
# Outcomes of checking an adapter against the base. It was accepted: it names this base, it names none, or it names
# another one and was forced. It was refused: for what it holds, or for the base it names.
VERIFICATIONS = ("verified", "unverified", "forced", "rejected", "base_mismatch")
_ADAPTERS = (0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)


class Metrics:
    """One server's metrics, with a registry of their own. Every method may be called from any thread and is cheap.

    The engine thread calls the methods up to `sat_out`; the API calls the rest. A None adapter is the bare base.
    """

    def __init__(self, adapter_labels: int = 100) -> None:
        """`adapter_labels` bounds the adapters that have a label of their own; see `AdapterCounters`."""
        registry = CollectorRegistry()
        self._adapters = AdapterCounters(adapter_labels)
        self._gauges = GaugeCollector(self._adapters.label)
        registry.register(self._adapters)
        registry.register(self._gauges)
        self._connections = ConnectionCollector()
        registry.register(self._connections)
        self._exposed = _WithoutCreated(registry)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=registry)

        self._batch_size = histogram("loramux_batch_size", "Sequences per engine step", _SEQUENCES)
        self._batch_adapters = histogram("loramux_batch_adapters", "Distinct adapters per engine step", _ADAPTERS)
        self._step = histogram("loramux_step_duration_seconds", "Duration of an engine step", _STEP)
        self._queue = histogram("loramux_queue_time_seconds", "From submission to the first step", _QUEUE)
        self._first = histogram("loramux_time_to_first_token_seconds", "From submission to first token", _FIRST_TOKEN)
        self._inter = histogram("loramux_inter_token_seconds", "Between two tokens of one sequence", _STEP)
        self._request = histogram("loramux_request_duration_seconds", "From arrival to last token", _REQUEST)
        load = Histogram(
            "loramux_adapter_load_seconds",
            "Time to load an adapter into a tier: host (from disk) or device (from host)",
            labelnames=["tier"],
            buckets=_LOAD,
            registry=registry,
        )
        self._device_load, self._host_load = load.labels("device"), load.labels("host")
        evictions = Counter(
            "loramux_adapter_evictions", "Adapters evicted, by tier", labelnames=["tier"], registry=registry
        )
        self._device_evictions, self._host_evictions = evictions.labels("device"), evictions.labels("host")
        self._slot_loads = Counter("loramux_slot_loads", "Adapters copied into a device slot", registry=registry)
        self._prefix_looked_up = Counter(
            "loramux_prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache", registry=registry
        )
        self._prefix_found = Counter(
            "loramux_prefix_cache_hits",
            "Prompt tokens that were found in the prefix cache and not computed again",
            registry=registry,
        )
        self._cancelled = Counter(
            "loramux_sequences_cancelled",
            "Sequences taken out of the engine before their end: the client left, or a stop string was found",
            registry=registry,
        )
        self._mask = histogram(
            "loramux_grammar_mask_seconds", "From a token of a reply held to a shape to the mask of the next", _MASK
        )
        self._sat_out = Counter(
            "loramux_sequence_steps_sat_out",
            "Steps that running sequences sat out, since their masks were not there",
            registry=registry,
        )
        self._aborts = Counter("loramux_aborts", "Requests whose client left before the end", registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=registry)

        self._loop_pause = histogram(
            "loramux_event_loop_pause_seconds",
            "How much too late the event loop woke up, each hundredth second",
            _PAUSE,
        )
        self._longest_loop_pause = gauge(
            "loramux_event_loop_longest_pause_seconds", "Longest pause of the event loop in the last one to two minutes"
        )
        self._registered = gauge("loramux_adapters_registered", "Adapters in the store")
        self._pinned = gauge("loramux_adapters_pinned", "Adapters in the store that are to stay in memory")
        self._versions = gauge("loramux_adapter_versions", "Adapter versions that the store keeps")
        self._corrupt = gauge("loramux_adapter_versions_corrupt", "Kept versions whose stored files are damaged")
        self._verifications = Counter(
            "loramux_adapter_verifications",
            "Adapters that were checked against the base, by outcome",
            labelnames=["outcome"],
            registry=registry,
        )
        for outcome in VERIFICATIONS:
            self._verifications.labels(outcome)
        proofs = Counter(
            "loramux_adapter_proofs",
            "Adapters that were tried out on the engine, by effect (acts, none) and by how their fingerprint replayed",
            labelnames=["effect", "fingerprint"],
            registry=registry,
        )
        self._proofs = {
            (acts, outcome): proofs.labels("acts" if acts else "none", outcome)
            for acts in (True, False)
            for outcome in ("exact", "within_tolerance", "mismatch", "skipped", "none")
        }
        uploads = Gauge(
            "loramux_uploads",
            "Adapters that come in now: running ones have one of the places, waiting ones none yet",
            labelnames=["state"],
            registry=registry,
        )
        self._uploads_waiting, self._uploads_running = uploads.labels("waiting"), uploads.labels("running")
        self._watch_failures = Counter(
            "loramux_watch_failures", "Changes in the watched directory that could not be published", registry=registry
        )

    # engine thread

    def step_done(self, batch_size: int, distinct_adapters: int, seconds: float) -> None:
        self._batch_size.observe(batch_size)
        self._batch_adapters.observe(distinct_adapters)
        self._step.observe(seconds)

    def queued(self, seconds: float) -> None:
        """A sequence left the queue, this long after it was submitted."""
        self._queue.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        self._inter.observe(seconds)

    def tokens(self, adapter: str | None, prompt: int, generated: int) -> None:
        self._adapters.count_tokens(adapter, prompt, generated)

    def prefix_looked_up(self, found: int, tokens: int) -> None:
        """A sequence started, with so many of its prompt's tokens found."""
        self._prefix_looked_up.inc(tokens)
        self._prefix_found.inc(found)

    def slot_loaded(self, seconds: float) -> None:
        self._slot_loads.inc()
        self._device_load.observe(seconds)

    def evicted(self, count: int) -> None:
        """So many adapters left their device slots."""
        self._device_evictions.inc(count)

    def aborted(self) -> None:
        """A sequence left the engine on request, before its end."""
        self._cancelled.inc()

    def mask_made(self, seconds: float) -> None:
        """A token was chosen from a mask that took so long."""
        self._mask.observe(seconds)

    def sat_out(self, count: int) -> None:
        """So many sequences were in no step, or got no token from it, for want of a mask."""
        self._sat_out.inc(count)

    # loader thread of the host cache

    def host_cache(self) -> HostCacheMetrics:
        """The observer of the host cache."""
        return HostCacheMetrics(self._host_load, self._host_evictions)

    # API

    def request_started(self, adapter: str | None) -> None:
        """A request was admitted: its adapter gets a label of its own if there is room."""
        if adapter is not None:
            self._adapters.claim(adapter)

    def request_finished(self, adapter: str | None, outcome: str, seconds: float) -> None:
        """Outcome is one of `OUTCOMES`; a rejected request took no engine time and has no duration."""
        self._adapters.count_request(adapter, outcome)
        if outcome == "abort":
            self._aborts.inc()
        if outcome != "rejected":
            self._request.observe(seconds)

    def request_refused(self) -> None:
        """A request was refused before it was known which model it meant."""
        self._adapters.count_unknown("rejected")

    def adapter_deleted(self, adapter: str) -> None:
        self._adapters.retire(adapter)

    def registered(self, names: Collection[str]) -> None:
        """The adapters that are in the store now."""
        self._registered.set(len(names))
        self._adapters.retire_all_but(names)

    def stored(self, *, versions: int, corrupt: int, pinned: int) -> None:
        """What the store keeps now: distinct versions, those of them that are damaged, and pinned names."""
        self._versions.set(versions)
        self._corrupt.set(corrupt)
        self._pinned.set(pinned)

    def verified(self, outcome: str) -> None:
        """An adapter was checked; outcome is one of `VERIFICATIONS`."""
        self._verifications.labels(outcome).inc()

    def proved(self, *, acts: bool, fingerprint: str) -> None:
        """An adapter was tried out: whether it changes any logit, and how its fingerprint replayed."""
        self._proofs[acts, fingerprint].inc()

    def upload_waits(self) -> AbstractContextManager[object]:
        """While this is entered, an upload waits for a place."""
        return self._uploads_waiting.track_inprogress()

    def upload_runs(self) -> AbstractContextManager[object]:
        """While this is entered, an upload has a place."""
        return self._uploads_running.track_inprogress()

    def watch_failed(self) -> None:
        """A change in the watched directory could not be published."""
        self._watch_failures.inc()

    # event loop

    def loop_paused(self, seconds: float, longest: float) -> None:
        """The event loop stood still so long, 0 for not at all; `longest` is of the last minutes."""
        if seconds:
            self._loop_pause.observe(seconds)
        self._longest_loop_pause.set(longest)

    # composition root

    def read_gauges_from(self, source: Callable[[], GaugeReadings]) -> None:
        """Gauges are read from `source`, once per scrape, on the scraping thread."""
        self._gauges.source = source

    def read_connections_from(self, source: Callable[[], ConnectionReadings]) -> None:
        self._connections.source = source

    def gauge_readings(self) -> GaugeReadings:
        """How full everything is now."""
        return self._gauges.source()

    def families(self) -> Iterable[Metric]:
        """What `render` writes, for another way to write it."""
        return self._exposed.collect()

    def render(self) -> bytes:
        """The text format, content type `CONTENT_TYPE`."""
        return generate_latest(self._exposed)


class HostCacheMetrics:
    """Observer of the host cache; called by its loader thread."""

    def __init__(self, loads: Histogram, evictions: Counter) -> None:
        self._loads, self._evictions = loads, evictions

    def loaded(self, seconds: float) -> None:
        self._loads.observe(seconds)

    def evicted(self) -> None:
        self._evictions.inc()


class _WithoutCreated(Collector):
    """A registry without the `_created` series, which would double their number and which nobody reads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family
