"""`loramux eval`: what an adapter is worth on held-out examples, beside the bare base and whatever else is named."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from loramux_server.base.device import check_device
from loramux_server.base.source import check_base, resolve_base
from loramux_server.cli.frame import configure_logging, show, write
from loramux_server.cli.options import once, settings_app
from loramux_server.cli.screen import LineBar, print_table
from loramux_server.config.adapter_directory import find_adapter
from loramux_server.config.environment import before_a_base, cache_dir_of, key_of, quiet_libraries
from loramux_server.config.evaluate import EvalConfig
from loramux_server.config.train import DEFAULT_OUT
from loramux_server.errors import CommandFailed
from loramux_server.longrun.interrupt import stoppable
from loramux_server.longrun.time_left import TimeLeft
from loramux_server.plain_text import masked, printable
from loramux_server.serving.startup import Stages

if TYPE_CHECKING:
    from loramux_adapters.evaluation.evaluated import Evaluation
    from loramux_adapters.training.data.conversation import Example
    from loramux_adapters.training.data.examples import ExampleSet
    from loramux_server.evaluation.contenders import Contender, Subject

STOPPING = "stopping after these examples, and nothing is written; press Ctrl-C again to stop now"


def run(
    config: EvalConfig,
    ctx: typer.Context,
    skip_bad: Annotated[bool, once("--skip-bad", "leave out examples that cannot be used, and count them")] = False,
) -> int:
    """Score an adapter on held-out examples beside bare base and majority class, and say in words what that means.

    Perplexity, and for answers from a few labels accuracy, precision, recall, F1 and a confusion matrix, each with its
    95 % bootstrap interval.
    """
    configure_logging("info")
    quiet_libraries()
    if config.url is not None:
        show(f"  ask the server at {masked(config.url)}")
        evaluation = evaluate_server(config, key_of(ctx.obj), skip_bad=skip_bad)
    else:
        before_a_base(ctx.obj)
        cache_dir = cache_dir_of(config.cache_dir, ctx.obj)
        evaluation = evaluate_here(config, Stages(write), cache_dir=cache_dir, skip_bad=skip_bad)
    return _report(evaluation, config.out)


def evaluate_here(config: EvalConfig, stages: Stages, *, cache_dir: Path, skip_bad: bool = False) -> Evaluation:
    """Loads the base and asks it in this process; whatever can be seen to be wrong before that is.

    Raises:
        AdapterError, LoramuxError: the data, an adapter or the base cannot be used.
    """
    from loramux_adapters.evaluation.labels import labels_of
    from loramux_server.evaluation.material import largest_rank, read_held, trained_on

    assert config.data is not None and config.adapter is not None
    check_device(config.device)
    check_base(config.base)
    _check_out(config.out)
    directory = find_adapter(config.adapter, DEFAULT_OUT)
    others = {name: find_adapter(name, DEFAULT_OUT) for name in (config.compare, config.reference) if name is not None}
    max_rank = largest_rank([directory, *others.values()])
    held, train, notes = read_held(
        config.data, config.train_data, config.columns(), skip_bad=skip_bad, limit=config.limit
    )
    labels = labels_of(held.examples, config.label_list)
    quantize = config.quantize or trained_on(directory)
    with stages.stage("find the base"):
        source = resolve_base(config.base, cache_dir, stages.note)
    with stages.imports():
        import torch

        from loramux_adapters.evaluation.evaluated import Role
        from loramux_server.base.device import device_of
        from loramux_server.cli.evaluate_run import Bases, contender
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = device_of(config.device, stages.note)
    bases = Bases(source, device=device, cache_dir=cache_dir, max_rank=max_rank, report=stages.note)
    contenders = [
        contender(bases, _shown(config.adapter), Role.ADAPTER, directory, quantize),
        contender(bases, "bare base", Role.BASE, None, quantize),
    ]
    if config.compare is not None:
        contenders.append(contender(bases, _shown(config.compare), Role.OTHER, others[config.compare], quantize))
    if config.reference is not None:
        name = f"{_shown(config.reference)}, 16 bit"
        contenders.append(contender(bases, name, Role.REFERENCE, others[config.reference], "none"))
    exact = None
    if config.fidelity:
        name = f"{_shown(config.adapter)}, in fp32"
        exact = contender(bases, name, Role.REFERENCE, directory, quantize, exact=True)
    with stages.stage("load the base"):
        subject = bases.subject(quantize, notes)
    return evaluate_shown(held, contenders, subject, labels=labels, train=train, exact=exact)


def evaluate_server(config: EvalConfig, key: str | None, *, skip_bad: bool = False) -> Evaluation:
    """Asks a running server. Raises AdapterError, LoramuxError."""
    from loramux_adapters.evaluation.evaluated import Role
    from loramux_adapters.evaluation.labels import labels_of
    from loramux_server.evaluation.contenders import Contender, Subject
    from loramux_server.evaluation.http_scorer import HttpScorer, Server
    from loramux_server.evaluation.material import read_held

    assert config.data is not None and config.adapter is not None and config.url is not None
    _check_out(config.out)
    held, train, notes = read_held(
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
    return evaluate_shown(held, contenders, subject, labels=labels, train=train)


class ExampleBar(LineBar):
    """How many examples are done."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._time_left = TimeLeft()
        self._what = ""

    def told(self, what: str, done: int, total: int) -> None:
        """What is done with how many of all examples so far."""
        left = self._time_left.left(what, done, total)
        self.show(f"  {what}: {done:,} of {total:,} examples{left}", done, total, new=what != self._what)
        self._what = what


def evaluate_shown(
    held: ExampleSet,
    contenders: Sequence[Contender],
    subject: Subject,
    *,
    labels: tuple[str, ...],
    train: Sequence[Example],
    exact: Contender | None = None,
) -> Evaluation:
    """The evaluation itself, with a bar; Ctrl-C stops it between two parts. Raises KeyboardInterrupt then."""
    from loramux_server.evaluation.contenders import evaluate

    bar = ExampleBar(sys.stderr)
    try:
        with stoppable(lambda: bar.line(STOPPING)) as go_on:

            def progress(what: str, done: int, total: int) -> None:
                bar.told(what, done, total)
                go_on()

            return evaluate(held, contenders, subject, labels=labels, train=train, exact=exact, progress=progress)
    finally:
        bar.end()


def print_report(evaluation: Evaluation) -> None:
    """The whole report: as text, with tables drawn on a terminal."""
    from loramux_adapters.evaluation.report import heading, sections, text_report

    print()
    if not sys.stdout.isatty():
        print(text_report(evaluation))
        return
    print("\n".join(heading(evaluation)))
    for section in sections(evaluation):
        print(f"\n{section.title}")
        if section.rows:
            print_table(section.rows[0], section.rows[1:], numbers=True)
        else:
            print("\n".join(section.lines))


def written(paths: Sequence[Path]) -> str:
    """One line on where the files of an evaluation are."""
    return f"written to {paths[0].parent}: {', '.join(path.name for path in paths)}"


def _report(evaluation: Evaluation, out: Path | None) -> int:
    from loramux_adapters.evaluation.report import write_evaluation

    print_report(evaluation)
    if out is not None:
        print(f"\n{written(write_evaluation(out, evaluation))}")
    return 0


def _check_out(out: Path | None) -> None:
    if out is not None and out.exists() and not out.is_dir():
        raise CommandFailed(f"--out {out} is no directory; name one for the files of the evaluation")


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
