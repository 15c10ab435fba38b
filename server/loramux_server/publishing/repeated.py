"""Work that is repeated every so many seconds in a thread of its own, even after one turn of it has failed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from loramux_adapters.errors import AdapterError

logger = logging.getLogger(__name__)


class RepeatedTask:
    """Calls `work` every `seconds`, counted from the end of the last call, from `start` until `stop`."""

    def __init__(self, name: str, seconds: float, work: Callable[[], object]) -> None:
        self._name = name
        self._seconds = seconds
        self._work = work
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when a turn that is under way has ended. May be called twice, and without a start."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._seconds):
            try:
                self._work()
            except AdapterError as error:
                logger.warning("%s: %s", self._name, error)
            except Exception:  # the next turn may well succeed, and without this thread there would be none
                logger.exception("%s failed", self._name)
