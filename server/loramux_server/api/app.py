"""The HTTP application: its routes, who may call them, and how errors are answered."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.applications import Starlette
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from loramux_adapters.errors import AdapterError
from loramux_server.access.actor import Actor, acting
from loramux_server.api.adapters.routes import AdapterRoutes
from loramux_server.api.adapters.vllm_routes import VllmRoutes
from loramux_server.api.completions.routes import CompletionRoutes
from loramux_server.api.completions.tokens import TokenRoutes
from loramux_server.api.description.pages import PageRoutes
from loramux_server.api.embeddings.routes import EmbeddingRoutes
from loramux_server.api.http.auth import Authorizer, caller_of
from loramux_server.api.http.dependencies import Dependencies
from loramux_server.api.http.errors import BodyStalled, answer_to, http_answer
from loramux_server.api.http.middleware import BoundsMiddleware, CorsMiddleware, RequestMiddleware, request_id_of
from loramux_server.api.keys.routes import KeyRoutes
from loramux_server.api.models import ModelRoutes
from loramux_server.api.operations import OperationsRoutes
from loramux_server.api.responses.routes import ResponseRoutes
from loramux_server.errors import LoramuxError, ServerBusy
from loramux_server.wire.connections import Cut

CLIENT_GONE = 499  # nobody reads it; nginx's number, for the access log

logger = logging.getLogger(__name__)


class _Anything(PathConvertor):
    """What is left of a path, slashes and line ends included: what a name may be, `names.check_name` says."""

    regex = "(?s:.*)"


register_url_convertor("anything", _Anything())


def create_app(deps: Dependencies) -> FastAPI:
    """The whole API as an ASGI application. It starts and stops nothing: the parts in `deps` belong to the caller."""
    app = _Application(
        deps,
        title="loramux",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # it would lose a body, and is built from the Host header, which the caller writes
    )
    authorizer = Authorizer(deps.keys)
    app.router.route_class = _route_class(authorizer)
    completions, tokens, adapters = CompletionRoutes(deps), TokenRoutes(deps), AdapterRoutes(deps)
    responses, models, embeddings, operations, pages = (
        ResponseRoutes(deps),
        ModelRoutes(deps),
        EmbeddingRoutes(deps),
        OperationsRoutes(deps),
        PageRoutes(deps, authorizer),
    )
    routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("POST", "/v1/chat/completions", completions.chat),
        ("POST", "/v1/completions", completions.completion),
        ("POST", "/v1/responses", responses.create),
        ("POST", "/v1/embeddings", embeddings.embed),
        ("POST", "/tokenize", tokens.tokenize),
        ("POST", "/detokenize", tokens.detokenize),
        ("GET", "/v1/models", models.list),
        ("GET", "/v1/models/{model:anything}", models.show),
        ("GET", "/v1/adapters", adapters.list),
        # Which words may follow a name is `names.PATH_WORDS`. The first route that fits is taken.
        ("GET", "/v1/adapters/{name:anything}/archive", adapters.archive),
        ("POST", "/v1/adapters/{name:anything}/rollback", adapters.rollback),
        ("POST", "/v1/adapters/{name:anything}/pin", adapters.pin),
        ("DELETE", "/v1/adapters/{name:anything}/pin", adapters.unpin),
        ("GET", "/v1/adapters/{name:anything}", adapters.show),
        ("PUT", "/v1/adapters/{name:anything}", adapters.put),
        ("DELETE", "/v1/adapters/{name:anything}", adapters.delete),
        ("GET", "/health", operations.health),
        ("GET", "/ready", operations.ready),
        ("GET", "/metrics", operations.metrics),
        ("GET", "/metrics/vllm", operations.metrics_vllm),
        ("GET", "/version", pages.version),
        ("GET", "/", pages.home),
        ("GET", "/docs", pages.docs),
        ("GET", "/openapi.json", pages.openapi),
    ]
    if deps.keys.file is not None and deps.keys.audit is not None:
        keys = KeyRoutes(deps, deps.keys.file, deps.keys.audit)
        routes += [
            ("GET", "/v1/keys", keys.list),
            ("POST", "/v1/keys", keys.create),
            ("DELETE", "/v1/keys/{key}", keys.revoke),
            ("POST", "/v1/keys/{key}/rotate", keys.rotate),
            ("GET", "/v1/tenants", keys.tenants),
            ("PUT", "/v1/tenants/{tenant}", keys.limit),
            ("GET", "/v1/audit", keys.audited),
        ]
    if deps.lora_path_root is not None:
        vllm = VllmRoutes(deps, deps.lora_path_root, adapters)
        routes += [("POST", "/v1/load_lora_adapter", vllm.load), ("POST", "/v1/unload_lora_adapter", vllm.unload)]
    for method, path, endpoint in routes:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    app.add_exception_handler(LoramuxError, _on_error)
    app.add_exception_handler(AdapterError, _on_error)
    app.add_exception_handler(BodyStalled, app.on_slow_body)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)
    app.add_exception_handler(Exception, _on_crash)
    return app


def _route_class(authorizer: Authorizer) -> type[APIRoute]:
    """Every route: the caller's right is looked at, then the endpoint is given the request.

    FastAPI's way through dependencies and exit stacks, of which nothing is used here, would cost each waiting request
    several KiB.
    """

    class Authorized(APIRoute):
        async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
            methods = sorted(self.methods or ())
            if scope["method"] not in methods:
                raise HTTPException(405, headers={"allow": ", ".join(methods)})
            request = Request(scope, receive, send)
            await authorizer.authorize(request)
            with acting(_actor(request)):
                response: Response = await self.endpoint(request)
            await response(scope, receive, send)

    return Authorized


def _actor(request: Request) -> Actor:
    """Who wants what the request changes."""
    caller, client = caller_of(request), request.client
    return Actor(caller.who, caller.tenant, None if client is None else client.host, request_id_of(request.scope))


class _Application(FastAPI):
    """FastAPI with our middleware instead of its own, around all of it: the reply to a crash passes that too."""

    def __init__(self, deps: Dependencies, **options: Any) -> None:
        super().__init__(**options)
        self._deps = deps

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:  # type: ignore[override]
        """Hands on without a coroutine of its own, as our middleware does: each would wait with every request."""
        scope["app"] = self
        if self.middleware_stack is None:
            self.middleware_stack = self.build_middleware_stack()
        return self.middleware_stack(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        limits, connections, origins = self._deps.limits, self._deps.connections, self._deps.cors_origins
        inner: ASGIApp = BoundsMiddleware(Starlette.build_middleware_stack(self), limits.header_bytes, connections)
        return RequestMiddleware(CorsMiddleware(inner, origins) if origins else inner)

    async def on_slow_body(self, request: Request, error: Exception) -> Response:
        self._deps.connections.count(Cut.BODY_TOO_SLOW)
        return await _on_error(request, error)


async def _on_error(request: Request, error: Exception) -> Response:
    answer = answer_to(error)
    if answer.status >= 500 and not isinstance(error, ServerBusy):  # being full is no failure, and counted
        logger.error("request %s: %s: %s", request_id_of(request.scope), type(error).__name__, error)
    return answer.response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["allow"] = ", ".join(_methods_at(request))
    return http_answer(error.status_code, headers).response()


def _methods_at(request: Request) -> list[str]:
    """All that the path takes; the router names those of one route. Of several paths that fit, the first is meant."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in routes if route.path == routes[0].path for method in route.methods})


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _on_crash(request: Request, error: Exception) -> Response:
    """The server above logs the traceback."""
    return answer_to(error).response()
