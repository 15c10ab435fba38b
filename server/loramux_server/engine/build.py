"""Puts an engine together around a base: what lies on the device, checked on it, then the loop that drives it.

Servers and local engines are built here alike, so they run the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from loramux_adapters.errors import MemoryShort
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.lora_linear import AdapterSlots, head_path
from loramux_adapters.lora.slots import UNBOUNDED, SlotTable
from loramux_server.base.loader import BaseModel
from loramux_server.engine.engine import Engine, EngineMetrics
from loramux_server.engine.inbox import Inbox
from loramux_server.engine.model_runner import ModelRunner
from loramux_server.engine.scheduling.admission import HostView, SchedulerConfig
from loramux_server.engine.scheduling.kv_blocks import KVBlocks
from loramux_server.engine.scheduling.scheduler import Scheduler
from loramux_server.engine.start_check import NOT_CHECKED, Checker, StartCheck
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache, KVShape
from loramux_server.kernels.choice import Kernels, choose_kernels
from loramux_server.kernels.decoder.whole_step import StepLimits
from loramux_server.kernels.numerics import numerics_id


@dataclass(frozen=True, slots=True)
class DeviceSide:
    """What lies on the device around a base, and what runs there.

    Attributes:
        config: the scheduler's limits, for which there is room.
        checked: what the checks at start found.
        kernels: those in use.
        numerics_id: what decides the bits of a reply besides base and adapter.
    """

    slots: AdapterSlots
    cache: KVCache
    runner: ModelRunner
    config: SchedulerConfig
    checked: StartCheck
    kernels: Kernels
    numerics_id: str

    @classmethod
    def build(
        cls,
        base: BaseModel,
        shape: KVShape,
        host_adapter: Callable[[str], HostAdapter | None],
        *,
        config: SchedulerConfig,
        arena_rows: int,
        num_blocks: int,
        context: int | None = None,
        graph_bytes: int = 1 << 30,
        check: bool = True,
        progress: Callable[[str], None] = lambda line: None,
    ) -> DeviceSide:
        """Takes the memory and runs the checks. The model is the runner's own from now on.

        Args:
            shape: of the base's keys and values, from `probe_kv_shape`.
            host_adapter: gives a version that is held in host memory, or None if it no longer is.
            config: the scheduler's limits, from which the largest step follows.
            arena_rows: rank rows of the adapters' memory.
            num_blocks: blocks of the KV cache.
            context: most tokens of a sequence; None: what the base was built for, as far as the cache holds it.
            graph_bytes: that graphs of decode steps may take on the device, where there are such.
            progress: told a line at a time.
            check: False for what serves nobody and is only compared with: nothing is known of it then.
        Raises:
            MemoryShort: there is no room for them.
            BaseModelError: the base does not give transformers' own answers on this path.
        """
        kernels = choose_kernels(base.device, base.kernels.name, shape)
        try:
            slots = AdapterSlots(
                base.model,
                arena_rows,
                kernels.add_lora,
                kernels.copy_slot,
                head=head_path(base.model),
                device=base.device,
                module_of=base.module_of,
                affine=base.weights is not None and base.weights.vectors,
            )
            cache = KVCache(shape, num_blocks, base.device, spare=kernels.spare_block)
            longest = -(-(context or base.context_length) // BLOCK_SIZE)
            limits = limits_of(config, min(num_blocks, longest), graph_bytes)
            runner = ModelRunner(
                base.model,
                slots=slots,
                cache=cache,
                kernels=kernels,
                host_adapter=host_adapter,
                device=base.device,
                limits=limits,
                progress=progress,
            )
        except (MemoryError, RuntimeError) as error:
            raise MemoryShort(
                f"there is no room on {base.device} for a cache of {num_blocks * BLOCK_SIZE} tokens and adapters of "
                f"{arena_rows} ranks together"
            ) from error
        numerics = numerics_id(base.model, base.device, kernels, runner.decoder)
        checked = NOT_CHECKED
        if check:
            checked = Checker(
                runner,
                slots,
                base.model,
                vocabulary=base.vocabulary,
                num_blocks=num_blocks,
                config=config,
                device=base.device,
            ).run()
        config = replace(config, long_from=runner.long_from)
        return cls(slots, cache, runner, config, checked, kernels, numerics)

    def engine(
        self,
        host: HostView,
        inbox: Inbox,
        metrics: EngineMetrics,
        *,
        kept_blocks: int,
        token_bytes: int = UNBOUNDED,
        watchdog_timeout: float = 60.0,
    ) -> Engine:
        """The one engine of this device. Everything on it belongs to the engine's thread from now on.

        Args:
            host: where the scheduler has adapters loaded, the same that `host_adapter` reads.
            kept_blocks: blocks of the cache that may be kept for their content while no sequence uses them.
            token_bytes: that the adapters on the device may have together of rows of their own for tokens.
            watchdog_timeout: seconds for one step.
        """
        blocks = KVBlocks(self.cache.num_blocks, BLOCK_SIZE, max_kept=kept_blocks)
        slots = SlotTable(self.slots.rows, token_bytes, on_gone=self.slots.forget)
        scheduler = Scheduler(self.config, blocks, slots, host)
        return Engine(scheduler, self.runner, inbox, metrics, watchdog_timeout=watchdog_timeout)


def limits_of(config: SchedulerConfig, blocks: int, graph_bytes: int = 0) -> StepLimits:
    """The largest step that a scheduler asks for; `blocks` of the KV cache are the most of one sequence."""
    sequences = config.max_num_seqs + config.max_background_tokens
    rows = config.max_batch_tokens + 1  # the first background sequence has its turn in a full step too
    return StepLimits(
        rows=rows,
        samples=min(rows, sequences + config.max_scored_tokens),
        sequences=min(rows, sequences),
        blocks=blocks,
        adapters=config.max_adapters,
        ranks=config.max_ranks,
        graph_bytes=graph_bytes,
    )
