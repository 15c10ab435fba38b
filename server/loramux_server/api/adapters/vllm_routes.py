"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: vLLM's calls, for the tools that make them.

The routes exist only if a directory is configured to load from. Texts, statuses and the shape of errors are vLLM's,
not ours.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from loramux_adapters.errors import AdapterError, AdapterNotFound, InvalidAdapterName
from loramux_adapters.names import check_name
from loramux_server.api.adapters.routes import AdapterRoutes
from loramux_server.api.http.auth import Access, access, caller_of
from loramux_server.api.http.body import read_object
from loramux_server.api.http.dependencies import Dependencies
from loramux_server.api.http.errors import Refusal, answer_to
from loramux_server.api.http.worker_threads import run_in_thread
from loramux_server.errors import LoramuxError, RequestError, ServerBusy

if TYPE_CHECKING:
    from loramux_server.publishing.lora_path import LoraPathRoot

logger = logging.getLogger(__name__)

_MAX_BODY = 64 * 2**10


class VllmRoutes:
    def __init__(self, deps: Dependencies, root: LoraPathRoot, adapters: AdapterRoutes) -> None:
        self._deps = deps
        self._root = root
        self._adapters = adapters

    @access(Access.OPERATOR)
    async def load(self, request: Request) -> Response:
        try:
            body = await self._body(request)
            name, path = _text(body, "lora_name"), _text(body, "lora_path")
            if not name or not path:
                raise RequestError("Both 'lora_name' and 'lora_path' must be provided.")
            check_name(name, (self._deps.base.name,))
            if body.get("load_inplace") is not True and await self._is_loaded(request, name):
                raise RequestError(
                    f"The lora adapter '{name}' has already been loaded. To replace it, set 'load_inplace' to true."
                )
            async with self._adapters.place():
                await run_in_thread(self._root.load, name, path)
        except (ServerBusy, Refusal):
            raise  # a status that says by itself what to do
        except (LoramuxError, AdapterError) as error:
            return _failure(error)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @access(Access.OPERATOR)
    async def unload(self, request: Request) -> Response:
        try:
            body = await self._body(request)
            name = _text(body, "lora_name")
            if not name:
                raise RequestError("'lora_name' needs to be provided to unload a LoRA adapter.")
            await run_in_thread(self._deps.visible(caller_of(request)).delete, name)
        except Refusal:
            raise
        except (LoramuxError, AdapterError) as error:
            return _failure(error)
        self._deps.metrics.adapter_deleted(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _is_loaded(self, request: Request, name: str) -> bool:
        try:
            await run_in_thread(self._deps.visible(caller_of(request)).record, name)
        except AdapterNotFound:
            return False
        return True

    async def _body(self, request: Request) -> dict[str, Any]:
        return await read_object(request, limit=_MAX_BODY, pace=self._deps.limits.pace)


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    return value if isinstance(value, str) else ""


def _failure(error: LoramuxError | AdapterError) -> Response:
    if isinstance(error, AdapterNotFound):
        status, kind = 404, "NotFoundError"
    elif isinstance(error, RequestError | InvalidAdapterName):
        status, kind = 400, "InvalidUserInput"
    else:
        status, kind = 500, "InternalServerError"
        logger.warning("an adapter was not loaded: %s", error)
    message = answer_to(error).error["message"]
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)
