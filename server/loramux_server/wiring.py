"""Builds a server from its settings: the only place where base, adapters, engine and API are put together."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from fastapi import FastAPI
from transformers.utils import logging as transformers_logging

from loramux_adapters.base_info import BaseInfo
from loramux_adapters.host_cache import HostCache
from loramux_adapters.lora_linear import AdapterSlots, head_path, row_bytes
from loramux_adapters.memory import resident_bytes as process_bytes
from loramux_adapters.memory import returning_memory
from loramux_adapters.ops import select_add_lora
from loramux_adapters.slots import SMALLEST_RANK, SlotTable
from loramux_adapters.store import AdapterStore
from loramux_adapters.verify import Checked, check_adapter
from loramux_server.api.app import create_app
from loramux_server.api.deps import Base, Deps, Keys, Limits
from loramux_server.api.ports import CheckPort
from loramux_server.base.loader import BaseModel, load_base_model, resident_bytes
from loramux_server.base.tokenizer import BaseTokenizer
from loramux_server.config import ServeConfig, is_loopback
from loramux_server.engine.attention import probe_kv_shape, select_attend
from loramux_server.engine.client import EngineClient
from loramux_server.engine.engine import Engine
from loramux_server.engine.inbox import Inbox
from loramux_server.engine.kv_blocks import KVBlocks
from loramux_server.engine.kv_cache import BLOCK_SIZE, KVCache, KVShape
from loramux_server.engine.model_runner import ModelRunner
from loramux_server.engine.scheduler import Scheduler, SchedulerConfig
from loramux_server.engine.start_check import Checker, StartCheck
from loramux_server.errors import BaseModelError, ConfigError
from loramux_server.metrics import Levels, Metrics
from loramux_server.preload import preload
from loramux_server.startup import Stages
from loramux_server.wiring_summary import MIB, summary


@dataclass(frozen=True, slots=True)
class Server:
    """A built server, as `cli_serve` runs it. Its methods are called on the event loop."""

    app: FastAPI
    models: Sequence[str]
    summary: Sequence[str]
    client: EngineClient
    store: AdapterStore
    host_cache: HostCache

    async def start(self) -> None:
        await self.client.start()

    async def drain(self, timeout: float) -> None:
        await self.client.drain(timeout)

    async def stop(self) -> None:
        await self.client.drain(0.0)
        self.host_cache.close()
        self.store.close()


def build(config: ServeConfig, stages: Stages) -> Server:
    """Loads the base and puts everything around it. Slow; run it beside the event loop.

    Raises:
        BaseModelError, ConfigError: the base, or the memory given to it, cannot serve.
        AdapterError: the store or an adapter to preload cannot be used.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    device = _device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    cache_dir = config.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loramux"
    with stages.stage("load the base"), returning_memory():
        base = load_base_model(config.base, device=device, cache_dir=cache_dir, report=stages.note)
        shape = probe_kv_shape(base.model, device)
    name = config.served_model_name or base.name
    metrics = Metrics(config.metrics_adapter_labels)
    with stages.stage("open the adapter store"):
        store = AdapterStore(config.adapter_dir, reserved_names=[name], served_base_id=base.base_id)
    rows = _arena_rows(config, base)
    max_rank = min(config.max_lora_rank, 1 << (rows.bit_length() - 1))
    try:
        if config.preload is not None:
            with stages.stage("publish the adapters to preload"):
                preload(store, config.preload, base.info(), max_rank, note=stages.note)
        with stages.stage("check the base through the engine's own path"):
            parts = Device.build(config, base, shape, store, metrics, rows)
    except BaseException:
        store.close()
        raise
    tokenizer = BaseTokenizer(base.tokenizer, getattr(base.model, "generation_config", None), _vocabulary(base))
    context = min(config.max_model_len, base.context_length, parts.cache.num_blocks * BLOCK_SIZE)
    app = create_app(
        Deps(
            engine=parts.client,
            store=store,
            tokenizer=tokenizer,
            check=_checker(base.info(), max_rank),
            metrics=metrics,
            base=Base(name=name, base_id=base.base_id, context=context, created=int(time.time())),
            keys=Keys(config.api_key, config.admin_key, check_host=is_loopback(config.host)),
            limits=Limits(upload_bytes=config.max_upload_mib * MIB, request_seconds=config.request_timeout),
        )
    )
    adapters = [record.name for record in store.records() if record.name != name]
    metrics.registered(adapters)
    overhead = _overhead(parts, base)
    metrics.read_levels_from(_levels(parts, resident_bytes(base.model), overhead))
    return Server(
        app=app,
        models=[name, *adapters],
        summary=summary(config, base, parts, context, overhead),
        client=parts.client,
        store=store,
        host_cache=parts.host_cache,
    )


@dataclass(frozen=True, slots=True)
class Device:
    """Everything between the store and the API."""

    slots: AdapterSlots
    cache: KVCache
    host_cache: HostCache
    client: EngineClient
    checked: StartCheck
    attention_kernel: str
    lora_kernel: str

    @classmethod
    def build(
        cls, config: ServeConfig, base: BaseModel, shape: KVShape, store: AdapterStore, metrics: Metrics, rows: int
    ) -> Device:
        attend, tiled, attention_kernel = select_attend(base.device, shape)
        add_lora, lora_kernel = select_add_lora(base.device, shape.dtype)
        try:
            slots = AdapterSlots(base.model, rows, add_lora, head=head_path(base.model))
            cache = KVCache(shape, _num_blocks(config, shape), base.device, tiled=tiled)
        except (MemoryError, RuntimeError) as error:
            raise ConfigError(
                f"there is no room on {base.device} for --adapter-memory-mib {config.adapter_memory_mib} and "
                f"--kv-cache-mib {config.kv_cache_mib}; lower one of them"
            ) from error
        inbox = Inbox(config.max_waiting)
        host_cache = HostCache(
            store.load, config.host_cache_mib * MIB, on_ready=inbox.wake, observer=metrics.host_cache()
        )
        runner = ModelRunner(
            base.model, slots=slots, cache=cache, attend=attend, host_adapter=host_cache.get, device=base.device
        )
        try:
            checked = Checker(
                runner,
                slots,
                base.model,
                vocabulary=_vocabulary(base),
                num_blocks=cache.num_blocks,
                rows=config.max_num_seqs,
            ).run()
        except BaseException:
            host_cache.close()
            raise
        scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_batch_tokens=config.max_batch_tokens,
                max_prefetch_bytes=config.host_cache_mib * MIB,
            ),
            KVBlocks(cache.num_blocks, BLOCK_SIZE),
            SlotTable(slots.rows),
            host_cache,
        )
        engine = Engine(scheduler, runner, inbox, metrics, watchdog_timeout=config.watchdog_timeout)
        client = EngineClient(engine, in_host=host_cache.holds)
        return cls(slots, cache, host_cache, client, checked, attention_kernel, lora_kernel)

    def pools(self, base_bytes: int) -> dict[str, int]:
        """Bytes held, by what they are held for."""
        return {
            "base": base_bytes,
            "adapter_device": self.slots.held_bytes,
            "adapter_host": self.host_cache.stats().nbytes,
            "kv": self.cache.held_bytes(max(self.client.stats().kv_blocks_peak, self.checked.blocks)),
        }


def _overhead(device: Device, base: BaseModel) -> int:
    """Bytes of this process that are in none of the pools: libraries, tokenizer, working memory of a full step.

    Measured when the checks have run full batches and before the first request; 0 where the system does not tell.
    """
    pools = device.pools(resident_bytes(base.model))
    ours = sum(pools.values()) if base.device.type == "cpu" else pools["adapter_host"]
    return max(0, process_bytes() - ours)


def _levels(device: Device, base_bytes: int, overhead: int) -> Callable[[], Levels]:
    """What the gauges show, read at each scrape."""

    def read() -> Levels:
        stats, host = device.client.stats(), device.host_cache.stats()
        return Levels(
            running=stats.running,
            waiting=stats.waiting,
            kv_blocks_used=stats.kv_blocks_used,
            kv_blocks=stats.kv_blocks_total,
            adapters_device=len(stats.resident),
            slot_rows=stats.slot_rows_total,
            device_versions=stats.resident,
            waiting_adapters=stats.waiting_adapters,
            adapters_host=host.entries,
            pool_bytes=device.pools(base_bytes) | {"overhead": overhead},
            base_bytes=base_bytes,
        )

    return read


def _device(wanted: str) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and available) else "cpu")


def _arena_rows(config: ServeConfig, base: BaseModel) -> int:
    """Rank rows that fit into the memory given to adapters, a multiple of the smallest slot."""
    row = row_bytes(dict(base.linears))
    rows = config.adapter_memory_mib * MIB // row // SMALLEST_RANK * SMALLEST_RANK
    if rows == 0:
        raise ConfigError(
            f"--adapter-memory-mib {config.adapter_memory_mib} holds no adapter: rank {SMALLEST_RANK} on every layer "
            f"of this base takes {row * SMALLEST_RANK / MIB:.1f} MiB"
        )
    return rows


def _num_blocks(config: ServeConfig, shape: KVShape) -> int:
    blocks = config.kv_cache_mib * MIB // shape.block_bytes
    if blocks == 0:
        raise ConfigError(f"--kv-cache-mib {config.kv_cache_mib} holds not even {BLOCK_SIZE} tokens of this base")
    return blocks


def _vocabulary(base: BaseModel) -> int:
    """Ids that have an embedding."""
    embedding = base.model.get_input_embeddings()  # type: ignore[operator]
    size = int(embedding.num_embeddings)
    if size < 1:
        raise BaseModelError("the base has no token embeddings")
    return size


def _checker(base: BaseInfo, max_rank: int) -> CheckPort:
    """The upload check, bound to the base that is served."""

    def check(directory: Path, *, force: bool) -> Checked:
        return check_adapter(directory, base, max_rank, force=force)

    return check
