"""GET /, /docs, /openapi.json and /version: for those who want to know what this is."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from loramux_server.api.description.document import DescribedRoute, described_path, openapi_document
from loramux_server.api.http.auth import Access, Authorizer, access, access_of
from loramux_server.api.http.dependencies import Dependencies
from loramux_server.api.http.worker_threads import run_in_thread

# A page has its style in it and nothing else: no script, nothing from another place.
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 3rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.15rem; margin: 2rem 0 .3rem; }}
code, pre {{ font: .9em/1.45 ui-monospace, monospace; }}
pre {{ background: #8882; padding: .8rem 1rem; overflow-x: auto; border-radius: .4rem; }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; }}
td, th {{ text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #8883; }}
summary {{ cursor: pointer; }} small {{ opacity: .75; }} a {{ color: inherit; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
_HOME = """<h1>loramux</h1>
<p>A server of one base language model and many LoRA adapters over it, behind OpenAI's API. Each request names the
adapter that answers it; requests for different adapters are computed together.</p>
<table>
<tr><td><a href="docs">/docs</a></td><td>every call, to read</td></tr>
<tr><td><a href="openapi.json">/openapi.json</a></td><td>the same, for programs</td></tr>
<tr><td><a href="v1/models">/v1/models</a></td><td>the base and the adapters that are served</td></tr>
<tr><td><a href="metrics">/metrics</a></td><td>measurements, for Prometheus</td></tr>
<tr><td><a href="health">/health</a>, <a href="ready">/ready</a></td><td>alive, and able to serve</td></tr>
<tr><td><a href="version">/version</a></td><td>what runs here</td></tr>
</table>
<p>{key}</p>
<pre>{example}</pre>
"""
_EXAMPLE = """curl {url}/v1/chat/completions -H "content-type: application/json"{key} \\
  -d '{{"model": "MODEL", "messages": [{{"role": "user", "content": "Hello"}}]}}'"""


class PageRoutes:
    """The document is made in a worker thread, when somebody first asks for it."""

    def __init__(self, deps: Dependencies, authorizer: Authorizer) -> None:
        self._deps = deps
        self._authorizer = authorizer
        self._documents: dict[tuple[Access, ...], dict[str, Any]] = {}  # by which calls need a key

    @access(Access.PUBLIC)
    async def home(self, request: Request) -> Response:
        """The same for everybody: it tells nothing of what is served here."""
        needs = self._authorizer.needs_key(Access.INFER)
        key = (
            "This server asks for a key, in the header <code>Authorization: Bearer</code>; only this page, /health and "
            "/ready are open."
            if needs
            else "To try it, with a model of the list above:"
        )
        header = ' -H "authorization: Bearer $LORAMUX_API_KEY"' if needs else ""
        example = html.escape(_EXAMPLE.format(url="http://THIS_SERVER", key=header))
        return _page("loramux", _HOME.format(key=key, example=example))

    @access(Access.LOOK)
    async def docs(self, request: Request) -> Response:
        """Without scripts, so that it can be read where nothing can be loaded."""
        document = await self._described(request)
        return _page("loramux API", await run_in_thread(lambda: "\n".join(_readable(document))))

    @access(Access.LOOK)
    async def openapi(self, request: Request) -> Response:
        return JSONResponse(await self._described(request))

    @access(Access.LOOK)
    async def version(self, request: Request) -> Response:
        base = self._deps.base
        return JSONResponse(
            {"version": installed_version(), "server": "loramux", "base": base.name, "base_id": base.base_id}
        )

    async def _described(self, request: Request) -> dict[str, Any]:
        needs = tuple(filter(self._authorizer.needs_key, Access))
        if needs not in self._documents:
            self._documents[needs] = await run_in_thread(
                openapi_document, _described_routes(request.app), version=installed_version(), needs_key=needs
            )
        return self._documents[needs]


def _described_routes(app: FastAPI) -> list[DescribedRoute]:
    """Every route of the application; a HEAD is its GET."""
    return [
        DescribedRoute(method, described_path(route.path), access_of(route.endpoint))
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in sorted((route.methods or set()) - {"HEAD"})
    ]


def installed_version() -> str:
    """Of this project; "unknown" where it runs from its sources alone."""
    try:
        return version("loramux")
    except PackageNotFoundError:
        return "unknown"


def _page(title: str, body: str) -> Response:
    return Response(_PAGE.format(title=title, body=body), headers=_HEADERS, media_type="text/html")


def _readable(document: dict[str, Any]) -> Iterator[str]:
    """The document as HTML. Nothing in it was written by a stranger; it is escaped all the same."""
    yield f"<h1>loramux {html.escape(document['info']['version'])}</h1>"
    yield f"<p>{_text(document['info']['description'])} For programs: <a href='openapi.json'>openapi.json</a></p>"
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            key = " <small>needs a key</small>" if operation["security"] else ""
            yield f"<h2><code>{method.upper()} {html.escape(path)}</code>{key}</h2>"
            yield f"<p>{html.escape(operation['summary'])}</p>"
            for parameter in operation["parameters"]:
                if parameter["in"] == "query":
                    yield f"<p>query: <code>{html.escape(parameter['name'])}</code></p>"
            for name in _names(operation.get("requestBody", {})):
                yield _fields("takes", name, schemas)
            for status, response in operation["responses"].items():
                for name in _names(response) if status.startswith("2") else ():
                    yield _fields(f"answers {status}", name, schemas)
    yield "<h2>Parts of these</h2>"
    for name in sorted(schemas):
        yield f"<a id='{html.escape(name)}'></a>" + _fields("", name, schemas)


def _names(content: dict[str, Any]) -> list[str]:
    """Of the schemas that a body may have."""
    found = []
    for media in content.get("content", {}).values():
        schema = media.get("schema", {})
        found += [one["$ref"].rpartition("/")[2] for one in schema.get("anyOf", [schema]) if "$ref" in one]
    return found


def _fields(what: str, name: str, schemas: dict[str, Any]) -> str:
    schema = schemas[name]
    rows = "".join(
        f"<tr><td><code>{html.escape(field)}</code></td><td><small>{_kind(it)}</small></td>"
        f"<td>{_text(it.get('description', ''))}</td></tr>"
        for field, it in schema.get("properties", {}).items()
    )
    about = _text(schema.get("description", ""))
    head = f"<summary>{what} <code>{html.escape(name)}</code></summary>"
    return f"<details>{head}<p>{about}</p><table>{rows}</table></details>"


def _text(text: str) -> str:
    """With `code` in backticks."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _kind(schema: dict[str, Any]) -> str:
    """What a value may be, in a few words."""
    if "$ref" in schema:
        name = html.escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return html.escape(", ".join(map(str, schema.get("enum", [schema.get("const")]))))
    if schema.get("type") == "array":
        return "list of " + _kind(schema.get("items", {}))
    return html.escape(str(schema.get("type", "anything")))
