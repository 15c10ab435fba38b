"""Adapters that are fetched from a hub when they are first asked for, of repositories that the operator allows."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loramux_adapters.errors import AdapterError, AdapterRejected, StoreUnavailable
from loramux_adapters.store.store import AdapterStore
from loramux_server.errors import HubUnreachable, LoramuxError, NotOnHub, RequestError, ServerBusy, ServerDraining
from loramux_server.hub.hub_name import PREFIX, HubName, is_allowed
from loramux_server.hub.repository import Fetched, put_label
from loramux_server.publishing.adapter_files import copy_adapter
from loramux_server.publishing.publisher import Publisher, is_usable

logger = logging.getLogger(__name__)

MAX_FETCHES = 2  # at a time
MAX_PENDING = 32  # that run or wait; each holds the requests that asked for it
FAILED_SECONDS = 300.0  # in which what is not on the hub, or cannot be served, is not asked for again
UNREACHABLE_SECONDS = 20.0  # and what a hub could not give just now
MAX_FAILURES = 1024
NOT_FOUND = "model_not_found"


class Fetch(Protocol):
    """`hub.repository.fetch`, as far as it is used here."""

    def __call__(self, name: HubName, *, limit: int, seconds: float, stop: threading.Event) -> Fetched: ...


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why an adapter cannot be had until a moment of the monotonic clock. `code` None: ask again then."""

    until: float
    message: str
    code: str | None

    def error(self, now: float) -> LoramuxError:
        left = max(1, round(self.until - now))
        if self.code is None:
            return ServerBusy(self.message, retry_after=left)
        return RequestError(
            f"{self.message}; it is looked for again in {left} s at the earliest", param="model", code=self.code
        )


class HubAdapters:
    """Any thread may call any method. A fetch goes on when whoever asked for it has gone."""

    def __init__(
        self,
        store: AdapterStore,
        publisher: Publisher,
        patterns: Sequence[str],
        fetch: Fetch,
        *,
        limit: int,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            patterns: which repositories may be fetched, see `hub_name.is_allowed`.
            limit: most bytes of an adapter.
            seconds: longest that its files may take to arrive.
        """
        self._store = store
        self._publisher = publisher
        self._patterns = tuple(patterns)
        self._fetch = fetch
        self._limit = limit
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: dict[str, Future[None]] = {}
        self._failures: dict[str, _Failure] = {}
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(MAX_FETCHES, "hub")
        self._one_at_a_time = threading.Lock()  # what is published is in memory meanwhile

    async def ready(self, name: HubName, seconds: float | None) -> None:
        """Returns when the adapter can be asked for under `name.stored_as`; at once if it could before.

        Whoever asks meanwhile waits for the same fetch, at most so many seconds.
        Raises RequestError if it cannot be had, or may not be; ServerBusy to come again.
        """
        pending = await asyncio.to_thread(self._begin, name)
        if pending is None:
            return
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(pending)), seconds)
        except TimeoutError as error:
            raise ServerBusy(f"{PREFIX}{name} is still being fetched; ask again", retry_after=10) from error
        except asyncio.CancelledError:
            if pending.cancelled():  # not the request, but what it waits for
                raise ServerDraining(f"{PREFIX}{name} is not fetched: the server stops") from None
            raise

    def stop(self) -> None:
        """Ends what is under way, and returns when it has ended. May be called twice."""
        self._stop.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _begin(self, name: HubName) -> Future[None] | None:
        """The fetch that will bring it, begun if it is not under way; None if it is there."""
        key = name.stored_as
        with self._lock:
            if key in self._pending:
                return self._pending[key]
        if is_usable(self._store, key):
            return None
        if not is_allowed(name, self._patterns):
            raise RequestError(
                f"{PREFIX}{name} is none of the repositories that this server may fetch (--hub-adapters)",
                param="model",
                code=NOT_FOUND,
            )
        with self._lock:
            failure = self._failures.get(key)
            if failure is not None and self._clock() < failure.until:
                raise failure.error(self._clock())
            if key not in self._pending:
                if self._stop.is_set() or len(self._pending) >= MAX_PENDING:
                    raise ServerBusy("too many adapters are being fetched at the same time", retry_after=10)
                self._pending[key] = self._threads.submit(self._bring, name)
            return self._pending[key]

    def _bring(self, name: HubName) -> None:
        key = name.stored_as
        try:
            if not is_usable(self._store, key):  # it came between the look and this
                self._publish(name, self._fetch(name, limit=self._limit, seconds=self._seconds, stop=self._stop))
            with self._lock:
                self._failures.pop(key, None)
        except (LoramuxError, AdapterError, OSError) as error:
            logger.warning("%s%s is not published: %s", PREFIX, name, error)
            raise self._failed(name, error) from error
        finally:
            with self._lock:
                del self._pending[key]

    def _publish(self, name: HubName, fetched: Fetched) -> None:
        def fill(target: Path) -> None:
            copy_adapter(fetched.directory, (), target, limit=self._limit)
            put_label(target, fetched.label)

        with self._one_at_a_time:
            done = self._publisher.publish_files(name.stored_as, fill)
        source = f"{fetched.label}, of the cache" if fetched.cached else fetched.label
        logger.info("%s%s is published as %s, %.12s: %s", PREFIX, name, name.stored_as, done.stored.version, source)
        for note in done.checked.notes:
            logger.info("%s%s: %s", PREFIX, name, note)

    def _failed(self, name: HubName, error: Exception) -> Exception:
        """What those that wait are told; it is remembered, unless it has nothing to do with the adapter."""
        if isinstance(error, ServerBusy | StoreUnavailable):
            return error
        if isinstance(error, OSError):
            error = AdapterRejected([f"its files cannot be copied: {error.strerror}"])
        is_away = not isinstance(error, NotOnHub | AdapterError)
        code = None if is_away else NOT_FOUND if isinstance(error, NotOnHub) else "adapter_rejected"
        message = str(error) if isinstance(error, NotOnHub | HubUnreachable) else f"{PREFIX}{name}: {error}"
        now = self._clock()
        failure = _Failure(now + (UNREACHABLE_SECONDS if is_away else FAILED_SECONDS), message, code)
        with self._lock:
            self._failures.pop(name.stored_as, None)
            self._failures[name.stored_as] = failure
            while len(self._failures) > MAX_FAILURES:
                del self._failures[next(iter(self._failures))]
        return failure.error(now)
