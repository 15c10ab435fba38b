"""Adapters that were trained beside a part of the base become LoRA on this server's base, behind all other work.

A large base's layers take minutes to hours of processor time (their singular vectors), so it is done for one adapter at
a time, whichever way it came in, by threads that the system runs when nothing else wants to run; and it ends with the
layer under way when nobody waits for it any more.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from loramux_adapters.base_info import BaseInfo
from loramux_adapters.lora.residual_start import convert_residual, is_residual
from loramux_server.api.http.worker_threads import abandonment
from loramux_server.errors import ServerBusy, ServerDraining
from loramux_server.serving.startup import in_daemon_thread

_LOWEST = 19  # as `nice` has it
_WAIT_SECONDS = 30.0  # for a turn; whoever waits holds one of the few places of adapters that come in
_RETRY_SECONDS = 60
_LOOK_SECONDS = 0.2  # how soon one that waits for its turn sees that nobody waits for it


class ResidualAdapters:
    """Any thread may call any method."""

    def __init__(
        self, base: BaseInfo, max_rank: int, original: Callable[[str], torch.Tensor], *, wait: float = _WAIT_SECONDS
    ) -> None:
        """
        Args:
            original: as `convert_residual` wants it.
            wait: seconds that one waits for its turn.
        """
        self._wait = wait
        self._base, self._max_rank, self._original = base, max_rank, original
        self._turn = threading.Lock()
        self._stopping = threading.Event()

    def convert(self, directory: Path) -> None:
        """Rewrite the files of such an adapter in place; any other is left alone at once.

        Raises:
            AdapterRejected: it cannot be converted, with what to do; OSError.
            ServerBusy: another one is converted, which takes long; ServerDraining: the server stops, or the client
                has left.
        """
        if not is_residual(directory):
            return
        is_abandoned = abandonment()

        def go_on() -> None:
            if self._stopping.is_set() or is_abandoned():
                raise ServerDraining("the adapter is not converted: the server stops, or nobody waits for it")

        def original(path: str) -> torch.Tensor:
            go_on()
            return self._original(path)

        def behind_all_others() -> None:
            if sys.platform == "linux":  # a priority of one thread, which those that it starts inherit
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
            convert_residual(directory, self._base, original, self._max_rank)

        until = time.monotonic() + self._wait
        while not self._turn.acquire(timeout=_LOOK_SECONDS):
            go_on()
            if time.monotonic() > until:
                raise ServerBusy(
                    "another PiSSA or OLoRA adapter is converted, which takes long; try again later",
                    retry_after=_RETRY_SECONDS,
                )
        try:
            in_daemon_thread(behind_all_others, "conversion").result()
        finally:
            self._turn.release()

    def stop(self) -> None:
        """From now on each conversion ends with the layer under way."""
        self._stopping.set()
