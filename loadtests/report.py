"""From outcomes to figures: throughput, latency percentiles and fairness, as JSON, a table and a plot."""

from __future__ import annotations

import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .client import Outcome, Run

BASE = "base"  # how requests without an adapter are called here


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of a set of seconds; all None where the set is empty."""

    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        return cls(*(percentile(seconds, share) for share in (0.50, 0.95, 0.99)))


@dataclass(frozen=True, slots=True)
class AdapterShare:
    """What one adapter's requests got. `stream_rate` is tokens per second of request time: what a user of it saw."""

    requests: int
    tokens: int
    stream_rate: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in figures.

    Attributes:
        tokens_per_second: reply tokens of all streams over the wall time of the run.
        fairness: Jain's index over the adapters' stream rates; 1 is equal, 1/n is all for one; None below two.
        rate_min_max: the slowest adapter's stream rate over the fastest's; None below two.
        client_cpu_share: cores that the clients used.
        errors: sentence -> how often.
    """

    label: str
    clients: int
    requests: int
    seconds: float
    tokens: int
    prompt_tokens: int
    tokens_per_second: float
    first_token: Spread
    inter_token: Spread
    end_to_end: Spread
    fairness: float | None
    rate_min_max: float | None
    client_cpu_share: float
    cut: int
    finish: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    adapters: dict[str, AdapterShare] = field(default_factory=dict)


Figure = tuple[str, float, str, bool]  # what, measured, target, reached


def figures_table(figures: Iterable[Figure]) -> str:
    return table([["", "measured", "target"], *([what, f"{value:.2f}", aim] for what, value, aim, _ in figures)])


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` (0 to 1) of the values lie, interpolated; None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def jain(rates: Sequence[float]) -> float | None:
    """(sum x)^2 / (n * sum x^2); None below two values or where all are 0."""
    squares = sum(rate * rate for rate in rates)
    return sum(rates) ** 2 / (len(rates) * squares) if len(rates) > 1 and squares > 0 else None


def count(labels: Iterable[str]) -> dict[str, int]:
    """Label -> how often, most frequent first."""
    return dict(Counter(labels).most_common())


def summarize(label: str, run: Run) -> Summary:
    """All figures of a run. Latencies come from replies without an error."""
    good = [outcome for outcome in run.outcomes if outcome.error is None]
    shares = _shares(good)
    rates = [share.stream_rate for share in shares.values()]
    tokens = sum(outcome.tokens for outcome in run.outcomes)
    return Summary(
        label=label,
        clients=run.clients,
        requests=len(run.outcomes),
        seconds=run.seconds,
        tokens=tokens,
        prompt_tokens=sum(outcome.prompt_tokens for outcome in run.outcomes),
        tokens_per_second=tokens / run.seconds if run.seconds > 0 else 0.0,
        first_token=Spread.of([wait for outcome in good if (wait := outcome.first_token_seconds) is not None]),
        inter_token=Spread.of([gap for outcome in good for gap in outcome.inter_token_seconds]),
        end_to_end=Spread.of([outcome.end_to_end_seconds for outcome in good if outcome.finish is not None]),
        fairness=jain(rates),
        rate_min_max=min(rates) / max(rates) if len(rates) > 1 and max(rates) > 0 else None,
        client_cpu_share=run.client_cpu_seconds / run.seconds if run.seconds > 0 else 0.0,
        cut=run.cut,
        finish=count(outcome.finish for outcome in good if outcome.finish is not None),
        errors=count(outcome.error for outcome in run.outcomes if outcome.error is not None),
        adapters=shares,
    )


def _shares(outcomes: Sequence[Outcome]) -> dict[str, AdapterShare]:
    """Adapter name -> its share, by name."""
    by_adapter: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_adapter.setdefault(outcome.adapter or BASE, []).append(outcome)
    shares = {}
    for adapter, own in sorted(by_adapter.items()):
        tokens, seconds = sum(it.tokens for it in own), sum(it.end_to_end_seconds for it in own)
        shares[adapter] = AdapterShare(len(own), tokens, tokens / seconds if seconds > 0 else 0.0)
    return shares


# --- output ---------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Where and when a run was made, for the JSON file."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor_name() -> str:
    """As Linux names it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table with a head; the first column is set left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        others = zip(row[1:], widths[1:], strict=True)
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def milliseconds(spread: Spread) -> str:
    """p50 / p95 / p99 in whole milliseconds."""
    return " / ".join("-" if value is None else f"{value * 1000:.0f}" for value in (spread.p50, spread.p95, spread.p99))


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def summary_table(summaries: Sequence[Summary]) -> str:
    """One line per run."""
    head = [
        "run",
        "clients",
        "requests",
        "tok/s",
        "TTFT ms p50/95/99",
        "inter-token ms p50/95/99",
        "Jain",
        "min/max",
        "errors",
        "cut",
        "client CPU",
    ]
    rows = [
        [
            it.label,
            str(it.clients),
            str(it.requests),
            f"{it.tokens_per_second:.1f}",
            milliseconds(it.first_token),
            milliseconds(it.inter_token),
            ratio(it.fairness),
            ratio(it.rate_min_max),
            str(sum(it.errors.values())),
            str(it.cut),
            f"{it.client_cpu_share:.1%}",
        ]
        for it in summaries
    ]
    return table([head, *rows])


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """The document beside the machine it was made on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **document}, indent=2) + "\n", encoding="utf-8")


def write_report(out: Path, name: str, summaries: Sequence[Summary], settings: Mapping[str, Any]) -> list[Path]:
    """`name`.json and `name`.png in the directory `out`; returns their paths."""
    paths = [out / f"{name}.json", out / f"{name}.png"]
    write_json(paths[0], {"settings": settings, "runs": [asdict(summary) for summary in summaries]})
    plot_summaries(paths[1], summaries)
    return paths


def plot_summaries(path: Path, summaries: Sequence[Summary]) -> None:
    """Throughput, time to first token, inter-token time and stream rates by adapter, one bar group per run."""
    from matplotlib.figure import Figure

    labels = [summary.label for summary in summaries]
    places = list(range(len(summaries)))
    figure = Figure(figsize=(13, 3.2 + 0.5 * len(summaries)), layout="constrained")
    rate, first, inter, fair = figure.subplots(1, 4, sharey=True)
    bars = rate.barh(places, [summary.tokens_per_second for summary in summaries], color="tab:blue")
    rate.bar_label(bars, fmt="%.0f", padding=2)
    rate.set(title="tokens per second", yticks=places, yticklabels=labels)
    rate.margins(x=0.15)
    rate.invert_yaxis()
    for axes, title, spreads in (
        (first, "time to first token, ms", [summary.first_token for summary in summaries]),
        (inter, "between tokens, ms", [summary.inter_token for summary in summaries]),
    ):
        for number, (name, color) in enumerate((("p50", "tab:green"), ("p95", "tab:orange"), ("p99", "tab:red"))):
            axes.barh(
                [place + (number - 1) * 0.25 for place in places],
                [(getattr(spread, name) or 0.0) * 1000 for spread in spreads],
                height=0.25,
                color=color,
                label=name,
            )
        axes.set(title=title)
        axes.legend(fontsize="small")
    for place, summary in zip(places, summaries, strict=True):
        rates = [share.stream_rate for share in summary.adapters.values()]
        fair.plot(rates, [place] * len(rates), "|", color="tab:purple", markersize=10)
    fair.set(title="tokens per second of one stream,\none mark per adapter")
    fair.set_xlim(left=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
