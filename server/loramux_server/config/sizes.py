"""Settings that share out a device: how much runs at a time, and in how much memory.

What is not set follows from the device (serving/device_sizes.py).
"""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from loramux_server.config.settings import Settings, setting
from loramux_server.errors import ConfigError


class AsksForSizes(Settings):
    """What `loramux serve` and a plan of it are told of sizes."""

    max_model_len: int | None = setting(
        None,
        "longest prompt and reply together, in tokens",
        group="Capacity",
        between=(16, 1 << 20),
        unset="2048 on a CPU; on a card what the base was built for, as far as the KV cache holds it",
        also=("--context",),
    )
    max_num_seqs: int | None = setting(
        None, "most sequences in one step", group="Capacity", between=(1, 4096), unset="32 on a CPU, 256 on a card"
    )
    max_batch_tokens: int | None = setting(
        None,
        "most tokens in one step, prompts included; at least --max-num-seqs",
        group="Capacity",
        between=(1, 1 << 17),
        unset="128 on a CPU, 2048 on a card",
    )
    device_memory_mib: int | None = setting(
        None,
        "device memory for adapters and the KV cache together, in MiB; the base is not part of it",
        group="Capacity",
        between=(4, 1 << 22),
        unset="2048 on a CPU; on a card 90 % of what the base, the work of a step and its graphs leave",
    )
    graph_memory_mib: int | None = setting(
        None,
        "device memory for steps that are captured as CUDA graphs, in MiB; 0 captures none",
        group="Capacity",
        between=(0, 1 << 16),
        unset="none on a CPU; on a card a 32nd of its memory, at most 2048",
    )
    prefix_cache_mib: int | None = setting(
        None,
        "of the KV cache, most that is kept of requests that have ended, for prompts that begin like theirs, in MiB; "
        "0 keeps nothing",
        group="Capacity",
        between=(0, 1 << 22),
        unset="256 on a CPU; on a card whatever nobody uses",
    )
    adapter_memory_mib: int | None = setting(
        None,
        "of --device-memory-mib, what adapters get, in MiB; the KV cache gets the rest",
        group="Adapters",
        between=(1, 1 << 20),
        unset="a quarter of it",
    )
    token_memory_mib: int | None = setting(
        None,
        "most memory for what adapters change in the embedding and the output head (trained or added tokens, "
        "modules_to_save), in MiB; not part of --device-memory-mib; an adapter that has more is refused",
        group="Adapters",
        between=(0, 1 << 20),
        unset="1024; on a card at most half of what everything else leaves free",
    )
    max_lora_rank: int = setting(256, "largest rank an adapter may have", group="Adapters", between=(1, 4096))
    max_summed_rank: int | None = setting(
        None,
        "most that the ranks of one request's adapters may be together, each rounded up to a power of two of at least "
        "16",
        group="Adapters",
        between=(16, 1 << 15),
        unset="512 on a card, or --max-lora-rank if that is more; on a CPU what the memory of adapters holds",
    )

    adapter_vectors: bool = setting(
        False,
        "on a card, serve adapters that have more than LoRA's two matrices: DoRA's magnitudes, trained biases, (IA)3's "
        "scales; every adapter, with or without them, then takes about a quarter more of --adapter-memory-mib; without "
        "this flag a card refuses such adapters, a CPU serves them always",
        group="Adapters",
    )

    @model_validator(mode="after")
    def _sizes_go_together(self) -> Self:
        memory, arena = self.device_memory_mib, self.adapter_memory_mib
        if memory is not None and arena is not None and arena >= memory:
            raise ConfigError(nothing_for_the_cache(memory, arena))
        tokens, sequences = self.max_batch_tokens, self.max_num_seqs
        if tokens is not None and sequences is not None and tokens < sequences:
            raise ConfigError(
                f"--max-batch-tokens ({tokens}) must be at least --max-num-seqs ({sequences}): every running sequence "
                "adds a token to each step"
            )
        return self


def nothing_for_the_cache(memory_mib: int, arena_mib: int) -> str:
    return (
        f"--device-memory-mib {memory_mib} leaves nothing for the KV cache: --adapter-memory-mib is {arena_mib}; raise "
        "the one or lower the other"
    )
