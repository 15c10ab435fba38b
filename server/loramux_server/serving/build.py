"""Builds a server from its settings: the only place where base, adapters, engine and API are put together."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from fastapi import FastAPI

from loramux_adapters.errors import MemoryShort
from loramux_adapters.lora.host_cache import HostCache
from loramux_adapters.memory import resident_bytes as process_bytes
from loramux_adapters.memory import returning_memory
from loramux_adapters.store.quarantine import in_short
from loramux_adapters.store.store import AdapterStore
from loramux_server.access.access_file import AccessFile
from loramux_server.access.audit_file import AuditFile
from loramux_server.api.app import create_app
from loramux_server.api.http.dependencies import Dependencies, Keys, Limits, ServedBase
from loramux_server.base.device import device_of
from loramux_server.base.loader import BaseModel, load_base_model, resident_bytes
from loramux_server.base.source import BaseSource
from loramux_server.base.tokenizer import BaseTokenizer
from loramux_server.config.environment import cache_dir_of, kernels_of
from loramux_server.config.serve import ServeConfig, is_loopback
from loramux_server.engine.build import DeviceSide
from loramux_server.engine.client import EngineClient
from loramux_server.engine.inbox import Inbox
from loramux_server.errors import ConfigError, RequestError
from loramux_server.grammar.grammars import Grammars
from loramux_server.hub.hub_name import PREFIX
from loramux_server.kernels.attention.kv_cache import KVShape
from loramux_server.kernels.attention.paged_attention import probe_kv_shape
from loramux_server.kernels.choice import choose_kernels
from loramux_server.kernels.gpu.step.form import DecoderForm
from loramux_server.metrics.gauges import GaugeReadings
from loramux_server.metrics.metrics import Metrics
from loramux_server.publishing.preload import preload
from loramux_server.publishing.proof import Prover
from loramux_server.serving.adapter_lifecycle import AdapterLifecycle, CountedCheck, original_for_adapters, pin_bytes
from loramux_server.serving.device_sizes import MIB, BaseSizes, Room, Sizes, sizes_of
from loramux_server.serving.loop_pauses import LoopPauses
from loramux_server.serving.memory_plan import summary
from loramux_server.serving.startup import Stages
from loramux_server.wire.connections import Connections


@dataclass(frozen=True, slots=True)
class BuiltServer:
    """A built server, as `loramux serve` runs it. Its methods are called on the event loop."""

    app: FastAPI
    name: str
    summary: Sequence[str]
    stages: Stages
    preload: Callable[[], None] | None
    client: EngineClient
    store: AdapterStore
    host_cache: HostCache
    lifecycle: AdapterLifecycle
    grammars: Grammars
    pauses: LoopPauses

    @property
    def models(self) -> Sequence[str]:
        """Names a client can ask for: the base first, then the adapters."""
        return [self.name, *(record.name for record in self.store.records() if record.name != self.name)]

    async def start(self) -> None:
        """Adapters to preload are tried on the running engine, as uploads are, before anybody can ask for them."""
        with self.stages.stage("start the engine"):
            await self.client.start()
            self.lifecycle.start()
        if self.preload is not None:
            with self.stages.stage("try and publish the adapters to preload"):
                await asyncio.to_thread(self.preload)
        gc.freeze()  # what is here now stays: a search through it for garbage stops every thread for long
        self.pauses.start(asyncio.get_running_loop())

    @property
    def running(self) -> int:
        """Replies that are not finished."""
        return self.client.running

    async def drain(self, timeout: float) -> int:
        return await self.client.drain(timeout)

    async def stop(self) -> None:
        self.pauses.stop()
        await asyncio.to_thread(self.lifecycle.stop)
        await self.client.drain(0.0)
        self.grammars.close()
        self.host_cache.close()
        self.store.close()


def build(config: ServeConfig, source: BaseSource, stages: Stages, connections: Connections) -> BuiltServer:
    """Loads the base and puts everything around it. Slow; run it beside the event loop.

    `source` is the base that was found. `connections` are those of the port, for the metrics and to refuse requests
    that are too many.

    Raises:
        BaseModelError, ConfigError: the base, or the memory given to it, cannot serve.
        AdapterError: the store or an adapter to preload cannot be used.
    """
    device = device_of(config.device, stages.note)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    cache_dir = cache_dir_of(config.cache_dir, os.environ)
    kernels = choose_kernels(device, kernels_of(os.environ))
    with stages.stage("load the base"), returning_memory():
        base = load_base_model(
            source,
            device=device,
            cache_dir=cache_dir,
            report=stages.note,
            kernels=kernels,
            vectors=config.adapter_vectors,
        )
        shape = probe_kv_shape(base.model, device, whole_numbers=kernels.whole_numbers)
        tokenizer = BaseTokenizer(
            base.tokenizer,
            getattr(base.model, "generation_config", None),
            base.vocabulary,
            special_in_messages=config.special_tokens_in_messages,
        )
    name = config.served_model_name or base.name
    if config.hub_adapter_list and f"{name}:" == PREFIX:
        raise ConfigError(
            f"with --hub-adapters the base cannot be called {name}: {PREFIX} begins the names of adapters on a hub; "
            "give --served-model-name"
        )
    metrics = Metrics(config.metrics_adapter_labels)
    with stages.stage("open the adapter store"):
        store = AdapterStore(
            config.adapter_dir,
            reserved_names=[name],
            served_base_id=base.base_id,
            keep_versions=config.keep_versions,
            pin_bytes=pin_bytes(config),
        )
        audit = AuditFile(config.adapter_dir)
        store.tell_changed(audit.changed)
        if (set_aside := in_short(store.quarantined())) is not None:
            stages.note(set_aside)
    try:
        sizes = _sizes(config, base, shape)
        with stages.stage("check the base through the engine's own path"):
            parts = Parts.build(config, base, shape, store, metrics, sizes, stages.progress)
        original = original_for_adapters(base.source.directory, base.names.whole_tensors)
        info = replace(base.info(tokenizer.encoder), token_bytes=sizes.tokens)
        check = CountedCheck(info, sizes.max_rank, metrics, original)

        def build_prover(forget: Callable[[str], None]) -> Prover:
            return Prover(
                parts.client.generate,
                parts.host_cache.holding,
                lambda version: parts.client.residency(version) == "device",
                forget,
                metrics,
                base_id=base.base_id,
                numerics_id=parts.device.numerics_id,
                vocabulary=base.vocabulary,
                context=sizes.context,
                timeout=config.proof_timeout,
            )

        lifecycle = AdapterLifecycle.build(
            config, store, parts.host_cache, parts.inbox, check, metrics, build_prover, rows=parts.device.slots.rows
        )
    except BaseException:
        store.close()
        raise
    with stages.stage("read the base's tokens for shapes of replies"):
        grammars = Grammars(tokenizer)
        with suppress(RequestError):  # a base that cannot be held to shapes: whoever asks for one is told
            grammars.prepare()
    app = create_app(
        Dependencies(
            engine=parts.client,
            store=store,
            tokenizer=tokenizer,
            pins=lifecycle.pins,
            check=check,
            prove=lifecycle.prover.prove,
            publish=lifecycle.publisher.publish,
            grammars=grammars,
            metrics=metrics,
            base=ServedBase(
                name=name,
                base_id=base.base_id,
                context=sizes.context,
                reply=sizes.reply,
                created=int(time.time()),
            ),
            keys=Keys(
                config.api_key,
                config.admin_key,
                check_host=is_loopback(config.host),
                allowed_hosts=config.allowed_host_list,
                file=AccessFile(config.adapter_dir),
                audit=audit,
            ),
            limits=Limits(
                upload_bytes=config.max_upload_mib * MIB,
                stall_seconds=config.stall_timeout,
                body_rate=config.pace.bytes_per_second,
                upload_seconds=config.upload_timeout,
                request_seconds=config.request_timeout,
            ),
            lora_path_root=lifecycle.lora_path_root,
            special_in_prompts=config.special_tokens_in_prompts,
            connections=connections,
            cors_origins=config.cors_origin_list,
            hub=lifecycle.hub,
        )
    )
    overhead = _overhead(parts, base)
    metrics.read_gauges_from(_gauge_readings(parts, resident_bytes(base.model), overhead))
    metrics.read_connections_from(connections.readings)
    return BuiltServer(
        app=app,
        name=name,
        summary=summary(config, base, parts.device, sizes, overhead),
        stages=stages,
        preload=None
        if config.preload is None
        else partial(preload, store, lifecycle.publisher, config.preload, stages.note),
        client=parts.client,
        store=store,
        host_cache=parts.host_cache,
        lifecycle=lifecycle,
        grammars=grammars,
        pauses=LoopPauses(metrics.loop_paused),
    )


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything between the store and the API."""

    device: DeviceSide
    host_cache: HostCache
    inbox: Inbox
    client: EngineClient

    @classmethod
    def build(
        cls,
        config: ServeConfig,
        base: BaseModel,
        shape: KVShape,
        store: AdapterStore,
        metrics: Metrics,
        sizes: Sizes,
        progress: Callable[[str], None],
    ) -> Parts:
        inbox = Inbox(config.max_waiting)
        host_cache = HostCache(
            partial(store.load, convert=base.kernels.convert, weights=base.weights),
            config.host_cache_mib * MIB,
            on_ready=inbox.wake,
            observer=metrics.host_cache(),
        )
        try:
            device = DeviceSide.build(
                base,
                shape,
                host_cache.get,
                config=sizes.scheduler,
                arena_rows=sizes.arena_rows,
                num_blocks=sizes.num_blocks,
                context=sizes.context,
                graph_bytes=sizes.graphs,
                progress=progress,
            )
        except MemoryShort as error:
            host_cache.close()
            raise ConfigError(
                f"{error}, {sizes.workspace / MIB:,.0f} MiB for the work of a step beside them; lower "
                f"--device-memory-mib, which is {(sizes.arena + sizes.cache) // MIB} here"
            ) from error
        except BaseException:
            host_cache.close()
            raise
        engine = device.engine(
            host_cache,
            inbox,
            metrics,
            kept_blocks=sizes.kept_blocks,
            token_bytes=sizes.tokens,
            watchdog_timeout=config.watchdog_timeout,
        )
        return cls(device, host_cache, inbox, EngineClient(engine, in_host=host_cache.holds))

    def pools(self, base_bytes: int) -> dict[str, int]:
        """Bytes held, by what they are held for."""
        return {
            "base": base_bytes,
            "adapter_device": self.device.slots.held_bytes,
            "adapter_host": self.host_cache.stats().nbytes,
            "adapter_tokens": self.device.slots.token_bytes(elsewhere=self.host_cache.holds),
            "kv": self.device.cache.held_bytes(max(self.client.stats().kv_blocks_peak, self.device.checked.blocks)),
        }


def _sizes(config: ServeConfig, base: BaseModel, shape: KVShape) -> Sizes:
    """Raises ConfigError: they do not fit on the device."""
    memory = base.device.memory()
    form = DecoderForm.of_skeleton(base.model) if base.kernels.name == "triton" else None
    return sizes_of(
        config,
        BaseSizes(
            base.linears,
            shape,
            base.context_length,
            form,
            vectors=config.adapter_vectors and not base.device.is_host,
        ),
        Room(memory.total, memory.free, base.device.sizes),
        reply=config.default_max_tokens,
        max_background_tokens=config.proof_tokens,
        max_prefetch_bytes=config.host_cache_mib * MIB - pin_bytes(config),
    )


def _overhead(parts: Parts, base: BaseModel) -> int:
    """Bytes of this process that are in none of the pools: libraries, tokenizer, working memory of a full step.

    Measured when the checks have run full batches and before the first request; 0 where the system does not tell.
    """
    pools = parts.pools(resident_bytes(base.model))
    on_host = pools["adapter_host"]
    ours = on_host + base.device.in_process(sum(pools.values()) - on_host)
    return max(0, process_bytes() - ours)


def _gauge_readings(parts: Parts, base_bytes: int, overhead: int) -> Callable[[], GaugeReadings]:
    """What the gauges show, read at each scrape."""

    def read() -> GaugeReadings:
        stats, host = parts.client.stats(), parts.host_cache.stats()
        return GaugeReadings(
            running=stats.running,
            waiting=stats.waiting,
            kv_blocks_used=stats.kv_blocks_used,
            kv_blocks_kept=stats.kv_blocks_kept,
            kv_blocks=stats.kv_blocks_total,
            adapters_device=len(stats.resident),
            slot_rows=stats.slot_rows_total,
            device_versions=stats.resident,
            waiting_by_adapter=stats.waiting_by_adapter,
            lookups={
                ("device", "hit"): stats.slot_hits,
                ("device", "miss"): stats.slot_misses,
                ("host", "hit"): host.hits,
                ("host", "miss"): host.misses,
            },
            adapters_host=host.entries,
            pool_bytes=parts.pools(base_bytes) | {"overhead": overhead},
            base_bytes=base_bytes,
        )

    return read
