"""/v1/adapters: upload, list, show, download, delete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from loramux_server.api.adapters.download import packed
from loramux_server.api.adapters.upload import receive_upload
from loramux_server.api.http.auth import Access, access
from loramux_server.api.http.deps import Deps
from loramux_server.api.http.model_names import check_adapter_name
from loramux_server.api.http.offload import entered, offload, offload_or_undo, until_gone
from loramux_server.api.http.ports import CheckedPort, RecordPort
from loramux_server.api.http.stream import Stream
from loramux_server.errors import RequestError, ServerBusy

_FLAGS = {"true": True, "1": True, "false": False, "0": False}


class Adapters:
    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._places = asyncio.Semaphore(deps.limits.uploads)

    async def list(self, request: Request) -> Response:
        records = await offload(self._deps.store.records)
        return JSONResponse({"object": "list", "data": [record_json(self._deps, record) for record in records]})

    async def show(self, request: Request) -> Response:
        record = await offload(self._deps.store.record, self._name_of(request))
        return JSONResponse(record_json(self._deps, record))

    @access(Access.ADMIN)
    async def put(self, request: Request) -> Response:
        """201 for a new adapter, 200 for a new version of one, for one that is there already, and for a mere check."""
        name = self._name_of(request)
        flags = _flags(request, ("validate_only", "force", "allow_no_effect"))
        store = self._deps.store
        async with self.place(), entered(store.stage()) as staging:
            await receive_upload(request, staging.directory, self._deps.limits)
            # A client that leaves while its files are checked publishes nothing.
            checked, proof = await until_gone(
                request.receive,
                self._checked(staging.directory, force=flags["force"], allow_no_effect=flags["allow_no_effect"]),
            )
            if flags["validate_only"]:
                return JSONResponse(_checked_json(name, checked, proof))
            published = await offload(self._deps.publish, name, staging, checked, proof)
        record = await offload(store.record, name)
        status = 201 if published.outcome == "created" else 200
        return JSONResponse(
            record_json(self._deps, record) | {"outcome": published.outcome, "version": published.version}, status
        )

    @access(Access.ADMIN)
    async def delete(self, request: Request) -> Response:
        name = self._name_of(request)
        await offload(self._deps.store.delete, name)
        self._deps.metrics.adapter_deleted(name)
        return JSONResponse({"id": name, "object": "adapter", "deleted": True})

    @access(Access.ADMIN)
    async def archive(self, request: Request) -> Response:
        """The current version's files as a tar.gz."""
        name, store = self._name_of(request), self._deps.store
        lease = await offload_or_undo(lambda lease: lease.release(), lambda: store.acquire(name))

        async def release() -> None:
            await offload(lease.release)

        headers = {
            "content-type": "application/gzip",
            "content-disposition": f'attachment; filename="{name}.tar.gz"',
        }
        return Stream(packed(store.directory(lease.version), name), release, headers)

    async def _checked(self, directory: Path, *, force: bool, allow_no_effect: bool) -> tuple[CheckedPort, str]:
        """What the check found, and how the fingerprint replays."""
        checked = await offload(self._deps.check, directory, force=force)
        return checked, await self._deps.prove(directory, checked, force=force, allow_no_effect=allow_no_effect)

    def _name_of(self, request: Request) -> str:
        return check_adapter_name(request.path_params["name"], self._deps.base.name)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """One of the places for uploads. Raises ServerBusy if none becomes free in time."""
        seconds = self._deps.limits.upload_wait_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._places.acquire()
        except TimeoutError as error:
            raise ServerBusy("too many uploads at the same time", retry_after=max(1, round(seconds))) from error
        try:
            yield
        finally:
            self._places.release()


def record_json(deps: Deps, record: RecordPort) -> dict[str, Any]:
    """An adapter as clients see it."""
    return {
        "id": record.name,
        "object": "adapter",
        "name": record.name,
        "version": record.version,
        "rank": record.rank,
        "target_modules": [*record.target_modules],
        "bytes": record.nbytes,
        "tier": deps.engine.residency(record.version),
        "pinned": record.pinned,
        "corrupt": record.corrupt,
        "base": deps.base.name,
        "base_verified": record.base_verified,
        "fingerprint": record.fingerprint,
        "requests": record.references,
        "created": record.created,
        "updated": record.updated,
        "versions": [
            {
                "version": kept.version,
                "created": kept.created,
                "bytes": kept.nbytes,
                "rank": kept.rank,
                "verified": kept.base_verified,
                "fingerprint": kept.fingerprint,
                "corrupt": kept.corrupt,
                "current": kept.version == record.version,
                "tier": deps.engine.residency(kept.version),
            }
            for kept in record.versions
        ],
    }


def _checked_json(name: str, checked: CheckedPort, proof: str) -> dict[str, Any]:
    return {
        "object": "adapter.validation",
        "name": name,
        "valid": True,
        "rank": checked.rank,
        "target_modules": [*checked.target_modules],
        "base_verified": checked.base_verified,
        "fingerprint": proof,
    }


def _flags(request: Request, names: tuple[str, ...]) -> dict[str, bool]:
    """Query parameters that are true or false, false if absent. Raises RequestError, also for any other parameter."""
    flags = dict.fromkeys(names, False)
    for name, value in request.query_params.multi_items():
        if name not in flags:
            raise RequestError(f"unknown parameter {ascii(name[:64])}", param=name[:64], code="unknown_parameter")
        if value not in _FLAGS:
            raise RequestError(f"'{name}' must be true or false", param=name, code="invalid_value")
        flags[name] = _FLAGS[value]
    return flags
