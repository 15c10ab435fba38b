"""`loramux adapters` against a small HTTP server that answers as ours does."""

from __future__ import annotations

import io
import json
import re
import socket
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loramux_server.cli import main as cli
from loramux_server.cli.screen import transfer_bar
from loramux_server.client.adapters import AdaptersClient
from loramux_server.errors import CommandFailed

VERSION = "3f786850e387550fdab836ed7e6dc881de23001b3f786850e387550fdab836ed"
SPAM = {
    "name": "spam",
    "version": VERSION,
    "rank": 8,
    "target_modules": ["q_proj", "v_proj"],
    "bytes": 921_600,
    "tier": "device",
    "base_verified": True,
}


@dataclass
class FakeServer:
    """What it answers, and what it was asked. `answers` maps "METHOD path" to (status, JSON body or bytes)."""

    url: str = ""
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    read_at_most: int | None = None  # bytes of a request's body that are read before the answer
    announce_more: int = 0  # bytes promised beyond those that are sent

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                asked = f"{self.command} {self.path}"
                length = int(self.headers.get("content-length", 0))
                body = self.rfile.read(length if server.read_at_most is None else min(length, server.read_at_most))
                server.asked.append((asked, {k.lower(): v for k, v in self.headers.items()}, body))
                status, reply = server.answers.get(asked, (404, {"error": {"message": "no such adapter"}}))
                content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content) + server.announce_more))
                self.send_header("connection", "close")
                self.end_headers()
                self.wfile.write(content)
                self.close_connection = True

            do_GET = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    with ThreadingHTTPServer(("127.0.0.1", 0), fake.handler()) as listener:
        fake.url = f"http://127.0.0.1:{listener.server_port}"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield fake
        listener.shutdown()
        thread.join()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "spam"
    directory.mkdir()
    (directory / "adapter_config.json").write_text('{"r": 8}')
    (directory / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    return directory


def packed(directory: Path) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for path in sorted(directory.iterdir()):
            tar.add(path, arcname=path.name)
    return archive.getvalue()


def loramux(server: FakeServer, *argv: str, **environ: str) -> int:
    return cli.main(["adapters", *argv], {"LORAMUX_URL": server.url, **environ})


def test_push_uploads_the_directory_under_its_own_name(
    server: FakeServer, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["PUT /v1/adapters/spam"] = (201, {"name": "spam", "version": VERSION, "outcome": "created"})

    assert loramux(server, "push", str(adapter)) == 0

    assert capsys.readouterr().out == "spam created, version 3f786850e387\n"
    _, headers, body = server.asked[0]
    assert headers["content-type"].startswith("multipart/form-data; boundary=")
    assert b'name="config"; filename="adapter_config.json"' in body
    assert b'name="weights"; filename="adapter_model.safetensors"' in body
    assert b"weights" * 1000 in body


def test_push_takes_another_name_and_says_what_became_of_it(
    server: FakeServer, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["PUT /v1/adapters/ham"] = (200, {"version": VERSION})
    loramux(server, "push", str(adapter), "--name", "ham")
    server.answers["PUT /v1/adapters/ham"] = (200, {"version": VERSION, "outcome": "unchanged"})
    loramux(server, "push", str(adapter), "--name", "ham")

    assert capsys.readouterr().out == "ham updated, version 3f786850e387\nham unchanged, version 3f786850e387\n"


def test_push_can_ask_for_the_checks_alone(
    server: FakeServer, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["PUT /v1/adapters/spam?validate_only=true"] = (200, {"rank": 8})

    assert loramux(server, "push", str(adapter), "--validate-only") == 0
    assert capsys.readouterr().out == "spam can be served; nothing was stored\n"


def test_push_tells_every_reason_of_a_refusal(
    server: FakeServer, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = ["rank 512 is above the limit of 256", "use_dora is not supported"]
    error = {"message": "The adapter cannot be served.", "type": "invalid_request_error", "reasons": reasons}
    server.answers["PUT /v1/adapters/spam"] = (422, {"error": error})

    assert loramux(server, "push", str(adapter)) == 1
    assert capsys.readouterr().err.splitlines() == [
        "loramux: the server refused (422): The adapter cannot be served.",
        "  - rank 512 is above the limit of 256",
        "  - use_dora is not supported",
    ]


def test_push_stops_sending_when_the_server_has_refused(
    server: FakeServer, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (adapter / "adapter_model.safetensors").open("wb") as file:
        file.truncate(64 << 20)
    server.read_at_most = 0
    server.answers["PUT /v1/adapters/spam"] = (413, {"error": {"message": "larger than the limit of 1 MiB"}})

    assert loramux(server, "push", str(adapter)) == 1
    assert capsys.readouterr().err in (
        "loramux: the server refused (413): larger than the limit of 1 MiB\n",
        # where the system throws an unread reply away with the connection
        f"loramux: the connection to {server.url} broke: [Errno 104] Connection reset by peer\n",
    )


def test_push_of_something_else_never_reaches_the_server(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loramux(server, "push", str(tmp_path)) == 1
    assert capsys.readouterr().err == f"loramux: {tmp_path} holds no adapter_config.json\n"
    assert server.asked == []


def test_the_admin_key_is_sent_or_else_the_api_key_or_else_none(server: FakeServer) -> None:
    server.answers["GET /v1/adapters"] = (200, {"data": []})
    loramux(server, "list", LORAMUX_ADMIN_KEY="admin", LORAMUX_API_KEY="api")
    loramux(server, "list", LORAMUX_API_KEY="api")
    loramux(server, "list")

    assert [headers.get("authorization") for _, headers, _ in server.asked] == ["Bearer admin", "Bearer api", None]
    assert "admin" not in repr(AdaptersClient(server.url, "admin"))


def test_a_missing_key_is_explained(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers["GET /v1/adapters"] = (401, {"error": {"message": "Missing key."}})

    assert loramux(server, "list") == 1
    expected = "the server refused (401): Missing key.; set LORAMUX_ADMIN_KEY or LORAMUX_API_KEY"
    assert expected in capsys.readouterr().err


def test_list_prints_a_table(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    big = {"name": "a-longer-name", "version": "sha256:" + VERSION, "rank": 64, "bytes": 5 << 30}
    server.answers["GET /v1/adapters"] = (200, {"object": "list", "data": [SPAM, big]})

    assert loramux(server, "list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "name           version       rank  bytes      tier",
        "spam           3f786850e387  8     900.0 KiB  device",
        "a-longer-name  3f786850e387  64    5.0 GiB    -",
    ]


def test_an_empty_list_says_how_to_fill_it(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers["GET /v1/adapters"] = (200, {"data": []})

    assert loramux(server, "list") == 0
    assert capsys.readouterr().out == "no adapters; `loramux adapters push DIR` uploads one\n"


def test_list_and_show_can_print_json(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers["GET /v1/adapters"] = (200, {"data": [SPAM]})
    server.answers["GET /v1/adapters/spam"] = (200, SPAM)

    loramux(server, "list", "--json")
    assert json.loads(capsys.readouterr().out) == [SPAM]
    loramux(server, "show", "spam", "--json")
    assert json.loads(capsys.readouterr().out) == SPAM


def test_show_prints_one_line_per_field(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    current = {"version": VERSION, "rank": 8, "bytes": 921_600, "tier": "device", "current": True, "corrupt": False}
    before = {"version": "b" * 64, "rank": 4, "bytes": 512, "tier": "disk", "current": False, "corrupt": True}
    known = {"id": "spam", "object": "adapter", **SPAM, "created": 0, "versions": [current, before]}
    server.answers["GET /v1/adapters/spam"] = (200, known)

    assert loramux(server, "show", "spam") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "name            spam"
    assert lines[1].split() == ["version", VERSION]
    assert 'target_modules  ["q_proj", "v_proj"]' in lines
    assert "bytes           900.0 KiB" in lines
    created = next(line.split(maxsplit=1)[1] for line in lines if line.startswith("created"))
    assert datetime.fromisoformat(created).timestamp() == 0
    assert lines[-2:] == [
        "versions        3f786850e387, rank 8, 900.0 KiB, device, current",
        "                bbbbbbbbbbbb, rank 4, 512 B, disk, corrupt",
    ]


def test_rm_unregisters(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers["DELETE /v1/adapters/spam"] = (200, {"deleted": True})
    assert loramux(server, "rm", "spam") == 0
    assert capsys.readouterr().out == "spam removed\n"

    server.answers["DELETE /v1/adapters/spam"] = (204, b"")
    assert loramux(server, "rm", "spam") == 0


def test_rollback_goes_to_the_version_before_or_to_a_named_one(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["POST /v1/adapters/spam/rollback"] = (200, {"version": VERSION, "outcome": "rolled_back"})
    server.answers["POST /v1/adapters/spam/rollback?version=3f786850"] = (
        200,
        {"version": VERSION, "outcome": "unchanged"},
    )
    assert loramux(server, "rollback", "spam") == 0
    assert loramux(server, "rollback", "spam", "--version", "3f786850") == 0
    assert capsys.readouterr().out.splitlines() == [
        "spam rolled back to version 3f786850e387",
        "spam already is version 3f786850e387",
    ]


def test_pin_and_unpin(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers["POST /v1/adapters/spam/pin"] = (200, SPAM)
    server.answers["DELETE /v1/adapters/spam/pin"] = (200, SPAM)
    assert loramux(server, "pin", "spam") == 0
    assert loramux(server, "unpin", "spam") == 0
    assert capsys.readouterr().out == "spam pinned\nspam unpinned\n"
    server.answers["POST /v1/adapters/spam/pin"] = (409, {"error": {"message": "unpin others"}})
    assert loramux(server, "pin", "spam") == 1
    assert capsys.readouterr().err == "loramux: the server refused (409): unpin others\n"


def test_an_unknown_adapter_is_told_with_the_servers_words(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loramux(server, "rm", "ham") == 1
    assert capsys.readouterr().err == "loramux: the server refused (404): no such adapter\n"


def test_a_name_cannot_reach_another_route(server: FakeServer) -> None:
    loramux(server, "rm", "../models?x=1#y")

    assert server.asked[0][0] == "DELETE /v1/adapters/..%2Fmodels%3Fx%3D1%23y"


def test_pull_unpacks_into_a_new_directory(
    server: FakeServer, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["GET /v1/adapters/spam/archive"] = (200, packed(adapter))

    assert loramux(server, "pull", "spam", str(tmp_path / "new")) == 0
    assert "adapter_config.json, adapter_model.safetensors" in capsys.readouterr().out
    for path in adapter.iterdir():
        assert (tmp_path / "new" / path.name).read_bytes() == path.read_bytes()


def test_pull_asks_nothing_when_the_directory_is_in_the_way(server: FakeServer, adapter: Path) -> None:
    assert loramux(server, "pull", "spam", str(adapter)) == 1
    assert server.asked == []


def test_a_download_that_breaks_off_leaves_nothing_behind(
    server: FakeServer, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = packed(adapter)
    server.answers["GET /v1/adapters/spam/archive"] = (200, whole[:-20])
    server.announce_more = 20

    assert loramux(server, "pull", "spam", str(tmp_path / "new")) == 1
    assert capsys.readouterr().err.startswith("loramux: the ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spam"]


def test_a_server_that_is_not_there_is_told_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    assert cli.main(["adapters", "list", "--url", f"http://127.0.0.1:{port}"], {}) == 1
    message = f"no server answers at http://127.0.0.1:{port}; start one with `loramux serve`, or give --url"
    assert capsys.readouterr().err == f"loramux: {message}\n"


def test_a_server_that_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(CommandFailed, match=r"did not answer within 0\.05 s"):
            AdaptersClient(url, timeout=0.05).all()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "http://host:99999"])
def test_a_url_that_is_none_is_told(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["adapters", "list", "--url", url], {}) == 1
    assert capsys.readouterr().err.startswith(f"loramux: {url!r} ")


@pytest.mark.parametrize("body", [b"<html>", b"[1]", {"object": "list"}])
def test_a_server_of_another_kind_is_told(server: FakeServer, body: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers["GET /v1/adapters"] = (200, body)

    assert loramux(server, "list") == 1
    assert "is it a loramux server?" in capsys.readouterr().err


def test_a_refusal_without_words_is_told_by_its_status(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers["GET /v1/adapters"] = (502, b"<html>bad gateway</html>")

    assert loramux(server, "list") == 1
    assert capsys.readouterr().err == "loramux: the server answered with status 502\n"


def test_a_path_prefix_of_the_url_is_kept(server: FakeServer) -> None:
    server.answers["GET /llm/v1/adapters"] = (200, {"data": [SPAM]})

    assert AdaptersClient(server.url + "/llm/").all() == [SPAM]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        with transfer_bar(stream) as show:
            for done in (1 << 20, 2 << 20, 4 << 20):
                show(done, 4 << 20)

    assert "100%" in terminal.getvalue() and "4.0/4.0 MiB" in terminal.getvalue()
    assert file.getvalue() == ""
    with transfer_bar(unused := Terminal()):
        pass
    assert not unused.getvalue().strip()


def test_a_table_is_drawn_on_a_terminal_and_says_the_same(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["GET /v1/adapters"] = (200, {"data": [SPAM | {"name": "[red]spam"}]})
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", Terminal())

    assert loramux(server, "list") == 0

    assert isinstance(sys.stdout, Terminal)
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue())
    assert [line.split() for line in drawn.splitlines() if "spam" in line or "name" in line] == [
        ["name", "version", "rank", "bytes", "tier"],
        ["[red]spam", "3f786850e387", "8", "900.0", "KiB", "device"],
    ]
    assert "──" in drawn
