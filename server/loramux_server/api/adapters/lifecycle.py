"""/v1/adapters/{name}/rollback and /pin: what becomes of an adapter after its upload."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from loramux_server.api.adapters.routes import record_json
from loramux_server.api.http.auth import Access, access
from loramux_server.api.http.body import read_object
from loramux_server.api.http.dependencies import Deps
from loramux_server.api.http.model_names import check_adapter_name
from loramux_server.api.http.worker_threads import offload
from loramux_server.errors import RequestError

_MAX_BODY = 4096


class Lifecycle:
    def __init__(self, deps: Deps) -> None:
        self._deps = deps

    @access(Access.ADMIN)
    async def rollback(self, request: Request) -> Response:
        """Back to the version before, or to the kept one that `version`, in the query or in the body, begins."""
        name = self._name_of(request)
        prefix = await self._version(request)
        rolled = await offload(self._deps.store.rollback, name, prefix)
        return await self._shown(name, outcome=rolled.outcome, version=rolled.version)

    @access(Access.ADMIN)
    async def pin(self, request: Request) -> Response:
        name = self._name_of(request)
        await self._fields(request, ())
        await offload(self._deps.pins.pin, name)
        return await self._shown(name)

    @access(Access.ADMIN)
    async def unpin(self, request: Request) -> Response:
        name = self._name_of(request)
        await offload(self._deps.pins.unpin, name)
        return await self._shown(name)

    def _name_of(self, request: Request) -> str:
        return check_adapter_name(request.path_params["name"], self._deps.base.name)

    async def _shown(self, name: str, **more: Any) -> Response:
        record = await offload(self._deps.store.record, name)
        return JSONResponse(record_json(self._deps, record) | more)

    async def _version(self, request: Request) -> str | None:
        fields = await self._fields(request, ("version",))
        version = fields.get("version")
        if version is not None and not isinstance(version, str):
            raise RequestError("'version' must be the beginning of a version's digest", param="version")
        return version

    async def _fields(self, request: Request, names: tuple[str, ...]) -> dict[str, Any]:
        """The fields of query and JSON body; there need not be a body. Raises RequestError for any other field."""
        limits = self._deps.limits
        fields: dict[str, Any] = dict(request.query_params)
        # A web page can make a browser send a POST without a body here, but not one that says it is JSON.
        has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
        if has_body or "origin" in request.headers or "sec-fetch-site" in request.headers:
            fields |= await read_object(request, limit=_MAX_BODY, stall_seconds=limits.stall_seconds)
        for name in fields:
            if name not in names:
                raise RequestError(f"unknown parameter {ascii(name[:64])}", param=name[:64], code="unknown_parameter")
        return fields
