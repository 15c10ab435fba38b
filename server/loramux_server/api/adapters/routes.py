"""/v1/adapters: list, show, upload, download, roll back, pin, delete."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse

from loramux_adapters.artifact.format import CHAT_TEMPLATE_FILE
from loramux_adapters.errors import AdapterNotFound
from loramux_adapters.names import PATH_WORDS, check_name, file_name_of
from loramux_server.api.adapters.download import packed
from loramux_server.api.adapters.upload import receive_upload
from loramux_server.api.completions.request.adapter_defaults import shown, stored_defaults
from loramux_server.api.http.auth import Access, access, caller_of
from loramux_server.api.http.body import read_object
from loramux_server.api.http.dependencies import Dependencies
from loramux_server.api.http.json_reply import listed
from loramux_server.api.http.streaming import Stream, until_gone
from loramux_server.api.http.visible_store import VisibleStore
from loramux_server.api.http.worker_threads import enter_in_thread, run_in_thread, run_in_thread_or_undo
from loramux_server.errors import RequestError, ServerBusy

if TYPE_CHECKING:
    from loramux_adapters.artifact.coverage import LayerCount
    from loramux_adapters.lora.verify import Checked
    from loramux_adapters.store.store import AdapterRecord, Published, Staging
    from loramux_server.access.tenant import TenantLimits
    from loramux_server.fingerprint.replay import ReplayOutcome

_MAX_BODY = 4096  # of a call to roll back or to pin, in bytes
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


class AdapterRoutes:
    def __init__(self, deps: Dependencies) -> None:
        self._deps = deps
        self._places = asyncio.Semaphore(deps.limits.uploads)
        self._quotas = threading.Lock()  # two uploads at once must not both find room for one

    @access(Access.LOOK)
    async def list(self, request: Request) -> Response:
        store = self._deps.visible(caller_of(request))
        return await listed(lambda: self._records_json(store))

    @access(Access.LOOK)
    async def show(self, request: Request) -> Response:
        return await self._shown(self._deps.visible(caller_of(request)), self._last_name_of(request))

    @access(Access.PUBLISH)
    async def put(self, request: Request) -> Response:
        """201 for a new adapter, 200 for a new version of one, for one that is there already, and for a mere check."""
        name = self._last_name_of(request)
        flags = _flags(request, ("validate_only", "force", "allow_no_effect", "skip_replay"))
        validate_only = flags.pop("validate_only")
        caller = caller_of(request)
        store = self._deps.visible(caller)
        store.kept_as(name)
        await run_in_thread(store.require_room, name, caller.limits)
        async with self.place(), enter_in_thread(store.stage()) as staging:
            await receive_upload(request, staging.directory, self._deps.limits)
            # A client that leaves while its files are checked publishes nothing.
            checked, proof = await until_gone(
                request.receive,
                self._checked(staging.directory, keep=not validate_only, **flags),
            )
            if validate_only:
                return JSONResponse(_checked_json(name, checked, proof))
            published = await run_in_thread(self._publish, store, caller.limits, name, staging, checked, proof)
        return await self._shown(store, name, published)

    def _publish(
        self,
        store: VisibleStore,
        limits: TenantLimits,
        name: str,
        staging: Staging,
        checked: Checked,
        proof: ReplayOutcome,
    ) -> Published:
        """In a worker thread. Raises QuotaExceeded, and what publishing raises."""
        with nullcontext() if limits.adapters is None and limits.adapter_mib is None else self._quotas:
            nbytes = sum(path.stat().st_size for path in staging.directory.iterdir() if path.is_file())
            store.require_room(name, limits, nbytes)
            return self._deps.publish(store.kept_as(name), staging, checked, proof)

    @access(Access.MANAGE)
    async def delete(self, request: Request) -> Response:
        name = self._last_name_of(request)
        kept = await run_in_thread(self._deps.visible(caller_of(request)).delete, name)
        self._deps.metrics.adapter_deleted(kept)
        return JSONResponse({"id": name, "object": "adapter", "deleted": True})

    @access(Access.PUBLISH)
    async def archive(self, request: Request) -> Response:
        """The current version's files as a tar.gz."""
        name, store = self._name_of(request), self._deps.visible(caller_of(request))
        lease = await run_in_thread_or_undo(lambda lease: lease.release(), lambda: store.acquire(name))

        async def release() -> None:
            await run_in_thread(lease.release)

        headers = {
            "content-type": "application/gzip",
            "content-disposition": f'attachment; filename="{file_name_of(name)}.tar.gz"',
        }
        return Stream(packed(store.directory(lease.version), file_name_of(name)), release, headers)

    @access(Access.MANAGE)
    async def rollback(self, request: Request) -> Response:
        """Back to the version before, or to the kept one whose digest begins with `version`, of the query or the body.

        200, also where that version is current already.
        """
        name = self._name_of(request)
        version = (await self._fields(request, ("version",))).get("version")
        if version is not None and not isinstance(version, str):
            raise RequestError("'version' must be the beginning of a version's digest", param="version")
        store = self._deps.visible(caller_of(request))
        return await self._shown(store, name, await run_in_thread(store.rollback, name, version))

    @access(Access.OPERATOR)
    async def pin(self, request: Request) -> Response:
        name = self._name_of(request)
        await self._fields(request, ())
        await run_in_thread(self._deps.pins.pin, name)
        return await self._shown(self._deps.visible(caller_of(request)), name)

    @access(Access.OPERATOR)
    async def unpin(self, request: Request) -> Response:
        name = self._name_of(request)
        await run_in_thread(self._deps.pins.unpin, name)
        return await self._shown(self._deps.visible(caller_of(request)), name)

    async def _shown(self, store: VisibleStore, name: str, published: Published | None = None) -> Response:
        """The adapter as it is now, and what `published` says came of the call: 201 for a new adapter, else 200.

        What was published and then deleted by another call, before this reply, is shown as that.
        """
        try:
            record = await run_in_thread(store.record, name)
            adapter = self._record_json(record, await run_in_thread(self._brings, record))
        except AdapterNotFound:
            if published is None:
                raise
            adapter = {"id": name, "object": "adapter", "name": name, "deleted": True}
        if published is None:
            return JSONResponse(adapter)
        outcome = {"outcome": published.outcome, "version": published.version}
        return JSONResponse(adapter | outcome, 201 if published.outcome == "created" else 200)

    async def _fields(self, request: Request, names: tuple[str, ...]) -> dict[str, Any]:
        """The fields of query and JSON body; there need not be a body. Raises RequestError for any other field."""
        fields: dict[str, Any] = dict(request.query_params)
        # A web page can make a browser send a POST without a body here, but not one that says it is JSON.
        has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
        if has_body or "origin" in request.headers or "sec-fetch-site" in request.headers:
            fields |= await read_object(request, limit=_MAX_BODY, pace=self._deps.limits.pace)
        for name in fields:
            if name not in names:
                raise RequestError(f"unknown parameter {ascii(name[:64])}", param=name[:64], code="unknown_parameter")
        return fields

    async def _checked(self, directory: Path, *, force: bool, **flags: bool) -> tuple[Checked, ReplayOutcome]:
        """What the check found, and how the fingerprint replays; `flags` are those of the trial."""
        checked = await run_in_thread(self._deps.check, directory, force=force)
        return checked, await self._deps.prove(directory, checked, force=force, **flags)

    def _name_of(self, request: Request) -> str:
        return check_name(request.path_params["name"], (self._deps.base.name,))

    def _last_name_of(self, request: Request) -> str:
        """Of a path that ends with the name. Raises HTTPException: it is another call's, which takes other methods."""
        above, _, last = request.path_params["name"].rpartition("/")
        if above and last in PATH_WORDS:
            raise HTTPException(405)
        return self._name_of(request)

    def _brings(self, record: AdapterRecord) -> dict[str, Any]:
        """What the current version brings beside its weights. Asks the disk."""
        directory = self._deps.store.directory(record.version)
        template = "adapter" if (directory / CHAT_TEMPLATE_FILE).exists() else "base"
        return {"chat_template": template, **shown(stored_defaults(directory))}

    def _records_json(self, store: VisibleStore) -> Iterator[dict[str, Any]]:
        """Every adapter that the caller sees. Asks the disk."""
        for record in store.records():
            yield self._record_json(record, self._brings(record))

    def _record_json(self, record: AdapterRecord, brings: dict[str, Any]) -> dict[str, Any]:
        """An adapter as clients see it."""
        return {
            "id": record.name,
            "object": "adapter",
            "name": record.name,
            "version": record.version,
            "rank": record.rank,
            "target_modules": [*record.target_modules],
            "layers": _layers_json(record.layers),
            "bytes": record.nbytes,
            "tier": self._deps.engine.residency(record.version),
            "pinned": record.pinned,
            "corrupt": record.corrupt,
            "base": self._deps.base.name,
            "base_verified": record.base_verified,
            "fingerprint": record.fingerprint,
            "notes": record.notes,
            **brings,
            "requests": record.references,
            "created": record.created,
            "updated": record.updated,
            "versions": [
                {
                    "version": kept.version,
                    "created": kept.created,
                    "bytes": kept.nbytes,
                    "rank": kept.rank,
                    "layers": _layers_json(kept.layers),
                    "verified": kept.base_verified,
                    "fingerprint": kept.fingerprint,
                    "notes": kept.notes,
                    "corrupt": kept.corrupt,
                    "current": kept.version == record.version,
                    "tier": self._deps.engine.residency(kept.version),
                }
                for kept in record.versions
            ],
        }

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """One of the places for uploads. Raises ServerBusy if none becomes free in time."""
        seconds = self._deps.limits.upload_wait_seconds
        try:
            with self._deps.metrics.upload_waits():
                async with asyncio.timeout(seconds):
                    await self._places.acquire()
        except TimeoutError as error:
            raise ServerBusy("too many uploads at the same time", retry_after=max(1, round(seconds))) from error
        try:
            with self._deps.metrics.upload_runs():
                yield
        finally:
            self._places.release()


def _checked_json(name: str, checked: Checked, proof: ReplayOutcome) -> dict[str, Any]:
    return {
        "object": "adapter.validation",
        "name": name,
        "valid": True,
        "rank": checked.rank,
        "target_modules": [*checked.target_modules],
        "layers": _layers_json(checked.layers),
        "base_verified": checked.base_verified,
        "fingerprint": proof,
        "notes": checked.notes,
        "chat_template": "base" if checked.chat_template is None else "adapter",
        **shown(checked.generation),
    }


def _layers_json(layers: LayerCount | None) -> dict[str, int] | None:
    return None if layers is None else {"adapted": layers.adapted, "of": layers.of}


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
