"""The study behind RESULTS.md: `python adapters/examples/study.py --out DIR` (an hour or more; it resumes).

SMS Spam with three seeds, two VADER domains, and for each task the same recipe on the 16-bit base. Each adapter is
trained by `loramux train` and scored by `loramux eval`, beside the bare base and the majority class.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
SMALL = ("--target-modules", "q_proj,v_proj", "--learning-rate", "0.001", "--max-steps", "110")


@dataclass(frozen=True, slots=True)
class Task:
    """One data set and its runs.

    Attributes:
        labels: as `loramux train --labels` takes them.
        seeds: one adapter on NF4 each; the first is compared with the 16-bit one of the same seed.
        recipe: further arguments of `loramux train`.
    """

    name: str
    labels: str
    seeds: tuple[int, ...]
    recipe: tuple[str, ...]


TASKS = (
    Task("spam", "ham,spam", (0, 1, 2), ("--max-steps", "200")),
    Task("tweets", "positive,negative", (0,), SMALL),
    Task("amazon", "positive,negative", (0,), SMALL),
)


def make_data(task: Task, out: Path) -> tuple[Path, Path]:
    """(train, held) of a task, made if they are missing."""
    folder = out / "data" / task.name
    if not (folder / "held.jsonl").is_file():
        command = ["spam.py", "--out", str(folder)]
        if task.name != "spam":
            command = ["sentiment.py", "--out", str(folder.parent), "--domain", task.name]
        subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=True)
    return folder / "train.jsonl", folder / "held.jsonl"


def train(task: Task, seed: int, quantize: str, data: Path, out: Path) -> Path:
    """The run's directory; trained if that has not been done."""
    run = out / f"{task.name}-{quantize}-{seed}"
    if not (run / "adapter" / "adapter_config.json").is_file():
        command = ["loramux", "train", "--data", str(data), "--name", task.name, "--out", str(run)]
        command += ["--batching", "shuffle", "--seed", str(seed), "--quantize", quantize, *task.recipe]
        subprocess.run(command, check=True)
    return run


def score(task: Task, run: Path, data: tuple[Path, Path], extra: Sequence[str]) -> dict[str, Any]:
    """The evaluation of one run; made if that has not been done."""
    out = run / "evaluation"
    if not (out / "evaluation.json").is_file():
        command = ["loramux", "eval", "--data", str(data[1]), "--train-data", str(data[0]), "--labels", task.labels]
        subprocess.run([*command, "--adapter", str(run), "--out", str(out), *extra], check=True)
    read: dict[str, Any] = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    return read


def rows_of(task: Task, found: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of the summary's table for one task; `found` is by seed."""
    lines = []
    for seed, evaluation in zip(task.seeds, found, strict=True):
        for predictor in evaluation["predictors"]:
            if seed != task.seeds[0] and predictor["role"] != "adapter":
                continue  # bare base, reference and majority stand beside the first seed
            scores = predictor["by_logprob"] or predictor["by_generation"]
            rare = min(scores["classes"], key=lambda one: one["support"])
            cells = [
                percent(scores["accuracy"]),
                percent(rare["recall"]),
                percent(rare["f1"]),
                percent(scores["macro_f1"]),
            ]
            what = f"QLoRA, seed {seed}" if predictor["role"] == "adapter" else predictor["name"]
            lines.append(f"| {task.name} | {what} | {scores['examples']:,} | {' | '.join(cells)} |")
    return lines


def percent(score: dict[str, float]) -> str:
    return f"{100 * score['value']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


def main() -> int:
    """Runs what has not been run yet and writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of data, runs and results")
    args = parser.parse_args()
    lines = ["| task | | held out | accuracy | recall of the rarer class | its F1 | macro F1 |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    remarks: list[str] = []
    for task in TASKS:
        data = make_data(task, args.out)
        reference = train(task, task.seeds[0], "none", data[0], args.out)
        found = []
        for seed in task.seeds:
            run = train(task, seed, "nf4", data[0], args.out)
            extra = ["--reference", str(reference)] if seed == task.seeds[0] else []
            found.append(score(task, run, data, extra))
        lines += rows_of(task, found)
        remarks += ["", f"**{task.name}**", "", *(f"- {remark['text']}" for remark in found[0]["remarks"])]
        if len(found) > 1:
            values = [evaluation["predictors"][0]["by_logprob"]["headline"]["value"] for evaluation in found]
            name = found[0]["predictors"][0]["by_logprob"]["headline_name"]
            remarks += [
                f"- {name} over {len(found)} seeds: mean {100 * mean(values):.1f}, lowest {100 * min(values):.1f}."
            ]
    (args.out / "summary.md").write_text("\n".join([*lines, *remarks]) + "\n", encoding="utf-8")
    print((args.out / "summary.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
