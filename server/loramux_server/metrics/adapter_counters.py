"""Counters by adapter: the number of label values is bounded, and their sums never decrease."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

BASE = "base"  # rows without an adapter
OTHER = "other"  # adapters beyond the bound, and what folded series once counted
COMPOSED = "composed"  # the sum of several adapters: a name with a "+" in it, which no adapter has
UNKNOWN = "unknown"  # requests refused before it was known which model they meant
OUTCOMES = ("stop", "length", "abort", "error", "rejected")


def label_of(name: str) -> str:
    """The label value of an adapter. No name holds a `:`, so the reserved values stay free."""
    return f"adapter:{name}" if name in (BASE, OTHER, COMPOSED, UNKNOWN) else name


def _is_composed(name: str) -> bool:
    return "+" in name


@dataclass(slots=True)
class _Counts:
    prompt_tokens: int = 0
    generated_tokens: int = 0
    requests: dict[str, int] = field(default_factory=dict)  # outcome -> count

    def add(self, other: _Counts) -> None:
        self.prompt_tokens += other.prompt_tokens
        self.generated_tokens += other.generated_tokens
        for outcome, count in other.requests.items():
            self.requests[outcome] = self.requests.get(outcome, 0) + count

    def copy(self) -> _Counts:
        return _Counts(self.prompt_tokens, self.generated_tokens, dict(self.requests))


class AdapterCounters(Collector):
    """Requests and tokens by adapter. Any thread, under its lock; each call is a dictionary look-up and an addition.

    A request of several adapters counts once, as `composed`, and under none of their names. Of single adapters, the
    first `bound` names that are claimed have a label of their own until they are retired (deleted); others count as
    `other`. A retired name's series stays as it is until its place is needed for another name; only then are its
    counts moved into `other`, in one step, so a sum over adapters never decreases. A name that returns before that goes
    on where it was. Only `claim` gives out places: a request that outlives its deleted adapter takes none.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._lock = threading.Lock()
        self._named: dict[str, _Counts] = {}
        self._retired: dict[str, None] = {}  # the part of `_named` that may be replaced, longest retired first
        self._base = _Counts(requests=dict.fromkeys(OUTCOMES, 0))
        self._other = _Counts()
        self._composed = _Counts()
        self._unknown = _Counts()

    def claim(self, name: str) -> None:
        """A request for this adapter was admitted: give it a label of its own if there is room."""
        with self._lock:
            if name in self._named:
                self._retired.pop(name, None)
                return
            if _is_composed(name):
                return
            if len(self._named) >= self._bound:
                if not self._retired:
                    return
                gone = next(iter(self._retired))
                del self._retired[gone]
                self._other.add(self._named.pop(gone))
            self._named[name] = _Counts()

    def retire(self, name: str) -> None:
        """The adapter was deleted: its label may go to another name."""
        with self._lock:
            if name in self._named:
                self._retired.setdefault(name)

    def retire_all_but(self, names: Collection[str]) -> None:
        """Retire what is not among `names`, the adapters that are registered now."""
        with self._lock:
            for name in self._named:
                if name not in names:
                    self._retired.setdefault(name)

    def count_tokens(self, adapter: str | None, prompt: int, generated: int) -> None:
        with self._lock:
            counts = self._of(adapter)
            counts.prompt_tokens += prompt
            counts.generated_tokens += generated

    def count_request(self, adapter: str | None, outcome: str) -> None:
        with self._lock:
            counts = self._of(adapter)
            counts.requests[outcome] = counts.requests.get(outcome, 0) + 1

    def count_unknown(self, outcome: str) -> None:
        """A request that ended before it was known which model it meant."""
        with self._lock:
            self._unknown.requests[outcome] = self._unknown.requests.get(outcome, 0) + 1

    def label(self, adapter: str | None) -> str:
        """Under which label value the adapter is counted now."""
        if adapter is None:
            return BASE
        if _is_composed(adapter):
            return COMPOSED
        with self._lock:
            return label_of(adapter) if adapter in self._named else OTHER

    def _of(self, adapter: str | None) -> _Counts:
        if adapter is None:
            return self._base
        return self._composed if _is_composed(adapter) else self._named.get(adapter, self._other)

    def _snapshot(self) -> list[tuple[str, _Counts]]:
        with self._lock:
            rows = [(BASE, self._base), (OTHER, self._other), (UNKNOWN, self._unknown)]
            rows += [(COMPOSED, self._composed)] if self._composed != _Counts() else []
            rows += [(label_of(name), counts) for name, counts in self._named.items()]
            return [(label, counts.copy()) for label, counts in rows]

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def collect(self) -> Iterator[Metric]:
        requests, prompt, generated = self._families()
        for label, counts in self._snapshot():
            for outcome, count in counts.requests.items():
                requests.add_metric([label, outcome], count)
            if label != UNKNOWN:
                prompt.add_metric([label], counts.prompt_tokens)
                generated.add_metric([label], counts.generated_tokens)
        yield from (requests, prompt, generated)

    def _families(self) -> tuple[CounterMetricFamily, CounterMetricFamily, CounterMetricFamily]:
        return (
            CounterMetricFamily(
                "loramux_requests",
                "HTTP generation requests that ended, by adapter and outcome (stop, length, abort: the client left, "
                "error, rejected)",
                labels=["adapter", "outcome"],
            ),
            CounterMetricFamily("loramux_prompt_tokens", "Prompt tokens processed, by adapter", labels=["adapter"]),
            CounterMetricFamily("loramux_generated_tokens", "Tokens generated, by adapter", labels=["adapter"]),
        )
