"""What the operator, or whoever builds a scheduler, may set of it."""

from __future__ import annotations

from dataclasses import dataclass

from loramux_server.errors import ConfigError

_AT_LEAST_ONE = ("max_num_seqs", "max_batch_tokens", "max_prefetch", "max_prefetch_bytes", "max_background_tokens")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of the scheduler.

    Attributes:
        max_num_seqs: sequences that run at the same time.
        max_batch_tokens: tokens of one step; decodes always run, prefill gets what they leave.
        max_passed_over: sequences that may start before an older one that lacks a slot or KV blocks; 0 is strict FIFO.
        max_wait_seconds: how long it may be passed over at most, counted from when it was first found blocked.
        max_prefetch: distinct versions that waiting sequences may hold in host memory at the same time.
        max_prefetch_bytes: most that these may take there, or be about to once they are loaded; one is always held,
            whatever its size. What is held cannot be evicted, so it must fit the budget of the host cache.
        max_background_tokens: most tokens of background sequences in one step, and of these sequences at a time.
        max_background_wait_seconds: how long a background sequence gives way before it counts as an ordinary one.
    """

    max_num_seqs: int = 32
    max_batch_tokens: int = 128
    max_passed_over: int = 32
    max_wait_seconds: float = 2.0
    max_prefetch: int = 16
    max_prefetch_bytes: int = 1 << 30
    max_background_tokens: int = 6
    max_background_wait_seconds: float = 5.0

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_passed_over", "max_wait_seconds", "max_background_wait_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} cannot be negative, got {getattr(self, name)}")
