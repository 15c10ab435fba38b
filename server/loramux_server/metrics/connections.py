"""Connections, read at each scrape: how many are open, and why the server ended or refused some."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loramux_server.wire.connections import ConnectionReadings, Connections, Cut


class ConnectionCollector(Collector):
    """Asks `source` at each scrape."""

    def __init__(self) -> None:
        self.source: Callable[[], ConnectionReadings] = Connections().readings

    def describe(self) -> Iterable[Metric]:
        return self._families(Connections().readings())

    def collect(self) -> Iterable[Metric]:
        return self._families(self.source())

    def _families(self, readings: ConnectionReadings) -> list[Metric]:
        cuts = CounterMetricFamily(
            "loramux_connections_cut",
            "Connections that the server ended, and requests that it refused over them, by reason",
            labels=["reason"],
        )
        for cut in Cut:
            cuts.add_metric([cut.value], readings.cuts[cut])
        return [
            GaugeMetricFamily("loramux_connections_open", "Connections that are open", value=readings.open),
            GaugeMetricFamily("loramux_connections_busy", "Of these, those with a request", value=readings.busy),
            GaugeMetricFamily(
                "loramux_connections_cap",
                "Most connections that may have a request; 0 where there is no cap",
                value=readings.cap or 0,
            ),
            cuts,
        ]
