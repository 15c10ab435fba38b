"""`loramux plan serve`: what a server takes on a card, before one is rented; the base's config is all that is read."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loramux_server.base.source import check_base, resolve_base
from loramux_server.cli.frame import configure_logging, show, write
from loramux_server.cli.options import settings_app
from loramux_server.cli.screen import print_table
from loramux_server.config.environment import cache_dir_of, quiet_libraries
from loramux_server.config.plan_serve import PlanServeConfig
from loramux_server.plain_text import for_reader
from loramux_server.serving.startup import Stages

if TYPE_CHECKING:
    from loramux_server.serving.serve_plan import ServePlan, Wanted

MIB = 2**20
Base = Annotated[
    str | None, typer.Argument(metavar="BASE", help="the base to plan for, as --base names one", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="print JSON, in bytes")]


def plan(config: PlanServeConfig, ctx: typer.Context, spec: Base = None, json_: Json = False) -> int:
    """Say what a server takes on a card, and how much that leaves for adapters and KV cache.

    Only the base's config is read: a directory with a config.json will do, and no card is needed.
    """
    configure_logging("info")  # before bitsandbytes, which logs what it misses when it is imported
    quiet_libraries()
    spec = spec or config.base
    check_base(spec, weights=False)
    stages = Stages(_write_aside if json_ else write)
    with stages.stage("find the base"):
        source = resolve_base(spec, cache_dir_of(config.cache_dir, ctx.obj), stages.note, weights=False)
    with stages.imports():
        from loramux_server.base.loader import skeleton_of
        from loramux_server.serving.cards import cards_of
        from loramux_server.serving.planned_base import planned_base
        from loramux_server.serving.serve_plan import Wanted, plan_on
    cards = cards_of(config.card)
    with stages.stage("count its layers"):
        _, skeleton = skeleton_of(source)
        wanted = Wanted(planned_base(skeleton, vectors=config.adapter_vectors), config, config.adapters, config.rank)
        plans = [plan_on(card, wanted) for card in cards]
    if json_:
        print(json.dumps(_in_json(spec, wanted, plans), indent=2))
        return 0
    show("")
    for line in _about(spec, wanted):
        show(line)
    for group in _side_by_side(plans):
        print_table(("MiB", *(each.card.name for each in group)), _memory(wanted, group), numbers=True)
        show("")
        print_table(("what that holds", *(each.card.name for each in group)), _held(wanted, group), numbers=True)
        show("")
    for line in _below(wanted, plans):
        show(line)
    return 0


def _write_aside(text: str) -> None:
    print(for_reader(text, sys.stderr), end="", file=sys.stderr, flush=True)


def _side_by_side(plans: Sequence[ServePlan]) -> Iterator[list[ServePlan]]:
    """As many cards at a time as stand beside each other in 100 columns."""
    group: list[ServePlan] = []
    used = 0
    for plan in plans:
        width = 2 + max(len(plan.card.name), _NUMBER)
        if group and _FIRST_COLUMN + used + width > 100:
            yield group
            group, used = [], 0
        group.append(plan)
        used += width
    if group:
        yield group


_FIRST_COLUMN = len("requests of 2,048,000 tokens at once")
_NUMBER = 9  # characters of the widest number, tokens of a cache


def _about(spec: str, wanted: Wanted) -> Sequence[str]:
    base = wanted.base
    room = " with room for magnitudes and biases" if base.sizes.vectors else ""
    return [
        f"{spec}: {base.parameters:,} parameters, {base.nbytes / MIB:,.0f} MiB as it lies on a card; built for "
        f"{base.sizes.context:,} tokens",
        f"an adapter of rank {wanted.rank} on every layer takes {wanted.adapter_bytes / MIB:,.1f} MiB{room}, a token "
        f"in the KV cache {base.sizes.kv.token_bytes / 1024:,.1f} KiB",
        "",
    ]


def _memory(wanted: Wanted, plans: Sequence[ServePlan]) -> list[list[str]]:
    """What gets how many MiB of each card."""
    base = wanted.base

    def row(name: str, value: Callable[[ServePlan], int | None]) -> list[str]:
        return [name, *(_number(found, MIB) for found in map(value, plans))]

    rows = [
        row("memory, as CUDA tells it", lambda plan: plan.card.total),
        row("CUDA and libraries, about", lambda plan: plan.card.libraries),
        row("layers in NF4", lambda plan: base.nf4),
        row("embedding and head", lambda plan: base.head),
        row("norms, biases", lambda plan: base.others),
        *(row(name, _of_sizes(field)) for name, field in _PARTS),
    ]
    if any(plan.short for plan in plans):
        rows.append(row("short by", lambda plan: plan.short or None))
    return rows


_PARTS = (
    ("work of the largest step", "workspace"),
    ("graphs of steps, at most", "graphs"),
    ("adapters", "arena"),
    ("KV cache", "cache"),
    ("trained tokens and heads, at most", "tokens"),
    ("left for what comes and goes", "left"),
)


def _of_sizes(field: str) -> Callable[[ServePlan], int | None]:
    return lambda plan: None if plan.sizes is None else getattr(plan.sizes, field)


def _held(wanted: Wanted, plans: Sequence[ServePlan]) -> list[list[str]]:
    """What can be done with it."""
    length = wanted.context
    rows: dict[str, Callable[[Any], int]] = {
        f"adapters of rank {wanted.rank} at once": lambda sizes: sizes.arena // wanted.adapter_bytes,
        "tokens in the KV cache": lambda sizes: sizes.num_blocks * _BLOCK,
        f"requests of {length:,} tokens at once": lambda sizes: _at_once(sizes, length),
        "longest prompt and reply": lambda sizes: sizes.context,
        "requests of that length at once": lambda sizes: _at_once(sizes, sizes.context),
        "most sequences in a step": lambda sizes: sizes.scheduler.max_num_seqs,
        "most tokens in a step": lambda sizes: sizes.scheduler.max_batch_tokens,
    }
    return [
        [name, *("-" if plan.sizes is None else f"{value(plan.sizes):,}" for plan in plans)]
        for name, value in rows.items()
    ]


_BLOCK = 16  # tokens of the KV cache, as kernels/attention/kv_cache.py has them, which imports PyTorch


def _at_once(sizes: Any, length: int) -> int:
    return min(int(sizes.scheduler.max_num_seqs), int(sizes.num_blocks) // -(-length // _BLOCK))


def _below(wanted: Wanted, plans: Sequence[ServePlan]) -> Sequence[str]:
    lines = []
    for plan in plans:
        if plan.sizes is None:
            lines.append(f"{plan.card.name}: does NOT fit, short by {plan.short / MIB:,.0f} MiB; what fits:")
            lines += [f"  {part}" for part in plan.change.split("; ")]
        elif wanted.adapters is not None and wanted.asked.adapter_memory_mib is None:
            memory = wanted.settings().adapter_memory_mib
            lines.append(f"{plan.card.name}: fits with --adapter-memory-mib {memory}")
        if plan.card.is_slow:
            lines.append(f"{plan.card.name}: our kernels do without its tensor cores, so only small bases make sense")
    if wanted.base.sizes.form is None:
        lines.append("its layers run one by one, which is slower, and the work of a step is an estimate")
    lines.append("what CUDA and libraries take, and what CUDA tells of a card's memory, are estimates from reports;")
    return [*lines, "the rest is counted as a server takes it"]


def _number(value: int | None, unit: int) -> str:
    return "-" if value is None else f"{value / unit:,.0f}"


def _in_json(spec: str, wanted: Wanted, plans: Sequence[ServePlan]) -> dict[str, Any]:
    base = wanted.base
    return {
        "base": {
            "name": spec,
            "parameters": base.parameters,
            "nf4_bytes": base.nf4,
            "head_bytes": base.head,
            "other_bytes": base.others,
            "context": base.sizes.context,
            "token_bytes": base.sizes.kv.token_bytes,
            "adapter_bytes": wanted.adapter_bytes,
            "whole_step": base.sizes.form is not None,
        },
        "cards": [
            {
                "name": plan.card.name,
                "total_bytes": plan.card.total,
                "libraries_bytes": plan.card.libraries,
                "fits": plan.sizes is not None,
                "short_bytes": plan.short,
                "change": plan.change,
                "sizes": None if plan.sizes is None else _sizes_in_json(wanted, plan.sizes),
            }
            for plan in plans
        ],
    }


def _sizes_in_json(wanted: Wanted, sizes: Any) -> dict[str, Any]:
    taken = {
        f"{name}_bytes": getattr(sizes, name) for name in ("workspace", "graphs", "arena", "cache", "tokens", "left")
    }
    scheduler = dataclasses.asdict(sizes.scheduler)
    return {
        **taken,
        "adapters": sizes.arena // wanted.adapter_bytes,
        "kv_tokens": sizes.num_blocks * _BLOCK,
        "context": sizes.context,
        "default_max_tokens": sizes.reply,
        "requests": _at_once(sizes, wanted.context),
        "max_num_seqs": scheduler["max_num_seqs"],
        "max_batch_tokens": scheduler["max_batch_tokens"],
    }


app = settings_app(
    PlanServeConfig,
    plan,
    epilog="""\
Examples:

    loramux plan serve Qwen/Qwen3-8B --card 24GiB --adapters 50 --rank 16
    loramux plan serve --config loramux.toml --card "RTX 4090,H100" --context 8192
    loramux plan serve ./my-base --json""",
)
