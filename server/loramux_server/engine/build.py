"""Puts an engine together around a base: what lies on the device, checked on it, then the loop that drives it.

Servers and local engines are built here alike, so they run the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loramux_adapters.errors import MemoryShort
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.lora_linear import AdapterSlots, head_path
from loramux_adapters.lora.slots import SlotTable
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
from loramux_server.kernels.numerics import numerics_id


@dataclass(frozen=True, slots=True)
class DeviceSide:
    """What lies on the device around a base, and what runs there.

    Attributes:
        checked: what the checks at start found.
        kernels: those in use.
        numerics_id: what decides the bits of a reply besides base and adapter.
    """

    slots: AdapterSlots
    cache: KVCache
    runner: ModelRunner
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
        arena_rows: int,
        num_blocks: int,
        max_num_seqs: int,
        check: bool = True,
    ) -> DeviceSide:
        """Takes the memory and runs the checks. The model is the runner's own from now on.

        Args:
            shape: of the base's keys and values, from `probe_kv_shape`.
            host_adapter: gives a version that is held in host memory, or None if it no longer is.
            arena_rows: rank rows of the adapters' memory.
            num_blocks: blocks of the KV cache.
            max_num_seqs: most sequences of a step.
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
            )
            cache = KVCache(shape, num_blocks, base.device)
        except (MemoryError, RuntimeError) as error:
            raise MemoryShort(
                f"there is no room on {base.device} for a cache of {num_blocks * BLOCK_SIZE} tokens and adapters of "
                f"{arena_rows} ranks together"
            ) from error
        runner = ModelRunner(
            base.model, slots=slots, cache=cache, kernels=kernels, host_adapter=host_adapter, device=base.device
        )
        numerics = numerics_id(base.model, base.device, kernels, whole_step=runner.decoder is not None)
        checked = NOT_CHECKED
        if check:
            checked = Checker(
                runner, slots, base.model, vocabulary=base.vocabulary, num_blocks=num_blocks, rows=max_num_seqs
            ).run()
        if runner.graphs is not None:
            runner.graphs.exact = checked.batch_invariant
        return cls(slots, cache, runner, checked, kernels, numerics)

    def engine(
        self,
        config: SchedulerConfig,
        host: HostView,
        inbox: Inbox,
        metrics: EngineMetrics,
        *,
        kept_blocks: int,
        watchdog_timeout: float = 60.0,
    ) -> Engine:
        """The one engine of this device. Everything on it belongs to the engine's thread from now on.

        Args:
            host: where the scheduler has adapters loaded, the same that `host_adapter` reads.
            kept_blocks: blocks of the cache that may be kept for their content while no sequence uses them.
            watchdog_timeout: seconds for one step.
        """
        blocks = KVBlocks(self.cache.num_blocks, BLOCK_SIZE, max_kept=kept_blocks)
        scheduler = Scheduler(config, blocks, SlotTable(self.slots.rows), host)
        return Engine(scheduler, self.runner, inbox, metrics, watchdog_timeout=watchdog_timeout)
