"""/v1/keys and /v1/tenants: make, list, revoke and rotate keys. A tenant's admin sees and makes keys of that tenant."""

from __future__ import annotations

import json
import time
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from loramux_server.access.access_file import AccessFile, KeyRecord
from loramux_server.access.audit_file import AuditFile, EntryFilter, of_key
from loramux_server.access.caller import Scope, check_tenant
from loramux_server.access.key_text import KeyText
from loramux_server.api.http.auth import Access, access, caller_of
from loramux_server.api.http.body import read_json
from loramux_server.api.http.dependencies import Dependencies
from loramux_server.api.http.json_object import json_object
from loramux_server.api.http.json_reply import listed
from loramux_server.api.http.worker_threads import run_in_thread
from loramux_server.api.keys.request import AuditQuery, NewKey, Rotation, parse_body, parse_query
from loramux_server.errors import ConfigError, RequestError

_MAX_BODY = 4096
_SECRET = {"cache-control": "no-store"}

Body = TypeVar("Body", bound=BaseModel)


class KeyRoutes:
    def __init__(self, deps: Dependencies, file: AccessFile, audit: AuditFile) -> None:
        self._deps = deps
        self._file = file
        self._audit = audit

    @access(Access.ADMIN)
    async def list(self, request: Request) -> Response:
        tenant = caller_of(request).tenant
        return await listed(lambda: [record.told(time.time()) for record in self._file.records(tenant)])

    @access(Access.ADMIN)
    async def create(self, request: Request) -> Response:
        """201 with the key itself."""
        body = await self._body(request, NewKey)
        caller = caller_of(request)
        tenant = body.tenant if caller.is_operator else caller.tenant
        if body.tenant not in (None, tenant):
            raise RequestError("a tenant's key makes keys of that tenant alone", param="tenant", code="invalid_value")
        if tenant is not None:
            try:
                check_tenant(tenant)
            except ConfigError as error:
                raise RequestError(str(error), param="tenant", code="invalid_value") from error
            if Scope.METRICS in body.scopes:
                raise RequestError(
                    "the scope metrics is the operator's: measurements are of all tenants",
                    param="scopes",
                    code="invalid_value",
                )
        expires = None if body.expires_in is None else int(time.time()) + body.expires_in
        key, record = await run_in_thread(
            lambda: self._file.create(
                tenant=tenant, scopes=frozenset(body.scopes), note=body.note or "", expires=expires
            )
        )
        await run_in_thread(self._audit.append, "key created", record.id, None, of_key(record))
        return _told(key, record)

    @access(Access.ADMIN)
    async def revoke(self, request: Request) -> Response:
        """It is refused from the next request on."""
        key_id, tenant = request.path_params["key"], caller_of(request).tenant
        record = await run_in_thread(self._file.revoke, key_id, tenant)
        await run_in_thread(self._audit.append, "key revoked", record.id, None, of_key(record))
        return JSONResponse(record.told(time.time()))

    @access(Access.ADMIN)
    async def rotate(self, request: Request) -> Response:
        """201 with the new key."""
        body = await self._body(request, Rotation)
        key_id, tenant = request.path_params["key"], caller_of(request).tenant
        key, record = await run_in_thread(lambda: self._file.rotate(key_id, overlap=body.overlap or 0, tenant=tenant))
        detail = f"in place of {key_id}; {of_key(record)}"
        await run_in_thread(self._audit.append, "key rotated", record.id, None, detail)
        return _told(key, record)

    @access(Access.OPERATOR)
    async def tenants(self, request: Request) -> Response:
        return await listed(lambda: [tenant.told() for tenant in self._file.tenants()])

    @access(Access.OPERATOR)
    async def limit(self, request: Request) -> Response:
        """Changes limits of a tenant; what the body does not name stays."""
        try:
            name = check_tenant(request.path_params["tenant"])
            values = json_object(await read_json(request, limit=_MAX_BODY, pace=self._deps.limits.pace))
            tenant = await run_in_thread(self._file.limit, name, values)
        except ConfigError as error:
            raise RequestError(str(error), code="invalid_value") from error
        await run_in_thread(self._audit.append, "limited", name, None, json.dumps(values))
        return JSONResponse(tenant.told())

    @access(Access.ADMIN)
    async def audited(self, request: Request) -> Response:
        """Newest first. A tenant's admin sees what that tenant changed."""
        caller, fields = caller_of(request), dict(request.query_params)
        if not caller.is_operator and fields.get("tenant", caller.tenant) != caller.tenant:
            raise RequestError("a tenant's key sees changes of that tenant alone", param="tenant", code="invalid_value")
        if caller.tenant is not None:
            fields["tenant"] = caller.tenant
        wanted = parse_query(AuditQuery, fields)
        given = EntryFilter(wanted.tenant, wanted.subject, wanted.since, wanted.before, wanted.limit)
        return await listed(lambda: [entry.told() for entry in self._audit.entries(given)])

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        return parse_body(kind, await read_json(request, limit=_MAX_BODY, pace=self._deps.limits.pace))


def _told(key: KeyText, record: KeyRecord) -> Response:
    return JSONResponse(record.told(time.time()) | {"key": str(key)}, 201, _SECRET)
