"""How much fits where, and what a server prints of it when it is up: memory, kernels, what was checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from loramux_adapters.device.device import Device
from loramux_adapters.lora.lora_linear import affine_bytes
from loramux_adapters.lora.slots import SMALLEST_RANK
from loramux_server.base.loader import BaseModel, resident_bytes
from loramux_server.config.serve import ServeConfig
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.kernels.choice import Kernels, why_not_compiled
from loramux_server.kernels.layers.nf4_linear import four_bit_layers, why_no_kernel
from loramux_server.kernels.numerics import kernel_paths
from loramux_server.serving.device_sizes import MIB, Sizes

if TYPE_CHECKING:
    from loramux_server.engine.build import DeviceSide
    from loramux_server.engine.model_runner import ModelRunner

SHOWN_SECONDS = 0.05  # of a part of loading; less is no news


def how_a_step_runs(runner: ModelRunner) -> str:
    if runner.decoder is not None:
        return runner.decoder.in_words
    return f"a step is run module by module, because {runner.why_by_modules}"


def notes_on_steps(runner: ModelRunner) -> tuple[str, ...]:
    """Lines on graphs, and on kernels that are wrong on this device: why, and what runs instead at what cost."""
    return () if runner.decoder is None else runner.decoder.notes


def unpacked_layers(model: nn.Module) -> list[str]:
    """A line on the layers of a base in NF4 that the compiled kernels cannot take; none where there are no such."""
    odd = [(path, why) for path, layer in four_bit_layers(model) if (why := why_no_kernel(layer))]
    if not odd:
        return []
    path, why = odd[0]
    return [f"{len(odd)} layers have no compiled kernel and are slow; {path}: {why}"]


def summary(config: ServeConfig, base: BaseModel, device: DeviceSide, sizes: Sizes, overhead: int) -> list[str]:
    """The memory table, the kernels in use and what was checked."""
    invariance = (
        "checked here: a reply is the same, bit for bit, alone or in any batch"
        if device.checked.batch_invariant
        else "NOT given here: a reply may differ in the last bits with what else is in its batch"
    )
    return [
        "",
        f"base id  {base.base_id}",
        *memory_table(base, sizes, config.host_cache_mib * MIB, overhead),
        f"steps    up to {sizes.scheduler.max_num_seqs} sequences and {sizes.scheduler.max_batch_tokens:,} tokens",
        f"device   {base.device.report()}; {how_a_step_runs(device.runner)}",
        *(f"  {line}" for line in notes_on_steps(device.runner)),
        *(f"  {line}" for line in compiled_lines(device.kernels, base.device)),
        *(f"  {line}" for line in _by_modules(base, device)),
        f"batch    {invariance}",
        "loading  the base, part by part",
        *(f"  {what:<24} {seconds:>8.1f} s" for what, seconds in base.stages if seconds >= SHOWN_SECONDS),
    ]


def _by_modules(base: BaseModel, device: DeviceSide) -> list[str]:
    """The kernels behind a base's modules. On a card a whole step has all of its own, whatever modules would run on."""
    if device.runner.decoder is not None and not base.device.is_host:
        return []
    return [
        *kernel_paths(base.model, base.device).split("; "),
        *(unpacked_layers(base.model) if device.kernels.isa else []),
        f"attention {device.kernels.attention}",
        f"LoRA {device.kernels.lora} (stacks bf16, sums fp32)",
    ]


def memory_table(base: BaseModel, sizes: Sizes, host_cache: int, overhead: int) -> list[str]:
    """Who gets how much; where the device has memory of its own, that and the host's are added up apart.

    Args:
        host_cache: bytes for adapters in host memory, at most.
        overhead: bytes of this process that are in none of the other lines.
    """
    nf4, row = resident_bytes(base.model), sizes.arena // sizes.arena_rows
    full = sizes.num_blocks // -(-sizes.context // BLOCK_SIZE)
    reserved = not base.device.is_host and base.weights is not None and base.weights.vectors
    layers = "with DoRA or biases" if reserved else "on every layer"
    in_host = [
        ("adapters in host memory", host_cache, "up to"),
        ("everything else", overhead, "libraries, tokenizer, work of a full step; just measured"),
    ]
    table = [
        (
            "base in NF4",
            nf4,
            f"{base.bytes_16bit / MIB:,.0f} MiB in 16 bit, {base.bytes_16bit / nf4:.1f} times as much",
        ),
        (
            "KV cache",
            sizes.cache,
            f"up to; {sizes.num_blocks * BLOCK_SIZE:,} tokens, {full} requests of the full {sizes.context:,}",
        ),
        (
            "adapters",
            sizes.arena,
            f"up to; {sizes.arena_rows // 16} of rank 16 {layers}, {16 * row / MIB:.1f} MiB each",
        ),
    ]
    of_tokens = ("tokens of adapters", sizes.tokens, "up to; trained tokens, saved embeddings and output heads")
    if base.device.is_host:
        outputs = sum(shape[1] for shape in base.linears.values())
        size = sizes.arena_rows // SMALLEST_RANK * affine_bytes(outputs)
        table.append(("magnitudes and biases", size, "up to; taken as adapters with DoRA or biases come"))
        table += [of_tokens, *in_host]
        table.append(("together", sum(size for _, size, _ in table), "at most"))
    else:
        steps = sizes.scheduler
        memory = base.device.memory()
        table += [
            (
                "work of a step",
                sizes.workspace,
                f"up to {steps.max_num_seqs} sequences, {steps.max_batch_tokens:,} tokens",
            ),
            ("graphs of steps", sizes.graphs, "up to"),
            of_tokens,
        ]
        together = sum(size for _, size, _ in table)
        table.append(("together", together, f"of {memory.total / MIB:,.0f} MiB on the device"))
        table += in_host
    return [f"  {what:<24} {size / MIB:>8,.0f} MiB  ({note})" for what, size, note in table]


def compiled_lines(kernels: Kernels, device: Device) -> list[str]:
    """What compiled code a base runs on, by its instruction set; on a CPU also why on none, and what to do."""
    return [f"compiled kernels on {kernels.isa.upper()}"] if kernels.isa else why_not_compiled(kernels, device)
