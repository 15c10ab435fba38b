"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from loramux_adapters.errors import AdapterNotFound
from loramux_server.api.completions.request.adapter_defaults import stored_defaults
from loramux_server.api.http.auth import Access, access, caller_of
from loramux_server.api.http.dependencies import Dependencies
from loramux_server.api.http.json_reply import listed
from loramux_server.api.http.model_names import resolve_model
from loramux_server.api.http.visible_store import VisibleStore
from loramux_server.api.http.worker_threads import run_in_thread


class ModelRoutes:
    def __init__(self, deps: Dependencies) -> None:
        self._deps = deps

    @access(Access.LOOK)
    async def list(self, request: Request) -> Response:
        store = self._deps.visible(caller_of(request))
        return await listed(lambda: [self._base(), *self._adapters(store)])

    @access(Access.LOOK)
    async def show(self, request: Request) -> Response:
        """Takes whatever `model` of a generation request may be."""
        model = request.path_params["model"]
        target = resolve_model(model, self._deps.base.name)
        if target is None:
            return JSONResponse(self._base())
        record = await run_in_thread(self._deps.visible(caller_of(request)).record, target.adapter)
        if target.version_prefix is None:
            return JSONResponse(await run_in_thread(self._adapter, model, record.created, record.version))
        kept = [version for version in record.versions if version.version.startswith(target.version_prefix)]
        if len(kept) != 1:
            raise AdapterNotFound("the adapter keeps no version, or several, whose digest starts like this")
        return JSONResponse(await run_in_thread(self._adapter, model, kept[0].created, kept[0].version))

    def _adapters(self, store: VisibleStore) -> Iterator[dict[str, Any]]:
        for record in store.records():
            if record.name != self._deps.base.name:  # registered when the base had another name: `model` means the base
                yield self._adapter(record.name, record.created, record.version)

    def _base(self) -> dict[str, Any]:
        base = self._deps.base
        return self._model(base.name, base.created, root=base.base_id, parent=None, context=base.context)

    def _adapter(self, name: str, created: int, version: str) -> dict[str, Any]:
        """Asks the disk."""
        base = self._deps.base
        own = stored_defaults(self._deps.store.directory(version)).context
        context = base.context if own is None else min(own, base.context)
        return self._model(name, created, root=version, parent=base.name, context=context)

    def _model(self, name: str, created: int, *, root: str, parent: str | None, context: int) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "loramux",
            "root": root,
            "parent": parent,
            "max_model_len": context,
        }
