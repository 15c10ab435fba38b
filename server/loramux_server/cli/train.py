"""`loramux train`: examples in; an adapter with card, curves and evaluation out. Cheap checks come before slow work."""

from __future__ import annotations

import argparse
import gc
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from loramux_adapters.training.run.run_dir import RunDirectory
from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.cli.adapters import KEY_VARIABLES
from loramux_server.cli.serve import configure_logging
from loramux_server.cli.train_data import read_material
from loramux_server.client.adapters import AdaptersClient
from loramux_server.config.environment import bound_spinning, cache_dir_of
from loramux_server.config.settings import add_flags, fields_of
from loramux_server.config.train import TrainConfig, load_train_config
from loramux_server.errors import CommandFailed
from loramux_server.serving.startup import Stages

INTERRUPTED = 130
FINISH_TAKES = ("eval_data", "labels", "device", "threads", "cache_dir")


@dataclass(frozen=True, slots=True)
class Permissions:
    """What is given on the command line only, since it holds for this one time.

    Attributes:
        overwrite: remove what an earlier run left in the directory.
        skip_bad: leave out examples that cannot be used.
        allow_overlap: held-out examples may be in the training data.
        dry_run: check and show everything, train nothing.
    """

    overwrite: bool = False
    skip_bad: bool = False
    allow_overlap: bool = False
    dry_run: bool = False


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "train",
        help="train an adapter on a file of examples",
        usage="loramux train --data FILE --name NAME [--eval-data FILE] [any setting below]",
        description="Train a LoRA adapter on the base that is served, NF4 and all: QLoRA. A run that was stopped, by "
        "Ctrl-C, a crash or a full disk, goes on when the same command is given again.",
        epilog="Example: loramux train --data train.jsonl --eval-data held.jsonl --name spam --labels ham,spam. "
        "Every setting is a flag, an environment variable and a key of the [train] table of the config file; the first "
        "of these that has a value wins. LORAMUX_ADMIN_KEY, or else LORAMUX_API_KEY, is the key for --upload.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with a [train] table (LORAMUX_CONFIG)")
    once = parser.add_argument_group("permissions, for this time only")
    once.add_argument("--overwrite", action="store_true", help="start anew where a run is finished or unfinished")
    once.add_argument("--skip-bad", action="store_true", help="leave out examples that cannot be used, and count them")
    once.add_argument("--allow-overlap", action="store_true", help="accept held-out examples that are trained on too")
    once.add_argument("--dry-run", action="store_true", help="check everything and show the plan, but train nothing")
    add_flags(parser, TrainConfig)
    flags = [field.flag for field in fields_of(TrainConfig).values()]
    flags += ["--config", "--overwrite", "--skip-bad", "--allow-overlap", "--dry-run"]
    parser.set_defaults(run=_run, parser=parser, flags=flags)


def _run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    given = vars(args)
    permissions = Permissions(**{field.name: given[field.name] for field in fields(Permissions)})
    config = load_train_config(given, environ, args.config)
    bound_spinning()
    cache_dir = cache_dir_of(config.cache_dir, environ)
    key = next((environ[variable] for variable in KEY_VARIABLES if environ.get(variable)), None)
    return train(config, permissions, cache_dir=cache_dir, key=key)


def train(config: TrainConfig, permissions: Permissions, *, cache_dir: Path, key: str | None = None) -> int:
    """Trains one adapter; returns the exit code. `key` is for the server to upload to.

    Raises:
        AdapterError, LoramuxError: it cannot be done, or not be finished; what was saved stays.
    """
    configure_logging("info")
    run = RunDirectory(config.run_dir)
    if run.is_finished and not permissions.overwrite:
        raise CommandFailed(
            f"{run.path} holds a finished run; give --overwrite to train it anew, or name another --out"
        )
    material = read_material(config, skip_bad=permissions.skip_bad, allow_overlap=permissions.allow_overlap)
    with run.owned():
        if permissions.overwrite and not permissions.dry_run:
            run.clear()
        stages = Stages(_write)
        with stages.stage("import libraries"):
            from loramux_server.cli.train_run import run_training
        outcome = run_training(
            config,
            material,
            run,
            stages,
            cache_dir=cache_dir,
            skip_bad=permissions.skip_bad,
            dry_run=permissions.dry_run,
        )
        if outcome is None:
            return 0
        if not outcome.finished:
            _show(f"stopped after step {outcome.step} of {outcome.plan.steps}; the same command goes on from there")
            return INTERRUPTED
        gc.collect()  # the base, before another process loads it
        failed = _finish(config, run, skip_bad=permissions.skip_bad)
        uploaded = config.upload is not None and _upload(str(config.name), config.upload, run, key)
    _show_end(config, run, uploaded=uploaded)
    return 1 if failed or (config.upload is not None and not uploaded) else 0


def _finish(config: TrainConfig, run: RunDirectory, *, skip_bad: bool) -> int:
    """Evaluation and fingerprint, in a process of its own: a base that was trained on is not the one that is served."""
    command = finish_command(config, run, skip_bad=skip_bad)
    _show("")
    _show("evaluating the adapter and making its fingerprint on the serving path, in a fresh process")
    code = subprocess.run([sys.executable, *command], check=False).returncode
    if code:
        _show(f"that failed, but the adapter is saved; try it again with: python {shlex.join(command)}")
    return 1 if code else 0


def finish_command(config: TrainConfig, run: RunDirectory, *, skip_bad: bool) -> list[str]:
    """What the Python interpreter is called with to finish a run; read by `cli_finish.py`."""
    command = ["-m", "loramux_server.cli.finish", str(run.path), "--base", config.base]
    for name, field in fields_of(TrainConfig).items():
        value = getattr(config, name)
        passed_on = name in FINISH_TAKES or (name.startswith("csv_") and config.eval_data is not None)
        if passed_on and value is not None:
            command += [field.flag, str(value)]
    if config.eval_data is not None:
        command += ["--train-data", str(config.data)]
    return [*command, "--skip-bad"] if skip_bad else command


def _upload(name: str, url: str, run: RunDirectory, key: str | None) -> bool:
    """Makes a running server serve the adapter; says so, or how to try it again."""
    try:
        reply = AdaptersClient(url, key).push(name, run.adapter)
    except CommandFailed as error:
        _show(f"the adapter is saved but not uploaded: {error}")
        return False
    outcome = reply.body.get("outcome", "created" if reply.status == 201 else "updated")
    _show(f"uploaded to {url}: {name} {outcome}")
    return True


def _show_end(config: TrainConfig, run: RunDirectory, *, uploaded: bool) -> None:
    """Where everything lies, and what to paste next."""
    found = [path.name for path in sorted(run.path.iterdir()) if path.is_file() and not path.name.startswith(".")]
    base = "" if config.base == EMBEDDED_NAME else f" --base {shlex.quote(config.base)}"
    push = shlex.join(["loramux", "adapters", "push", str(run.adapter), "--name", str(config.name)])
    _show("")
    _show(f"adapter   {run.adapter}: {', '.join(sorted(path.name for path in run.adapter.iterdir()))}")
    _show(f"beside it {', '.join(found)}")
    if config.quantize == "none":
        _show("It was trained on the 16-bit base, to compare with; a server holds the NF4 base and refuses it.")
    elif not uploaded:
        _show(f"serve it  loramux serve{base}    and in another terminal:")
        _show(f"          {push}")


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _show(line: str) -> None:
    print(line, flush=True)
