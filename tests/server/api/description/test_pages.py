from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loramux_server.api.http.dependencies import Keys
from support.fakes_api import BASE_NAME, make_server

VOID = {"meta"}


class Page(HTMLParser):
    """Checks that tags are closed, and collects links and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert name not in ("src", "onclick", "onload")
            if name == "href":
                self.links.append(value or "")
            if name == "id":
                self.ids.add(value or "")
        assert tag not in ("script", "link", "img", "iframe")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/", "/docs"])
@pytest.mark.parametrize("keys", [Keys(), Keys("secret-key", "other-key")])
async def test_a_page_needs_nothing_from_elsewhere_and_its_links_lead_somewhere(
    tmp_path: Path, path: str, keys: Keys
) -> None:
    server = make_server(tmp_path, keys=keys)
    async with server.client(headers={"authorization": "Bearer secret-key"}) as client:
        reply = await client.get(path)
        assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert reply.headers["content-security-policy"] == "default-src 'none'; style-src 'unsafe-inline'"
        page = Page(reply.text)
        for link in page.links:
            if link.startswith("#"):
                assert link[1:] in page.ids
            else:
                assert (await client.get("/" + link)).status_code == 200
    assert "://" not in reply.text.replace("http://THIS_SERVER", "")
    assert "secret-key" not in reply.text and "other-key" not in reply.text


@pytest.mark.anyio
async def test_the_page_that_needs_no_key_tells_nothing_of_what_is_served(tmp_path: Path) -> None:
    server = make_server(tmp_path, keys=Keys("secret-key"))
    async with server.client() as client:
        text = (await client.get("/")).text
        assert BASE_NAME not in text and "pirate" not in text
        assert "Authorization: Bearer" in text
        for path in ("/docs", "/openapi.json", "/version"):
            assert (await client.get(path)).status_code == 401


@pytest.mark.anyio
async def test_the_documentation_page_names_every_call_and_every_option(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    async with server.client() as client:
        text = (await client.get("/docs")).text
    for call in ("POST /v1/chat/completions", "PUT /v1/adapters/{name}", "GET /openapi.json", "POST /tokenize"):
        assert f"<code>{call}</code>" in text
    assert "<code>guided_json</code>" in text
    assert not re.search(r"`\w", text)


@pytest.mark.anyio
async def test_the_version_is_that_of_the_installed_project_and_the_served_base(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    async with server.client() as client:
        told = (await client.get("/version")).json()
    assert told == {"version": told["version"], "server": "loramux", "base": BASE_NAME, "base_id": "ba5e" * 16}
    assert re.fullmatch(r"\d+\.\d+.*|unknown", told["version"])
