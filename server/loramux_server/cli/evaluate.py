"""`loramux eval`: what an adapter is worth on held-out examples, beside the bare base and whatever else is named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux_server.cli.frame import configure_logging, write
from loramux_server.cli.options import once, settings_app
from loramux_server.cli.screen import example_bar
from loramux_server.config.adapter_directory import find_adapter
from loramux_server.config.environment import bound_spinning, cache_dir_of, key_of
from loramux_server.config.evaluate import EvalConfig
from loramux_server.config.train import DEFAULT_OUT
from loramux_server.errors import CommandFailed
from loramux_server.plain_text import masked, printable
from loramux_server.serving.startup import Stages

if TYPE_CHECKING:
    from loramux_adapters.evaluation.evaluated import Evaluation


def run(
    config: EvalConfig,
    ctx: typer.Context,
    skip_bad: Annotated[bool, once("--skip-bad", "leave out examples that cannot be used, and count them")] = False,
) -> int:
    """Score an adapter on held-out examples beside bare base and majority class, and say in words what that means.

    Perplexity, and for answers from a few labels accuracy, precision, recall, F1 and a confusion matrix, each with its
    95 % bootstrap interval.
    """
    bound_spinning()
    configure_logging("info")
    if config.url is not None:
        evaluation = evaluate_server(config, key_of(ctx.obj), skip_bad=skip_bad)
    else:
        cache_dir = cache_dir_of(config.cache_dir, ctx.obj)
        evaluation = evaluate_here(config, Stages(write), cache_dir=cache_dir, skip_bad=skip_bad)
    return _report(evaluation, config.out)


def evaluate_here(config: EvalConfig, stages: Stages, *, cache_dir: Path, skip_bad: bool = False) -> Evaluation:
    """Loads the base and asks it in this process.

    Raises:
        AdapterError, LoramuxError: the data, an adapter or the base cannot be used.
    """
    assert config.data is not None and config.adapter is not None
    directory = find_adapter(config.adapter, DEFAULT_OUT)
    others = {name: find_adapter(name, DEFAULT_OUT) for name in (config.compare, config.reference) if name is not None}
    with stages.stage("import libraries"):
        import torch

        from loramux_adapters.evaluation.evaluated import Role
        from loramux_adapters.evaluation.labels import labels_of
        from loramux_server.base.device import device_of
        from loramux_server.cli import evaluate_run
        from loramux_server.evaluation.contenders import evaluate
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    held, train, notes = evaluate_run.read_held(
        config.data, config.train_data, config.columns(), skip_bad=skip_bad, limit=config.limit
    )
    labels = labels_of(held.examples, config.label_list)
    quantize = config.quantize or evaluate_run.trained_on(directory)
    bases = evaluate_run.Bases(
        config.base,
        device=device_of(config.device),
        cache_dir=cache_dir,
        max_rank=evaluate_run.largest_rank([directory, *others.values()]),
        report=stages.note,
    )
    contenders = [
        evaluate_run.contender(bases, _shown(config.adapter), Role.ADAPTER, directory, quantize),
        evaluate_run.contender(bases, "bare base", Role.BASE, None, quantize),
    ]
    if config.compare is not None:
        name = _shown(config.compare)
        contenders.append(evaluate_run.contender(bases, name, Role.OTHER, others[config.compare], quantize))
    if config.reference is not None:
        name = f"{_shown(config.reference)}, 16 bit"
        contenders.append(evaluate_run.contender(bases, name, Role.REFERENCE, others[config.reference], "none"))
    with stages.stage("load the base"):
        subject = bases.subject(quantize, notes)
    with example_bar(sys.stderr) as progress:
        return evaluate(held, contenders, subject, labels=labels, train=train, progress=progress)


def evaluate_server(config: EvalConfig, key: str | None, *, skip_bad: bool = False) -> Evaluation:
    """Asks a running server. Raises AdapterError, LoramuxError."""
    from loramux_adapters.evaluation.evaluated import Role
    from loramux_adapters.evaluation.labels import labels_of
    from loramux_server.cli import evaluate_run
    from loramux_server.evaluation.contenders import Contender, Subject, evaluate
    from loramux_server.evaluation.http_scorer import HttpScorer, Server

    assert config.data is not None and config.adapter is not None and config.url is not None
    held, train, notes = evaluate_run.read_held(
        config.data, config.train_data, config.columns(), skip_bad=skip_bad, limit=config.limit
    )
    labels = labels_of(held.examples, config.label_list)
    if not labels:
        raise CommandFailed("free text cannot be scored over HTTP: name --labels, or leave --url out")
    server = Server(config.url, key)
    base = server.base()
    named = [(config.adapter, Role.ADAPTER), (str(base["id"]), Role.BASE)]
    named += [(config.compare, Role.OTHER)] if config.compare is not None else []
    for name, _ in named:
        server.model(name)

    def scorer(name: str) -> HttpScorer:
        return HttpScorer(server, name)

    contenders = [
        Contender("bare base" if role is Role.BASE else name, role, lambda name=name: scorer(name))  # type: ignore[misc]
        for name, role in named
    ]
    subject = Subject(
        base=printable(str(base["id"])),
        base_id=printable(str(base.get("root") or "")),
        quantize="nf4",
        from_gguf=False,
        numerics_id="",
        notes=(*notes, f"Asked over HTTP: {masked(config.url)}. Labels are scored by the first token of each."),
    )
    with example_bar(sys.stderr) as progress:
        return evaluate(held, contenders, subject, labels=labels, train=train, progress=progress)


def _report(evaluation: Evaluation, out: Path | None) -> int:
    from loramux_adapters.evaluation.report import write_evaluation
    from loramux_server.cli.evaluate_run import print_report, written

    print_report(evaluation)
    if out is not None:
        print(f"\n{written(write_evaluation(out, evaluation))}")
    return 0


def _shown(spec: str) -> str:
    """A name for the report: a run's directory rather than the `adapter` in it."""
    path = Path(spec).expanduser()
    name = path.resolve().name if path.is_dir() else spec
    return path.resolve().parent.name if name == "adapter" else name


app = settings_app(
    EvalConfig,
    run,
    usage="--data FILE --adapter NAME [OPTIONS]",
    epilog="""\
Examples:

    loramux eval --data held.jsonl --adapter spam --train-data train.jsonl
    loramux eval --data held.jsonl --adapter spam --url http://127.0.0.1:8000 --labels ham,spam""",
)
