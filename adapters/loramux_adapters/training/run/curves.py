"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramux_adapters.training.run.trace import StepRecord, Trace

TRAIN, HELD, FAINT = "#1f6f8b", "#d1495b", "#9cc3cf"
INK, GRID = "#333333", "#e3e3e3"
SIZE_INCHES, DOTS_PER_INCH = (8.0, 4.5), 150
SPAN = 0.05  # share of all steps that the smoothed line is the mean of


def draw_curves(trace: Trace, path: Path, *, title: str) -> None:
    """Writes a PNG: loss of each step and its running mean, loss of each evaluation; accuracy beside it.

    Args:
        title: stands above the picture.
    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK)
    _panel(axes[0], trace, "loss", "loss (nats per learned token)")
    _panel(axes[1], trace, "accuracy", "tokens right (%)")
    axes[0].set_ylim(0, None)
    axes[1].set_ylim(0, 103)
    axes[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path, format="png")


def smooth(steps: Sequence[StepRecord], field: str, span: int) -> list[float]:
    """For each step, the mean of a field over the learned tokens of the `span` steps around it."""
    means = []
    for middle in range(len(steps)):
        near = steps[max(0, middle - span // 2) : middle + span // 2 + 1]
        learned = sum(record.learned for record in near)
        means.append(sum(getattr(record, field) * record.learned for record in near) / learned)
    return means


def _panel(axes: Any, trace: Trace, field: str, label: str) -> None:
    unit = 100.0 if field == "accuracy" else 1.0
    span = 2 * round(SPAN * len(trace.steps) / 2) + 1  # odd, so that it has a middle
    numbers = [record.step for record in trace.steps]
    if span > 1:
        axes.plot(numbers, [unit * getattr(r, field) for r in trace.steps], color=FAINT, lw=0.8, label="each step")
    mean = [unit * value for value in smooth(trace.steps, field, span)]
    axes.plot(numbers, mean, color=TRAIN, lw=2, label="training" if span == 1 else f"training, mean of {span} steps")
    held = [(record.step, getattr(record, f"held_{field}")) for record in trace.epochs]
    points = [(step, unit * value) for step, value in held if value is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=HELD, lw=0.9, ls=":", marker="o", ms=6, label="held-out examples")
        axes.annotate(
            f"{points[-1][1]:.3g}",
            points[-1],
            xytext=(0, 12),
            textcoords="offset points",
            ha="right",
            color=HELD,
            fontsize=9,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
        )
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel(label, color=INK)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
