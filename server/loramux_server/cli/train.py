"""`loramux train`: examples in; an adapter with card, curves and evaluation out. Cheap checks come before slow work."""

from __future__ import annotations

import gc
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.cli.frame import configure_logging, show, show_command, write
from loramux_server.cli.options import once, settings_app
from loramux_server.config.environment import bound_spinning, cache_dir_of, key_of
from loramux_server.config.finish import FinishConfig
from loramux_server.config.settings import settings_of
from loramux_server.config.train import TrainConfig
from loramux_server.errors import CommandFailed
from loramux_server.plain_text import masked
from loramux_server.serving.startup import Stages

if TYPE_CHECKING:
    from loramux_adapters.training.run.run_dir import RunDirectory

INTERRUPTED = 130


def train(
    config: TrainConfig,
    ctx: typer.Context,
    overwrite: Annotated[bool, once("--overwrite", "start anew where a run is finished or unfinished")] = False,
    skip_bad: Annotated[bool, once("--skip-bad", "leave out examples that cannot be used, and count them")] = False,
    allow_overlap: Annotated[bool, once("--allow-overlap", "accept held-out examples that are trained on too")] = False,
    dry_run: Annotated[bool, once("--dry-run", "check everything and show the plan, but train nothing")] = False,
) -> int:
    """Train a LoRA adapter on the base that is served, NF4 and all: QLoRA.

    A run that was stopped, by Ctrl-C, a crash or a full disk, goes on when the same command is given again.
    """
    from loramux_adapters.training.run.run_dir import RunDirectory
    from loramux_server.cli.train_data import read_material

    bound_spinning()
    configure_logging("info")
    run = RunDirectory(config.run_dir)
    if run.is_finished and not overwrite:
        raise CommandFailed(
            f"{run.path} holds a finished run; give --overwrite to train it anew, or name another --out"
        )
    material = read_material(config, skip_bad=skip_bad, allow_overlap=allow_overlap)
    with run.owned():
        if overwrite and not dry_run:
            run.clear()
        stages = Stages(write)
        with stages.stage("import libraries"):
            from loramux_server.cli.train_run import run_training
        outcome = run_training(
            config,
            material,
            run,
            stages,
            cache_dir=cache_dir_of(config.cache_dir, ctx.obj),
            skip_bad=skip_bad,
            dry_run=dry_run,
        )
        if outcome is None:
            return 0
        if not outcome.finished:
            show(f"stopped after step {outcome.step} of {outcome.plan.steps}; the same command goes on from there")
            return INTERRUPTED
        gc.collect()  # the base, before another process loads it
        failed = _finish(config, run, skip_bad=skip_bad)
        uploaded = config.upload is not None and _upload(str(config.name), config.upload, run, key_of(ctx.obj))
    _show_end(config, run, uploaded=uploaded)
    return 1 if failed or (config.upload is not None and not uploaded) else 0


def _finish(config: TrainConfig, run: RunDirectory, *, skip_bad: bool) -> int:
    """Evaluation and fingerprint, in a process of its own: a base that was trained on is not the one that is served."""
    command = finish_command(config, run, skip_bad=skip_bad)
    show("")
    show("evaluating the adapter and making its fingerprint on the serving path, in a fresh process")
    code = subprocess.run([sys.executable, *command], check=False).returncode
    if code:
        show("that failed, but the adapter is saved; try it again with:")
        show_command(f"python {shlex.join(command)}")
    return 1 if code else 0


def finish_command(config: TrainConfig, run: RunDirectory, *, skip_bad: bool) -> list[str]:
    """What the Python interpreter is called with to finish a run; read by `cli.finish`."""
    command = ["-m", "loramux_server.cli.finish", str(run.path)]
    for name, setting in settings_of(FinishConfig).items():
        value = config.data if name == "train_data" else getattr(config, name)
        evaluates = name == "train_data" or name.startswith("csv_")
        if value is not None and (config.eval_data is not None or not evaluates):
            command += [setting.flag, str(value)]
    return [*command, "--skip-bad"] if skip_bad else command


def _upload(name: str, url: str, run: RunDirectory, key: str | None) -> bool:
    """Makes a running server serve the adapter; says so, or how to try it again."""
    from loramux_server.client.adapters import AdaptersClient
    from loramux_server.client.retry import Patience

    try:
        reply = AdaptersClient(url, key).push(name, run.adapter, patience=Patience(tell=show))
    except CommandFailed as error:
        show(f"the adapter is saved but not uploaded: {error}")
        return False
    outcome = reply.body.get("outcome", "created" if reply.status == 201 else "updated")
    show(f"uploaded to {masked(url)}: {name} {outcome}")
    return True


def _show_end(config: TrainConfig, run: RunDirectory, *, uploaded: bool) -> None:
    """Where everything lies, and what to paste next."""
    found = [path.name for path in sorted(run.path.iterdir()) if path.is_file() and not path.name.startswith(".")]
    base = "" if config.base == EMBEDDED_NAME else f" --base {shlex.quote(config.base)}"
    push = shlex.join(["loramux", "adapters", "push", str(run.adapter), "--name", str(config.name)])
    show("")
    show(f"adapter   {run.adapter}: {', '.join(sorted(path.name for path in run.adapter.iterdir()))}")
    show(f"beside it {', '.join(found)}")
    if config.quantize == "none":
        show("It was trained on the 16-bit base, to compare with; a server holds the NF4 base and refuses it.")
    elif not uploaded:
        show(f"serve it  loramux serve{base}    and in another terminal:")
        show_command(f"          {push}")


app = settings_app(
    TrainConfig,
    train,
    usage="--data FILE --name NAME [OPTIONS]",
    epilog="""\
Examples:

    loramux train --data train.jsonl --eval-data held.jsonl --name spam --labels ham,spam
    loramux train --data train.jsonl --name spam --epochs 3 --rank 16 --dry-run

LORAMUX_ADMIN_KEY, or else LORAMUX_API_KEY, is the key for --upload.""",
)
