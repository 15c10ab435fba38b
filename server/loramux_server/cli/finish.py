"""The last act of `loramux train`, in a process of its own: what was trained is fingerprinted and evaluated as served.

`python -m loramux_server.cli.finish RUN_DIR`; a base that was trained on is not the one that is served, so a fresh one
is loaded here. May be run again at any time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux_server.base.device import check_device
from loramux_server.base.source import check_base, resolve_base
from loramux_server.cli import frame
from loramux_server.cli.evaluate import evaluate_shown, print_report, written
from loramux_server.cli.options import once, settings_app
from loramux_server.config.environment import before_a_base, cache_dir_of, quiet_libraries
from loramux_server.config.finish import FinishConfig
from loramux_server.longrun.interrupt import stoppable
from loramux_server.serving.startup import Stages

if TYPE_CHECKING:
    from loramux_adapters.evaluation.evaluated import Evaluation
    from loramux_server.engine.local_engine import LocalEngine


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Runs, and returns the exit code: 0 done, 1 it could not be done, 2 the command line is wrong."""
    return frame.run(app, "python -m loramux_server.cli.finish", argv, environ)


def run(
    config: FinishConfig,
    ctx: typer.Context,
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="directory of the training run")],
    skip_bad: Annotated[bool, once("--skip-bad", "leave out examples that cannot be used")] = False,
) -> int:
    """Fingerprint and evaluate a trained adapter on the serving path."""
    frame.configure_logging("info")
    quiet_libraries()
    before_a_base(ctx.obj)
    finish(run_dir, config, Stages(frame.write), cache_dir=cache_dir_of(config.cache_dir, ctx.obj), skip_bad=skip_bad)
    return 0


def finish(
    run_dir: Path, settings: FinishConfig, stages: Stages, *, cache_dir: Path, skip_bad: bool = False
) -> Evaluation | None:
    """Fingerprint first, which is quick; then the evaluation, if there is held-out data.

    Writes fingerprint.json and the scores of card.json into RUN_DIR/adapter, the evaluation's files into RUN_DIR.
    Raises:
        AdapterError, LoramuxError: it cannot be done; what was written before stays.
    """
    from loramux_adapters.training.run.card import add_scores, read_card
    from loramux_server.evaluation.material import largest_rank, read_held, trained_on

    directory = run_dir / "adapter"
    name = str(read_card(directory)["name"])
    check_device(settings.device)
    check_base(settings.base)
    quantize, max_rank = trained_on(directory), largest_rank([directory])
    data = settings.eval_data
    material = read_held(data, settings.train_data, settings.columns(), skip_bad=skip_bad) if data is not None else None
    with stoppable(lambda: stages.note("stopping after this stage; press Ctrl-C again to stop now")) as go_on:
        with stages.stage("find the base"):
            source = resolve_base(settings.base, cache_dir, stages.note)
        go_on()
        with stages.imports():
            import torch

            from loramux_adapters.evaluation.evaluated import Role
            from loramux_adapters.evaluation.labels import labels_of
            from loramux_adapters.evaluation.report import summary, write_evaluation
            from loramux_server.base.device import device_of
            from loramux_server.cli.evaluate_run import Bases, contender
        go_on()
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        device = device_of(settings.device)
        bases = Bases(source, device=device, cache_dir=cache_dir, max_rank=max_rank, report=stages.note)
        with stages.stage("load the base as it is served"):
            engine = bases.engine(quantize)
        go_on()
        if quantize == "nf4":
            with stages.stage("make the fingerprint"):
                _write_fingerprint(engine, directory)
    if material is None:
        return None
    held, train, notes = material
    labels = labels_of(held.examples, settings.label_list)
    contenders = [
        contender(bases, name, Role.ADAPTER, directory, quantize),
        contender(bases, "bare base", Role.BASE, None, quantize),
    ]
    evaluation = evaluate_shown(held, contenders, bases.subject(quantize, notes), labels=labels, train=train)
    paths = write_evaluation(run_dir, evaluation)
    add_scores(directory, evaluation.card_scores(), summary(evaluation))
    print_report(evaluation)
    frame.write(f"\n{written(paths)}\n")
    return evaluation


def _write_fingerprint(engine: LocalEngine, directory: Path) -> None:
    from loramux_adapters.artifact.format import FINGERPRINT_FILE
    from loramux_adapters.durable_files import write_whole
    from loramux_adapters.errors import TrainingError
    from loramux_server.fingerprint.drift import drift_prompts
    from loramux_server.fingerprint.fingerprint import make

    adapter = engine.load(directory)
    fingerprint = make(engine, drift_prompts(directory, engine.base.tokenizer, adapter.chat_template), adapter)
    engine.unload(adapter)
    try:
        write_whole(directory / FINGERPRINT_FILE, (json.dumps(fingerprint, indent=1) + "\n").encode())
    except OSError as error:
        raise TrainingError(f"the fingerprint cannot be written to {directory}: {error.strerror}") from error


app = settings_app(FinishConfig, run)

if __name__ == "__main__":
    sys.exit(main())
