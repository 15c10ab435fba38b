"""How much fits where, and what a server prints of it when it is up: memory, kernels, what was checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from loramux_adapters.device.device import Device
from loramux_adapters.lora.lora_linear import row_bytes
from loramux_adapters.lora.slots import SMALLEST_RANK
from loramux_server.base.loader import BaseModel, resident_bytes
from loramux_server.config.serve import ServeConfig
from loramux_server.errors import ConfigError
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVShape
from loramux_server.kernels.choice import Kernels, why_not_compiled
from loramux_server.kernels.layers.nf4_linear import four_bit_layers, why_no_kernel
from loramux_server.kernels.numerics import kernel_paths

if TYPE_CHECKING:
    from loramux_server.engine.build import DeviceSide
    from loramux_server.engine.model_runner import ModelRunner

MIB = 2**20
SHOWN_SECONDS = 0.05  # of a part of loading; less is no news


def arena_rows(config: ServeConfig, base: BaseModel) -> int:
    """Rank rows that fit into the memory given to adapters, a multiple of the smallest slot."""
    row = row_bytes(dict(base.linears))
    rows = config.arena_mib * MIB // row // SMALLEST_RANK * SMALLEST_RANK
    if rows == 0:
        raise ConfigError(
            f"--adapter-memory-mib {config.arena_mib} holds no adapter: rank {SMALLEST_RANK} on every layer "
            f"of this base takes {row * SMALLEST_RANK / MIB:.1f} MiB"
        )
    return rows


def num_blocks(config: ServeConfig, shape: KVShape) -> int:
    """KV blocks that fit into the memory given to the cache."""
    blocks = config.kv_cache_mib * MIB // shape.block_bytes
    if blocks == 0:
        raise ConfigError(
            f"the {config.kv_cache_mib} MiB that adapters leave of --device-memory-mib hold not even "
            f"{BLOCK_SIZE} tokens of this base"
        )
    return blocks


def kept_blocks(config: ServeConfig, shape: KVShape) -> int:
    """KV blocks that may be kept for their content while no sequence uses them."""
    return config.prefix_cache_mib * MIB // shape.block_bytes


def how_a_step_runs(runner: ModelRunner) -> str:
    if runner.decoder is not None:
        return "a step is one compiled call"
    return f"a step is run module by module, because {runner.why_by_modules}"


def unpacked_layers(model: nn.Module) -> list[str]:
    """A line on the layers of a base in NF4 that the compiled kernels cannot take; none where there are no such."""
    odd = [(path, why) for path, layer in four_bit_layers(model) if (why := why_no_kernel(layer))]
    if not odd:
        return []
    path, why = odd[0]
    return [f"{len(odd)} layers have no compiled kernel and are slow; {path}: {why}"]


def summary(config: ServeConfig, base: BaseModel, device: DeviceSide, context: int, overhead: int) -> list[str]:
    """The memory table, the kernels in use and what was checked."""
    nf4, slots = resident_bytes(base.model), device.slots
    adapter_bytes = slots.rows * slots.row_bytes
    rank16 = 16 * slots.row_bytes
    full = device.cache.num_blocks // -(-context // BLOCK_SIZE)
    table = [
        (
            "base in NF4",
            nf4,
            f"{base.bytes_16bit / MIB:,.0f} MiB in 16 bit, {base.bytes_16bit / nf4:.1f} times as much",
        ),
        (
            "KV cache",
            device.cache.nbytes,
            f"up to; {device.cache.num_blocks * BLOCK_SIZE:,} tokens, {full} requests of the full {context:,}",
        ),
        (
            "adapters",
            adapter_bytes,
            f"up to; {slots.rows // 16} of rank 16 on every layer, {rank16 / MIB:.1f} MiB each",
        ),
        ("adapters in host memory", config.host_cache_mib * MIB, "up to"),
        ("everything else", overhead, "libraries, tokenizer, work of a full step; just measured"),
    ]
    table.append(("together", sum(size for _, size, _ in table), "at most"))
    invariance = (
        "checked here: a reply is the same, bit for bit, alone or in any batch"
        if device.checked.batch_invariant
        else "NOT given here: a reply may differ in the last bits with what else is in its batch"
    )
    return [
        "",
        f"base id  {base.base_id}",
        *(f"  {what:<24} {size / MIB:>8,.0f} MiB  ({note})" for what, size, note in table),
        f"device   {base.device.report()}; {how_a_step_runs(device.runner)}",
        *(f"  {line}" for line in compiled_lines(device.kernels, base.device)),
        *(f"  {path}" for path in kernel_paths(base.model, base.device).split("; ")),
        *(f"  {line}" for line in unpacked_layers(base.model) if device.kernels.isa),
        f"  attention {device.kernels.attention}",
        f"  LoRA {device.kernels.lora} (stacks bf16, sums fp32)",
        f"batch    {invariance}",
        "loading  the base, part by part",
        *(f"  {what:<24} {seconds:>8.1f} s" for what, seconds in base.stages if seconds >= SHOWN_SECONDS),
    ]


def compiled_lines(kernels: Kernels, device: Device) -> list[str]:
    """What compiled code a base runs on, by its instruction set; on a CPU also why on none, and what to do."""
    return [f"compiled kernels on {kernels.isa.upper()}"] if kernels.isa else why_not_compiled(kernels, device)
