"""The last act of `loramux train`, in a process of its own: what was trained is fingerprinted and evaluated as served.

`python -m loramux_server.cli.finish RUN_DIR`; a base that was trained on is not the one that is served, so a fresh one
is loaded here. May be run again at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux_adapters.errors import AdapterError
from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.cli.serve import configure_logging
from loramux_server.config.csv import columns_of
from loramux_server.config.environment import bound_spinning, cache_dir_of
from loramux_server.errors import ConfigError, LoramuxError
from loramux_server.serving.startup import Stages

if TYPE_CHECKING:
    from loramux_adapters.evaluation.evaluated import Evaluation
    from loramux_server.engine.local_engine import LocalEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The command line; see `_parser` for what each means."""

    run_dir: Path
    base: str = EMBEDDED_NAME
    eval_data: Path | None = None
    train_data: Path | None = None
    labels: str | None = None
    csv_prompt: str | None = None
    csv_completion: str | None = None
    csv_template: str | None = None
    csv_system: str | None = None
    csv_labels: str | None = None
    csv_delimiter: str | None = None
    skip_bad: bool = False
    device: str = "auto"
    threads: int | None = None
    cache_dir: Path | None = None

    @property
    def label_list(self) -> list[str]:
        return [part.strip() for part in self.labels.split(",") if part.strip()] if self.labels else []


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Runs, and returns the exit code: 0 done, 1 it could not be done, 2 the command line is wrong."""
    environ = os.environ if environ is None else environ
    args = vars(_parser().parse_args(argv))
    settings = Settings(**{field.name: args[field.name] for field in fields(Settings)})
    bound_spinning()
    cache_dir = cache_dir_of(settings.cache_dir, environ)
    configure_logging("info")
    try:
        finish(settings, Stages(_write), cache_dir=cache_dir)
    except ConfigError as error:
        return _fail(error, 2)
    except (LoramuxError, AdapterError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the adapter is saved", 130)
    return 0


def finish(settings: Settings, stages: Stages, *, cache_dir: Path) -> Evaluation | None:
    """Fingerprint first, which is quick; then the evaluation, if there is held-out data.

    Writes fingerprint.json and the scores of card.json into RUN_DIR/adapter, the evaluation's files into RUN_DIR.
    Raises:
        AdapterError, LoramuxError: it cannot be done; what was written before stays.
    """
    with stages.stage("import libraries"):
        import torch
        from transformers.utils import logging as transformers_logging

        from loramux_adapters.evaluation.evaluated import Role
        from loramux_adapters.evaluation.labels import labels_of
        from loramux_adapters.evaluation.report import summary, text_report, write_evaluation
        from loramux_adapters.training.run.card import add_scores, read_card
        from loramux_server.base.device import device_of
        from loramux_server.cli import evaluate_run as run
        from loramux_server.evaluation.contenders import evaluate
    transformers_logging.disable_progress_bar()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    directory = settings.run_dir / "adapter"
    name = str(read_card(directory)["name"])
    quantize = run.trained_on(directory)
    bases = run.Bases(
        settings.base,
        device=device_of(settings.device),
        cache_dir=cache_dir,
        max_rank=run.largest_rank([directory]),
        report=stages.note,
    )
    with stages.stage("load the base as it is served"):
        engine = bases.engine(quantize)
    if quantize == "nf4":
        with stages.stage("make the fingerprint"):
            _write_fingerprint(engine, directory)
    if settings.eval_data is None:
        return None
    held, train, notes = run.read_held(
        settings.eval_data, settings.train_data, columns_of(settings), skip_bad=settings.skip_bad
    )
    labels = labels_of(held.examples, settings.label_list)
    evaluation = evaluate(
        held,
        [
            run.contender(bases, name, Role.ADAPTER, directory, quantize),
            run.contender(bases, "bare base", Role.BASE, None, quantize),
        ],
        bases.subject(quantize, notes),
        labels=labels,
        train=train,
        progress=run.progress_on(sys.stderr),
    )
    paths = write_evaluation(settings.run_dir, evaluation)
    add_scores(directory, evaluation.card_scores(), summary(evaluation))
    _write(f"\n{text_report(evaluation)}\n\n{run.written(paths)}\n")
    return evaluation


def _write_fingerprint(engine: LocalEngine, directory: Path) -> None:
    from loramux_adapters.artifact.format import FINGERPRINT_FILE
    from loramux_adapters.durable_files import write_whole
    from loramux_adapters.errors import TrainingError
    from loramux_server.fingerprint.drift import drift_prompts
    from loramux_server.fingerprint.fingerprint import make

    adapter = engine.load(directory)
    fingerprint = make(engine, drift_prompts(directory, engine.base.tokenizer), adapter)
    engine.unload(adapter)
    try:
        write_whole(directory / FINGERPRINT_FILE, (json.dumps(fingerprint, indent=1) + "\n").encode())
    except OSError as error:
        raise TrainingError(f"the fingerprint cannot be written to {directory}: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loramux_server.cli.finish",
        description="Fingerprint and evaluate a trained adapter on the serving path.",
        allow_abbrev=False,
    )
    add: Any = parser.add_argument
    add("run_dir", metavar="RUN_DIR", type=Path, help="directory of the training run")
    add("--base", default=EMBEDDED_NAME, help="the base that it was trained on")
    add("--eval-data", type=Path, metavar="FILE", help="held-out examples; without them there is no evaluation")
    add("--train-data", type=Path, metavar="FILE", help="training examples: majority baseline, overfitting")
    add("--labels", help="answers to choose from, such as ham,spam")
    for column in ("prompt", "completion", "template", "system", "labels", "delimiter"):
        add(f"--csv-{column}", help="as for `loramux train`")
    add("--skip-bad", action="store_true", help="leave out examples that cannot be used")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--threads", type=int, metavar="N", help="CPU threads")
    add("--cache-dir", type=Path, metavar="DIR", help="where a converted base is kept")
    return parser


def _fail(message: object, code: int) -> int:
    print(f"loramux: {message}", file=sys.stderr)
    return code


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
