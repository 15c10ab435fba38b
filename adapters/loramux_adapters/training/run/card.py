"""What an adapter says about itself: card.json for programs, README.md for people."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux_adapters.artifact.config import BASE_ID_KEY
from loramux_adapters.durable_files import write_whole
from loramux_adapters.errors import TrainingError
from loramux_adapters.training.recipe import Recipe

if TYPE_CHECKING:
    from loramux_adapters.training.run.trainer import TrainingOutcome

FORMAT = 1
CARD_FILE, README_FILE = "card.json", "README.md"
LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft", "safetensors")


def make_card(
    *,
    name: str,
    base_name: str,
    base_id: str,
    recipe: Recipe,
    data: Mapping[str, Any],
    held: Mapping[str, Any] | None,
    outcome: TrainingOutcome,
    device: str,
) -> dict[str, Any]:
    """The card of a finished run, as plain data. `scores` stays None until an evaluation fills it in.

    Args:
        data, held: of the training and the held-out examples: sha256 of the file and counts.
        device: what it was trained on, in words.
    """
    last = outcome.trace.epochs[-1]
    tokens = sum(record.tokens for record in outcome.trace.steps)
    busy = sum(record.seconds for record in outcome.trace.steps)
    return {
        "format": FORMAT,
        "name": name,
        "base": base_name,
        BASE_ID_KEY: base_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": recipe.as_json(),
        "data": dict(data),
        "held_out": dict(held) if held is not None else None,
        "training": {
            "steps": outcome.step,
            "epochs": outcome.step / outcome.plan.steps_per_epoch,
            "tokens": tokens,
            "learned_tokens": sum(record.learned for record in outcome.trace.steps),
            "train_loss": last.train_loss,
            "train_accuracy": last.train_accuracy,
            "held_loss": last.held_loss,
            "held_accuracy": last.held_accuracy,
            "held_loss_before": _before(outcome),
            "seconds": round(outcome.seconds, 1),
            "tokens_per_second": round(tokens / busy, 1) if busy else None,
            "peak_bytes": outcome.peak_bytes,
            "device": device,
        },
        "libraries": versions(),
        "scores": None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide an adapter's bits; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_card(directory: Path, card: Mapping[str, Any]) -> None:
    """Writes card.json and README.md, each whole or not at all. Raises TrainingError."""
    try:
        write_whole(directory / CARD_FILE, (json.dumps(card, indent=2) + "\n").encode())
        write_whole(directory / README_FILE, readme(card).encode())
    except OSError as error:
        raise TrainingError(f"the card cannot be written to {directory}: {error.strerror}") from error


def read_card(directory: Path) -> dict[str, Any]:
    """The card of an adapter directory. Raises TrainingError if there is none, or none that this version reads."""
    path = directory / CARD_FILE
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise TrainingError(f"{path} is not an adapter card of format {FORMAT}")
    return card


def add_scores(directory: Path, scores: Mapping[str, Any], lines: Sequence[str] = ()) -> None:
    """Puts an evaluation into the card, and its summary, one line each, into README.md. Raises TrainingError."""
    write_card(directory, read_card(directory) | {"scores": {**scores, "summary": list(lines)}})


def readme(card: Mapping[str, Any]) -> str:
    """The model card in words."""
    recipe, data, training = card["recipe"], card["data"], card["training"]
    quantized = "NF4 with double quantization" if recipe["quantize"] == "nf4" else "16 bit, not quantized"
    layers = ", ".join(recipe["target_modules"]) or "every linear layer but the head"
    parts = [
        f"# {card['name']}",
        f"A LoRA adapter for `{card['base']}`, made by `loramux train` on {card['created'][:10]}. The base was "
        f"{quantized}; the adapter belongs to exactly that base.",
        f"Base id: `{card[BASE_ID_KEY]}`",
        "## Data",
        _list([_data_line("Training", data), *_held_lines(card["held_out"])]),
        "## Recipe",
        _list(
            [
                f"rank {recipe['rank']}, alpha {recipe['alpha']:g}"
                + (" with rank-stabilised scaling" if recipe["rslora"] else "")
                + f", dropout {recipe['dropout']:g}, on {layers}; init {recipe['init']}",
                f"AdamW, learning rate {recipe['learning_rate']:g}, {recipe['schedule']} after a warm-up of "
                f"{recipe['warmup']:.0%} of the steps, weight decay {recipe['weight_decay']:g}",
                f"{training['steps']} steps of {recipe['batch_size']} examples ({training['epochs']:.2f} epochs), "
                f"gradients clipped to {recipe['max_grad_norm']:g}, seed {recipe['seed']}",
            ]
        ),
        "## Training",
        _table(training),
        f"{training['seconds']:,.0f} s on {training['device']}, {training['tokens_per_second'] or 0:,.0f} tokens/s, "
        f"at most {training['peak_bytes'] / 2**20:,.0f} MiB of memory.",
        "## Scores",
        _scores(card),
        "Libraries: " + ", ".join(f"{name} {version}" for name, version in card["libraries"].items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _before(outcome: TrainingOutcome) -> float | None:
    first = outcome.trace.epochs[0]
    return first.held_loss if first.step == 0 else None


def _data_line(what: str, data: Mapping[str, Any]) -> str:
    text = (
        f"{what}: {data['rows']:,} examples, {data['tokens']:,} tokens, of which {data['learned_tokens']:,} are learned"
    )
    text += "".join(f"; {data[key]:,} {key}" for key in ("skipped", "truncated") if data[key])
    return f"{text} (sha256 of the file `{data['sha256']}`)"


def _held_lines(held: Mapping[str, Any] | None) -> list[str]:
    return [_data_line("Held-out", held)] if held is not None else ["Held-out: none"]


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(training: Mapping[str, Any]) -> str:
    def cell(key: str, form: str) -> str:
        value = training[key]
        return "-" if value is None else format(value, form)

    return "\n".join(
        [
            "| | loss, nats per token | tokens right |",
            "| --- | --- | --- |",
            f"| training, last epoch | {cell('train_loss', '.4f')} | {cell('train_accuracy', '.1%')} |",
            f"| held-out, before | {cell('held_loss_before', '.4f')} | |",
            f"| held-out, after | {cell('held_loss', '.4f')} | {cell('held_accuracy', '.1%')} |",
        ]
    )


def _scores(card: Mapping[str, Any]) -> str:
    scores = card["scores"]
    if not scores:
        return "Not evaluated yet; `loramux eval` does it."
    return _list(scores.get("summary") or []) or "See `scores` in card.json."
