"""GET /health, /ready, /metrics and /metrics/vllm: for those who run the server."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from loramux_adapters.errors import StoreUnavailable
from loramux_server.api.http.auth import Access, access
from loramux_server.api.http.dependencies import Dependencies
from loramux_server.api.http.worker_threads import run_in_thread
from loramux_server.metrics.metrics import CONTENT_TYPE
from loramux_server.metrics.vllm_names import LoraRequests, render_vllm

if TYPE_CHECKING:
    from loramux_adapters.store.store import AdapterRecord

logger = logging.getLogger(__name__)


class OperationsRoutes:
    def __init__(self, deps: Dependencies) -> None:
        self._deps = deps

    @access(Access.PUBLIC)
    async def health(self, request: Request) -> Response:
        """503 means: restart me."""
        alive = self._deps.engine.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    @access(Access.PUBLIC)
    async def ready(self, request: Request) -> Response:
        """503 means: send no requests now."""
        ready = self._deps.engine.ready
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    @access(Access.METRICS)
    async def metrics_vllm(self, request: Request) -> Response:
        return Response(await run_in_thread(self._scrape_vllm), headers={"content-type": CONTENT_TYPE})

    @access(Access.METRICS)
    async def metrics(self, request: Request) -> Response:
        return Response(await run_in_thread(self._scrape), headers={"content-type": CONTENT_TYPE})

    def _scrape(self) -> bytes:
        metrics = self._deps.metrics
        records = self._records()
        if records is not None:
            metrics.registered({record.name for record in records})
            kept = {version.version: version.corrupt for record in records for version in record.versions}
            pinned = sum(record.pinned for record in records)
            metrics.stored(versions=len(kept), corrupt=sum(kept.values()), pinned=pinned)
        return metrics.render()

    def _scrape_vllm(self) -> bytes:
        metrics, records = self._deps.metrics, self._records()
        adapters = None if records is None else LoraRequests.of(metrics.gauge_readings(), records)
        return render_vllm(metrics, self._deps.base.name, adapters, time.time())

    def _records(self) -> Sequence[AdapterRecord] | None:
        """None if the store cannot be read now: then the other measurements are needed all the more."""
        try:
            return self._deps.store.records()
        except StoreUnavailable as error:
            logger.warning("metrics are shown without what the store knows: %s", error)
            return None
