"""`loramux plan`: how much memory a training will take, by QLoRA and by LoRA, before it is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import typer

from loramux_adapters.device.process_memory import in_memory
from loramux_adapters.training.recipe import Recipe
from loramux_server.base.device import check_device
from loramux_server.base.source import check_base, resolve_base
from loramux_server.cli.frame import configure_logging, show, write
from loramux_server.cli.options import settings_app
from loramux_server.cli.screen import print_table
from loramux_server.config.environment import cache_dir_of, quiet_libraries
from loramux_server.config.plan import PlanConfig
from loramux_server.errors import ConfigError
from loramux_server.serving.startup import Stages

if TYPE_CHECKING:
    from loramux_adapters.device.device import Device
    from loramux_adapters.training.run.plan import MemoryPlan

MIB = 2**20
_R = Recipe()


@dataclass(frozen=True, slots=True)
class Memory:
    """What this machine has: bytes that are free, and what the libraries already take of the process."""

    device: str
    free: int
    libraries: int


def plan(config: PlanConfig, ctx: typer.Context) -> int:
    """Say how much memory a training will take, by QLoRA and by LoRA; only the base's config is read."""
    configure_logging("info")  # before bitsandbytes, which logs what it misses when it is imported
    quiet_libraries()
    if config.card is None:
        check_device(config.device)
    elif "," in config.card:
        raise ConfigError(f"--card takes one card at a time for a training, not {config.card!r}")
    check_base(config.base, weights=False)
    cache_dir = cache_dir_of(config.cache_dir, ctx.obj)
    stages = Stages(write)
    with stages.stage("find the base"):
        source = resolve_base(config.base, cache_dir, stages.note, weights=False)
    with stages.imports():
        from loramux_adapters.device.device import ON_CARD
        from loramux_adapters.training.run.plan import kv_bytes, plan_memory
        from loramux_server.base.device import device_of
        from loramux_server.base.loader import skeleton_of
        from loramux_server.base.support import refuse_to_train
        from loramux_server.serving.cards import card_of

    if config.card is not None:
        card = card_of(config.card)
        memory = Memory(f"a card ({card.name})", card.total, 0)  # what its libraries take is in the plan
        layout, fp16 = ON_CARD, False
    else:
        device = device_of(config.device)
        memory, layout = _memory(device), device.layout
        fp16 = str(device.activations) == "torch.float16"

    def planned(recipe: Recipe) -> MemoryPlan:
        return plan_memory(skeleton, recipe, sequence=config.seq, learned=learned, layout=layout, fp16=fp16)

    learned = config.learned or max(1, config.seq // 4)
    with stages.stage("count its layers"):
        base_config, skeleton = skeleton_of(source)
        refuse_to_train(source.name, base_config)
        plans = [planned(config.recipe(quantize)) for quantize in ("nf4", "none")]
    show("")
    for line in _about(config, plans[0]):
        show(line)
    print_table(("MiB", "QLoRA (NF4)", "LoRA (16 bit)"), _rows(*plans), numbers=True)

    for line in [
        *_saved(plans[0]),
        f"serving: {kv_bytes(skeleton.config, layout):,} bytes of KV cache for each token of a prompt or reply",
        *_verdict(config, plans[0], plans[1], memory, planned),
    ]:
        show(line)
    return 0


def _about(config: PlanConfig, qlora: MemoryPlan) -> Sequence[str]:
    share = 100 * qlora.trainable / (qlora.parameters + qlora.trainable)
    return [
        f"{config.base}: {qlora.parameters:,} parameters",
        f"rank {config.rank} trains {qlora.trainable:,} more ({share:.2f} % of all)",
        f"{config.batch} examples of {config.seq} tokens a step"
        + (f", in {config.accumulation} parts" if config.accumulation > 1 else ""),
        "",
    ]


def _rows(qlora: MemoryPlan, lora: MemoryPlan) -> Sequence[Sequence[str]]:
    """What takes how many MiB, by either way; the last row is the sum."""
    parts = [
        ("base weights", qlora.base, lora.base),
        ("adapter, fp32", qlora.adapter, lora.adapter),
        ("gradients", qlora.gradients, lora.gradients),
        ("optimizer moments", qlora.optimizer, lora.optimizer),
        ("activations", qlora.activations, lora.activations),
        ("logits or layer in work", qlora.work, lora.work),
        *([("CUDA itself, about", qlora.context, lora.context)] if qlora.context else []),
        ("together", qlora.total, lora.total),
    ]
    return [[name, f"{left / MIB:,.1f}", f"{right / MIB:,.1f}"] for name, left, right in parts]


def _saved(qlora: MemoryPlan) -> Sequence[str]:
    return [
        "",
        f"the adapter on disk takes {qlora.saved / MIB:,.1f} MiB",
        f"training every weight (Adam, 16 bytes each, without activations) takes {qlora.full / MIB:,.1f} MiB",
        "examples that begin alike and shorter ones take less: these are the activations of full, different ones",
        "",
    ]


def _verdict(config: PlanConfig, qlora: MemoryPlan, lora: MemoryPlan, memory: Memory, again: Any) -> Sequence[str]:
    """Whether it fits, and if not, which change would make it fit."""
    room = memory.free - memory.libraries
    libraries = f"; libraries take {memory.libraries / MIB:,.0f} of them" if memory.libraries else ""
    lines = [f"{memory.device} has {memory.free / MIB:,.0f} MiB free{libraries}"]
    for name, needed in (("QLoRA", qlora.total), ("LoRA", lora.total)):
        fits = "fits" if needed <= room else "does NOT fit"
        lines.append(f"{name} needs {needed / MIB:,.0f} MiB and {fits}")
    if qlora.total <= room:
        return lines
    recipe = config.recipe("nf4")
    parts = 2
    while parts <= recipe.batch_size:
        if again(replace(recipe, accumulation=parts)).total <= room:
            return [*lines, f"--accumulation {parts} makes it fit; the gradients stay the same"]
        parts *= 2
    least = replace(recipe, accumulation=recipe.batch_size, gradient_checkpointing=True)
    if again(least).total <= room:
        return [*lines, f"--accumulation {recipe.batch_size} with --gradient-checkpointing makes it fit"]
    return [*lines, "lower --seq or --rank, or take a smaller base"]


def _memory(device: Device) -> Memory:
    now = device.memory()
    taken = device.in_process(in_memory())  # what this process takes will be free again
    return Memory("this machine" if device.is_host else device.name, now.free + taken, taken)


app = settings_app(
    PlanConfig,
    plan,
    epilog="Example:\n\n    loramux plan --base Qwen/Qwen2.5-7B-Instruct --rank 16 --batch 8 --seq 512",
)
