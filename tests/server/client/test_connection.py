"""One request to a small server of our own, and what is said when it does not answer as it should."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from email.message import Message
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from loramux_server.client.adapters import AdaptersClient
from loramux_server.client.connection import MAX_REPLY_BYTES, ServerConnection, ServerReply
from loramux_server.errors import CommandFailed

KEY = "a-secret-key"
ELSEWHERE = "http://models.invalid"


@dataclass
class FakeServer:
    """What it answers, and what it was asked: request line, headers by small names, body."""

    url: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    reply: bytes = b"{}"
    asked: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.asked.append((f"{self.command} {self.path}", headers, body))
                self.send_response(server.status)
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(server.reply)

            do_GET = do_PUT = do_POST = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


class Listener(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of a client that hangs up."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    with Listener(("127.0.0.1", 0), fake.handler()) as listener:
        fake.url = f"http://127.0.0.1:{listener.server_port}"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield fake
        listener.shutdown()
        thread.join()


@contextmanager
def answering_at_once(reply: bytes, *, then_close: bool = False) -> Iterator[str]:
    """The URL of a server that answers when it has read the header, and reads nothing of the body."""
    done = threading.Event()

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(1)
            connection.sendall(reply)
            if not then_close:
                done.wait(20)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        done.set()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def put(url: str, files: dict[str, Any], **options: Any) -> ServerReply:
    connection = ServerConnection(url, timeout=10)
    with connection.stream("PUT", ["a"], files=files, **options) as response:
        return connection.read(response)


def test_files_are_sent_as_a_form_and_their_progress_is_told(server: FakeServer, tmp_path: Path) -> None:
    weights = bytes(range(256)) * 4000
    (tmp_path / "w.safetensors").write_bytes(weights)
    (tmp_path / "c.json").write_bytes(b"{}")
    told: list[tuple[int, int]] = []
    with ExitStack() as opened:
        paths = {"config": tmp_path / "c.json", "weights": tmp_path / "w.safetensors"}
        files = {part: (path.name, opened.enter_context(path.open("rb"))) for part, path in paths.items()}
        server.status = 201
        reply = put(server.url, files, progress=lambda sent, total: told.append((sent, total)))

    assert (reply.status, reply.body) == (201, {})
    ((_, headers, body),) = server.asked
    message = BytesParser().parsebytes(f"content-type: {headers['content-type']}\r\n\r\n".encode() + body)
    parts = message.get_payload()
    assert isinstance(parts, list)
    found = {}
    for part in parts:
        assert isinstance(part, Message)
        name = part.get_param("name", header="content-disposition")
        found[name] = (part.get_filename(), part.get_content_type(), part.get_payload(decode=True))
    assert found == {
        "config": ("c.json", "application/json", b"{}"),
        "weights": ("w.safetensors", "application/octet-stream", weights),
    }
    assert len(told) > 10 and told == sorted(told)
    assert {total for _, total in told} == {len(body)} and told[-1][0] == len(body)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_that_changes_while_it_is_sent_is_told(server: FakeServer, tmp_path: Path, change: int) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"w" * (1 << 20))

    def cut_or_grow(sent: int, total: int) -> None:
        with path.open("ab") as file:
            file.truncate((1 << 20) + change)

    with path.open("rb") as file, pytest.raises(CommandFailed, match="became shorter or longer while it was sent"):
        put(server.url, {"w": (path.name, file)}, progress=cut_or_grow)


def test_sending_stops_when_the_server_refuses_before_it_has_all() -> None:
    """The server neither reads on nor closes: whoever sent to the end would wait for ever."""
    refusal = b'{"error": {"message": "wrong key"}}'
    reply = b"HTTP/1.1 401 Unauthorized\r\ncontent-length: %d\r\n\r\n" % len(refusal) + refusal
    with answering_at_once(reply) as url, pytest.raises(CommandFailed, match=r"refused \(401\): wrong key"):
        put(url, {"w": ("w", BytesIO(bytes(64 << 20)))})


def test_a_reply_that_breaks_off_or_stalls_is_told() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"
    with answering_at_once(head, then_close=True) as url, pytest.raises(CommandFailed, match=f"to {url} broke: "):
        ServerConnection(url).call("GET", ["a"])
    with answering_at_once(head) as url, pytest.raises(CommandFailed, match=r"did not answer within 0\.1 s"):
        with ServerConnection(url, timeout=0.1).stream("GET", ["a"]) as response:
            response.read()


def test_what_speaks_no_http_or_no_tls_is_told(server: FakeServer) -> None:
    with answering_at_once(b"SSH-2.0-x\r\n", then_close=True) as url, pytest.raises(CommandFailed, match="broke: "):
        ServerConnection(url).call("GET", ["a"])
    url = server.url.replace("http:", "https:")
    with pytest.raises(CommandFailed, match=f"^{url}: TLS failed: [A-Z_]+$"):
        ServerConnection(url).call("GET", ["a"])


def test_a_host_that_nobody_knows_is_told() -> None:
    with pytest.raises(CommandFailed, match=f"^{ELSEWHERE}: the host is not known$"):
        ServerConnection(ELSEWHERE).call("GET", ["a"])


@pytest.mark.parametrize("host", ["a..b", "..", "xn--", "a" * 64])
def test_a_host_that_cannot_be_one_is_told(host: str) -> None:
    with pytest.raises(CommandFailed, match="is not a URL such as"):
        ServerConnection(f"http://{host}").call("GET", ("v1", "models"))


def test_a_reply_nested_too_deeply_is_no_json(server: FakeServer) -> None:
    server.reply = b"[" * 100_000 + b"]" * 100_000

    with pytest.raises(CommandFailed, match="did not answer in JSON"):
        ServerConnection(server.url).call("GET", ("v1", "models"))


def test_a_list_of_anything_but_adapters_is_told(server: FakeServer) -> None:
    server.reply = b'{"data": [1]}'

    with pytest.raises(CommandFailed, match="did not answer with a list of adapters"):
        AdaptersClient(server.url).all()


def test_a_name_of_any_bytes_is_sent_as_they_are(server: FakeServer) -> None:
    ServerConnection(server.url).call("GET", (os.fsdecode(b"a\xff"),))

    assert server.asked[0][0] == "GET /a%FF"


def test_a_reply_longer_than_any_of_ours_is_not_read_to_its_end(server: FakeServer) -> None:
    server.reply = b'"' + b"x" * (MAX_REPLY_BYTES + (1 << 20)) + b'"'

    with pytest.raises(CommandFailed, match="did not answer in JSON"):
        ServerConnection(server.url).call("GET", ["a"])


def test_a_redirect_is_not_followed_so_that_the_key_goes_nowhere_else(server: FakeServer) -> None:
    server.status, server.headers = 307, {"location": server.url + "/other"}

    with pytest.raises(CommandFailed, match="answered with status 307"):
        ServerConnection(server.url, KEY).call("POST", ["a"], body={})
    assert [asked for asked, _, _ in server.asked] == ["POST /a"]


def test_the_key_is_sent_also_where_the_url_holds_a_user(server: FakeServer) -> None:
    ServerConnection(server.url.replace("://", "://user:word@"), KEY).call("GET", ["a"])
    ServerConnection(server.url, "schlüssel").call("GET", ["a"])

    sent = [headers["authorization"].encode("latin-1").decode() for _, headers, _ in server.asked]
    assert sent == [f"Bearer {KEY}", "Bearer schlüssel"]


@pytest.mark.parametrize("key", ["", f"{KEY}\n", f" {KEY}", f"{KEY}\r\nx: y", f"{KEY}\0"])
def test_a_key_that_cannot_be_sent_is_told_and_not_shown(server: FakeServer, key: str) -> None:
    connection = ServerConnection(server.url, key)
    with pytest.raises(CommandFailed) as caught:
        connection.call("GET", ["a"])

    assert server.asked == []
    assert str(caught.value).startswith("the key ")
    assert KEY not in str(caught.value) + repr(connection)


@pytest.mark.parametrize("name", ["a b", "a/b", "..", ".", "a/../b", "a?b#c", "%2e", "ä"])
def test_a_name_is_a_part_of_the_path_with_its_own_slashes(server: FakeServer, name: str) -> None:
    ServerConnection(server.url).call("GET", ("x", name, "y"), params={"q": "1 2"})

    path, _, query = server.asked[0][0].removeprefix("GET ").partition("?")
    assert unquote(path) == f"/x/{name}/y"
    assert not {"..", "."} & set(path.split("/")) and path.count("/") == 3 + name.count("/")
    assert query in ("q=1+2", "q=1%202")


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY"])
def test_a_server_elsewhere_is_asked_through_the_environments_proxy_where_that_is_wanted(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    proxy = server.url.removeprefix("http://") if variable == "http_proxy" else server.url
    monkeypatch.setenv(variable, proxy)
    server.reply = json.dumps({"proxied": True}).encode()

    reply = ServerConnection(ELSEWHERE, through_proxy=True).call("GET", ["a"])

    assert reply.body == {"proxied": True}
    assert server.asked[0][0] == f"GET {ELSEWHERE}/a"
    monkeypatch.setenv("no_proxy", "models.invalid")
    for connection in (ServerConnection(ELSEWHERE, through_proxy=True), ServerConnection(ELSEWHERE)):
        with pytest.raises(CommandFailed, match="the host is not known"):
            connection.call("GET", ["a"])
    assert len(server.asked) == 1


@pytest.mark.parametrize("through_proxy", [True, False])
def test_this_machine_is_never_asked_through_a_proxy(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, through_proxy: bool
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1")
    for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
        ServerConnection(url, through_proxy=through_proxy).call("GET", ["a"])

    assert [asked for asked, _, _ in server.asked] == ["GET /a", "GET /a"]


def test_a_proxy_that_is_not_there_or_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = ServerConnection(ELSEWHERE, through_proxy=True)
    monkeypatch.setenv("http_proxy", "http://user:word@127.0.0.1:1")
    with pytest.raises(CommandFailed, match=f"no server answers at {ELSEWHERE} through the proxy 127.0.0.1"):
        connection.call("GET", ["a"])
    for wrong in ("socks5://127.0.0.1:1", "http://user:word@host:port", "http://"):
        monkeypatch.setenv("http_proxy", wrong)
        with pytest.raises(CommandFailed, match="HTTP_PROXY is not the URL of a proxy") as caught:
            connection.call("GET", ["a"])
        assert "word" not in str(caught.value)


def test_a_command_that_asks_no_server_does_not_import_httpx() -> None:
    script = "import sys, loramux_server.client.adapters, loramux_server.cli.main; print('httpx' in sys.modules)"
    environ: dict[str, Any] = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environ)

    assert done.stdout == "False\n"
