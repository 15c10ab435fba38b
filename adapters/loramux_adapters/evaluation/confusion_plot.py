"""The confusion matrix of an evaluation as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loramux_adapters.evaluation.scores import LabelScores

INK, FAINT = "#333333", "#8a8a8a"
COLORS = "Blues"
CELL_INCHES, MARGIN_INCHES, DOTS_PER_INCH = 0.95, 2.4, 150
MOST_CELLS = 12  # labels; of more, only the shares' colours are drawn
LONGEST = 18  # characters of a label


def draw_confusion(scores: LabelScores, path: Path, *, title: str) -> None:
    """Writes a PNG: answers down, predictions across; each cell its count and its share of the row.

    Args:
        title: stands above the picture.
    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [*scores.labels, *(["none"] if scores.unlabelled else [])]
    counts = [row[: len(columns)] for row in scores.confusion]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    size = MARGIN_INCHES + CELL_INCHES * min(len(columns), MOST_CELLS)
    height = 1.7 + CELL_INCHES * min(len(counts), MOST_CELLS)
    figure = Figure(figsize=(max(size, 4.6), height), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    figure.suptitle(title, fontsize=11, fontweight="bold", color=INK)
    axes.set_title(_subtitle(scores), fontsize=9, color=INK)
    image = axes.imshow(shares, cmap=COLORS, vmin=0.0, vmax=1.0, aspect="equal")
    if len(scores.labels) <= MOST_CELLS:
        for row, line in enumerate(counts):
            for column, count in enumerate(line):
                share = shares[row][column]
                axes.text(
                    column,
                    row,
                    f"{count:,}\n{share:.1%}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if share > 0.55 else INK if count else FAINT,
                )
    turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if _is_wide(columns) else {}
    axes.set_xticks(range(len(columns)), [_short(label) for label in columns], **turned)
    axes.set_yticks(range(len(counts)), [_short(label) for label in scores.labels])
    axes.set_xlabel("prediction", color=INK)
    axes.set_ylabel("answer", color=INK)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.set_xticks([edge - 0.5 for edge in range(1, len(columns))], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(1, len(counts))], minor=True)
    axes.grid(which="minor", color="white", lw=2)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.04, ticks=[0, 0.5, 1], format=lambda x, _: f"{x:.0%}")
    bar.set_label("share of the row", color=INK, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=8, length=0)
    figure.savefig(path, format="png")


def _subtitle(scores: LabelScores) -> str:
    parts = [("accuracy", scores.accuracy), (scores.headline_name, scores.headline)]
    return ", ".join(f"{_short(name)} {value.value:.1%}" for name, value in parts)


def _short(label: str) -> str:
    return label if len(label) <= LONGEST else label[: LONGEST - 1] + "…"


def _is_wide(labels: list[str]) -> bool:
    """They would touch, side by side."""
    return max(len(_short(label)) for label in labels) > 9
