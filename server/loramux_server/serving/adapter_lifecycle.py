"""What adapters need beside the engine from upload to removal, built for one server.

The check and the proof of what comes in, pins, the watched directory, loading from this machine's disk, and the regular
look at what other processes changed in the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from loramux_adapters.artifact.config import HOW_TO_CONVERT
from loramux_adapters.artifact.other_kinds import convert_kind
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterRejected, BaseMismatch
from loramux_adapters.lora.host_cache import HostCache
from loramux_adapters.lora.verify import Checked, check_adapter
from loramux_adapters.store.store import AdapterStore
from loramux_server.access.actor import Actor, acting
from loramux_server.base.originals import original_weights
from loramux_server.config.serve import ServeConfig
from loramux_server.engine.inbox import Inbox
from loramux_server.errors import BaseModelError
from loramux_server.hub.repository import fetch
from loramux_server.metrics.metrics import Metrics
from loramux_server.publishing.hub_adapters import HubAdapters
from loramux_server.publishing.lora_path import LoraPathRoot
from loramux_server.publishing.pins import Pins
from loramux_server.publishing.proof import Prover
from loramux_server.publishing.publisher import Publisher
from loramux_server.publishing.repeated import RepeatedTask
from loramux_server.publishing.watch import DirectoryWatch
from loramux_server.serving.device_sizes import MIB
from loramux_server.serving.residual_adapters import ResidualAdapters

REFRESH_SECONDS = 1.0  # how soon what another process deleted leaves the memories


def pin_bytes(config: ServeConfig) -> int:
    """Host memory that pinned adapters may have: half, so that those that wait for a slot have the other half."""
    return config.host_cache_mib * MIB // 2


class CountedCheck:
    """The check of every adapter that comes in, bound to the base that is served, with its outcomes counted.

    The directory is the server's own: kinds of adapters that can be written as LoRA become so there.
    """

    def __init__(
        self, base: BaseInfo, max_rank: int, metrics: Metrics, original: Callable[[str], torch.Tensor]
    ) -> None:
        """`original`: as `convert_residual` wants it."""
        self._base, self._max_rank, self._metrics = base, max_rank, metrics
        self._residual = ResidualAdapters(base, max_rank, original)

    def __call__(self, directory: Path, *, force: bool = False) -> Checked:
        try:
            convert_kind(directory, self._base.linears, self._max_rank)
            self._residual.convert(directory)
            checked = check_adapter(directory, self._base, self._max_rank, force=force)
        except BaseMismatch:
            self._metrics.verified("base_mismatch")
            raise
        except AdapterRejected:
            self._metrics.verified("rejected")
            raise
        is_forced = checked.base_id is not None and not checked.base_verified
        self._metrics.verified("verified" if checked.base_verified else "forced" if is_forced else "unverified")
        return checked

    def stop(self) -> None:
        """Adapters whose conversion takes long are given up."""
        self._residual.stop()


def original_for_adapters(directory: Path, names: Callable[[str], Iterable[str]]) -> Callable[[str], torch.Tensor]:
    """`original_weights` for adapters that were trained beside a part of them. It raises `AdapterRejected`."""

    def read(path: str) -> torch.Tensor:
        try:
            return original_weights(directory, names)(path)
        except BaseModelError as error:
            raise AdapterRejected(
                [f"converting it takes the base's 16-bit weights, and {error}: {HOW_TO_CONVERT}"]
            ) from error

    return read


@dataclass(frozen=True, slots=True)
class AdapterLifecycle:
    """What is built of it.

    Attributes:
        check: of everything that comes in.
        lora_path_root: what vLLM's calls may load; None: there are no such calls.
        hub: fetches adapters when they are first asked for; None fetches none.
        work: repeated from `start` to `stop`.
    """

    pins: Pins
    prover: Prover
    publisher: Publisher
    check: CountedCheck
    lora_path_root: LoraPathRoot | None
    hub: HubAdapters | None = None
    work: Sequence[RepeatedTask] = field(default_factory=list)

    @classmethod
    def build(
        cls,
        config: ServeConfig,
        store: AdapterStore,
        host_cache: HostCache,
        inbox: Inbox,
        check: CountedCheck,
        metrics: Metrics,
        build_prover: Callable[[Callable[[str], None]], Prover],
        *,
        rows: int,
    ) -> AdapterLifecycle:
        """Raises ConfigError.

        Args:
            build_prover: given what makes a version leave the device.
            rows: rank rows of the device's adapter memory.
        """

        def retire(version: str) -> None:
            host_cache.discard(version)
            inbox.retire(version)

        store.tell_retired(retire)
        prover = build_prover(inbox.retire)
        publisher = Publisher(store, host_cache, check, prover.prove_blocking)
        pins = Pins(store, host=host_cache.keep, device=inbox.keep, host_bytes=pin_bytes(config), device_rows=rows // 2)

        def look() -> None:
            if store.refresh():
                pins.apply()

        work = [RepeatedTask("the look at the adapter store", REFRESH_SECONDS, look)]
        limit = config.max_upload_mib * MIB
        if config.watch_dir is not None:
            watch = DirectoryWatch(store, publisher, config.watch_dir, limit=limit, failed=metrics.watch_failed)
            actor = Actor("--watch-dir")

            def poll() -> None:
                with acting(actor):
                    watch.poll()

            work.append(RepeatedTask("the look at --watch-dir", config.watch_seconds, poll))
        root = config.lora_path_root
        lora_path_root = None if root is None else LoraPathRoot(publisher, root, limit=limit)
        hub = None
        if config.hub_adapter_list:
            hub = HubAdapters(
                store, publisher, config.hub_adapter_list, fetch, limit=limit, seconds=config.upload_timeout
            )
        return cls(pins, prover, publisher, check, lora_path_root, hub, work)

    def start(self) -> None:
        """On the event loop, when the engine takes sequences."""
        self.prover.start()
        for work in self.work:
            work.start()

    def stop(self) -> None:
        """Blocks until the work that is under way has ended."""
        self.check.stop()
        if self.hub is not None:
            self.hub.stop()
        for work in self.work:
            work.stop()
