"""`loramux train`: examples in; an adapter with card, curves and evaluation out. Cheap checks come before slow work."""

from __future__ import annotations

import gc
import shlex
import signal
import subprocess
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from loramux_adapters.errors import AdapterError, InvalidAdapterName
from loramux_server.base.cache_directory import borrowed_cache
from loramux_server.base.device import check_device
from loramux_server.base.source import EMBEDDED_NAME, check_base, resolve_base
from loramux_server.cli.frame import configure_logging, show, show_command, write
from loramux_server.cli.options import once, settings_app
from loramux_server.config.environment import before_a_base, cache_dir_of, key_of, quiet_libraries
from loramux_server.config.finish import FinishConfig
from loramux_server.config.settings import settings_of
from loramux_server.config.train import TrainConfig
from loramux_server.errors import CommandFailed, LoramuxError
from loramux_server.longrun.interrupt import interruptible
from loramux_server.plain_text import masked
from loramux_server.serving.startup import Stages

if TYPE_CHECKING:
    from loramux_adapters.training.run.run_dir import RunDirectory
    from loramux_server.cli.train_data import Prepared

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
    from loramux_server.cli.train_data import Prepared, read_material

    configure_logging("info")
    quiet_libraries()
    before_a_base(ctx.obj)
    run = RunDirectory(config.run_dir)
    check_device(config.device)
    check_base(config.base)
    if run.is_finished and not overwrite:
        upload = f". To upload it: {push_command(config, run)}" if config.upload is not None else ""
        raise CommandFailed(
            f"{run.path} holds a finished run; give --overwrite to train it anew, or name another --out{upload}"
        )
    run.check_usable()
    material = read_material(config, skip_bad=skip_bad, allow_overlap=allow_overlap)
    stages = Stages(write)
    base_there = _ask_server(config, stages, key_of(ctx.obj))
    usual = cache_dir_of(config.cache_dir, ctx.obj)
    with borrowed_cache(usual) if dry_run else nullcontext(usual) as cache_dir:
        with stages.stage("find the base"):
            source = resolve_base(config.base, cache_dir, stages.note)
        if config.name == source.name:
            raise InvalidAdapterName(f"--name {config.name} is the base's own name; choose another")
        with nullcontext() if dry_run else run.owned():
            if overwrite and not dry_run:
                run.clear()
            prepared = Prepared(material, source, cache_dir, base_there)
            try:
                return _run(config, prepared, run, stages, key_of(ctx.obj), skip_bad=skip_bad, dry_run=dry_run)
            except KeyboardInterrupt:
                _show_interrupted(config, run, skip_bad=skip_bad)
                return INTERRUPTED


def _run(
    config: TrainConfig,
    prepared: Prepared,
    run: RunDirectory,
    stages: Stages,
    key: str | None,
    *,
    skip_bad: bool,
    dry_run: bool,
) -> int:
    """Everything that takes long; returns the exit code. Raises KeyboardInterrupt."""
    with stages.imports():
        from loramux_server.cli.train_run import run_training
    outcome = run_training(config, prepared, run, stages, skip_bad=skip_bad, dry_run=dry_run)
    if outcome is None:
        return 0
    if not outcome.finished:
        show(f"stopped after step {outcome.step} of {outcome.plan.steps}; the same command goes on from there")
        return INTERRUPTED
    gc.collect()  # the base, before another process loads it
    failed = _finish(config, run, skip_bad=skip_bad)
    uploaded = config.upload is not None and _upload(config, run, key)
    _show_end(config, run, uploaded=uploaded)
    return 1 if failed or (config.upload is not None and not uploaded) else 0


def _ask_server(config: TrainConfig, stages: Stages, key: str | None) -> str | None:
    """The id of the base on the server that is to get the adapter, where it says. Raises CommandFailed."""
    from loramux_server.client.upload_check import check_upload

    if config.upload is None:
        return None
    with stages.stage("ask the server that is to get it"):
        return check_upload(config.upload, key, str(config.name))


def _finish(config: TrainConfig, run: RunDirectory, *, skip_bad: bool) -> int:
    """Evaluation and fingerprint, in a process of its own: a base that was trained on is not the one that is served.

    Raises KeyboardInterrupt if it was stopped.
    """
    show("")
    work = (
        "evaluating the adapter and making its fingerprint"
        if config.eval_data is not None
        else "making its fingerprint"
    )
    show(f"{work} on the serving path, in a fresh process")
    child = subprocess.Popen([sys.executable, *finish_command(config, run, skip_bad=skip_bad)])
    try:
        with interruptible(lambda: None, lambda: child.send_signal(signal.SIGINT)):  # it has an answer of its own
            code = child.wait()
    except KeyboardInterrupt:
        child.kill()
        child.wait()
        raise
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        show("that failed, but the adapter is saved; try it again with:")
        show_command(_finish_again(config, run, skip_bad=skip_bad))
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


def push_command(config: TrainConfig, run: RunDirectory) -> str:
    """What uploads the adapter of a finished run, to be pasted."""
    command = ["loramux", "adapters", "push", str(run.adapter), "--name", str(config.name)]
    return shlex.join([*command, "--url", config.upload] if config.upload is not None else command)


def _upload(config: TrainConfig, run: RunDirectory, key: str | None) -> bool:
    """Makes a running server serve the adapter; says so, or why not."""
    from loramux_server.client.adapters import AdaptersClient
    from loramux_server.client.retry import Patience

    assert config.upload is not None
    show(f"uploading to {masked(config.upload)}; the server tries it before it publishes it")
    try:
        reply = AdaptersClient(config.upload, key).push(str(config.name), run.adapter, patience=Patience(tell=show))
    except (LoramuxError, AdapterError, OSError) as error:
        show(f"the adapter is saved but NOT uploaded: {error}")
        return False
    outcome = reply.body.get("outcome", "created" if reply.status == 201 else "updated")
    show(f"uploaded to {masked(config.upload)}: {config.name} {outcome}")
    return True


def _finish_again(config: TrainConfig, run: RunDirectory, *, skip_bad: bool) -> str:
    return f"python {shlex.join(finish_command(config, run, skip_bad=skip_bad))}"


def _show_interrupted(config: TrainConfig, run: RunDirectory, *, skip_bad: bool) -> None:
    """What there is already, and what to paste to go on."""
    if not run.is_finished:
        kept = "the same command goes on from the last checkpoint" if run.is_begun else "nothing was saved"
        show(f"interrupted; {kept}")
        return
    show(f"interrupted; the adapter is saved in {run.adapter}, but not everything was done")
    show_command(f"evaluate  {_finish_again(config, run, skip_bad=skip_bad)}")
    show_command(f"upload    {push_command(config, run)}")


def _show_end(config: TrainConfig, run: RunDirectory, *, uploaded: bool) -> None:
    """Where everything lies, and what to paste next."""
    found = [path.name for path in sorted(run.path.iterdir()) if path.is_file() and not path.name.startswith(".")]
    base = "" if config.base == EMBEDDED_NAME else f" --base {shlex.quote(config.base)}"
    show("")
    show(f"adapter   {run.adapter}: {', '.join(sorted(path.name for path in run.adapter.iterdir()))}")
    show(f"beside it {', '.join(found)}")
    if config.quantize == "none":
        show("It was trained on the 16-bit base, to compare with; a server holds the NF4 base and refuses it.")
    elif config.upload is not None and not uploaded:
        show("It is NOT uploaded yet. What is trained and evaluated is kept; this uploads it:")
        show_command(f"          {push_command(config, run)}")
    elif not uploaded:
        show(f"serve it  loramux serve{base}    and in another terminal:")
        show_command(f"          {push_command(config, run)}")


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
