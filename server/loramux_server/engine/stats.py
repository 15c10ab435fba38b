"""What the engine publishes of itself, for the metrics and for `residency`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot, published once per step.

    Attributes:
        waiting: sequences in the inbox or in the queue.
        kv_blocks_kept: blocks that no sequence uses, kept for prompts that begin alike.
        kv_blocks_peak: most blocks that ever held something at a time.
        slot_rows_used: rank rows held by resident adapters, whether they are in use or not.
        slot_rows_total: rank rows of the device's adapter memory.
        slot_hits, slot_misses: adapters of started sequences that were on the device, and that were not, so far.
        resident: versions on the device.
        waiting_adapters: names that sequences in the queue asked for.
    """

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_kept: int
    kv_blocks_total: int
    kv_blocks_peak: int
    slot_rows_used: int
    slot_rows_total: int
    slot_hits: int
    slot_misses: int
    resident: frozenset[str]
    waiting_adapters: frozenset[str]
