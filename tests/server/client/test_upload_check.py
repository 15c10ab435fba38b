"""Whether a server would take an adapter is known before it is made."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from loramux_server.client.upload_check import check_upload
from loramux_server.errors import CommandFailed

MODELS = {"data": [{"id": "pirate", "parent": "tiny", "root": "1"}, {"id": "tiny", "parent": None, "root": "f" * 64}]}
NOT_FOUND = (404, {"error": {"message": "there is no adapter spam"}})


class Server:
    """Answers each path with a status and an object; remembers the keys it was shown."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, object]] = {"/v1/models": (200, MODELS)}
        self.keys: set[str | None] = set()
        self.url = ""

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.keys.add(self.headers["authorization"])
                status, body = server.answers.get(self.path, NOT_FOUND)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    with HTTPServer(("127.0.0.1", 0), made.handler()) as listener:
        made.url = f"http://127.0.0.1:{listener.server_port}"
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        yield made
        listener.shutdown()
        thread.join()


def test_a_server_that_would_take_it_says_which_base_it_holds(server: Server) -> None:
    assert check_upload(server.url, "key", "spam") == "f" * 64  # a new name
    server.answers["/v1/adapters/spam/archive"] = (200, {})
    assert check_upload(server.url, "key", "spam") == "f" * 64  # one that gets a new version
    assert server.keys == {"Bearer key"}


@pytest.mark.parametrize(
    ("status", "message", "says"),
    [
        (401, "wrong key", "the server refused \\(401\\): wrong key; set LORAMUX_ADMIN_KEY"),
        (403, "this key does not reach adapter management", "403.*set LORAMUX_ADMIN_KEY"),
        (400, "tiny is the base", "400.*tiny is the base"),
    ],
)
def test_a_server_that_would_not_take_it_says_why(server: Server, status: int, message: str, says: str) -> None:
    server.answers["/v1/adapters/spam/archive"] = (status, {"error": {"message": message}})

    with pytest.raises(CommandFailed, match=f"--upload {server.url}: .*{says}"):
        check_upload(server.url, "key", "spam")


def test_what_answers_in_another_way_is_no_server_of_ours(server: Server) -> None:
    server.answers["/v1/models"] = (200, {"data": []})
    with pytest.raises(CommandFailed, match="--upload: .*lists no base model; is it a loramux server"):
        check_upload(server.url, None, "spam")
    with pytest.raises(CommandFailed, match="--upload: 'ftp://x' is not a URL"):
        check_upload("ftp://x", None, "spam")


def test_where_nobody_answers_that_is_said(server: Server) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as unused:
        url = f"http://127.0.0.1:{unused.server_port}"
    with pytest.raises(CommandFailed, match="--upload: no server answers at"):
        check_upload(url, None, "spam")


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_busy_or_still_starting_may_take_it_later(server: Server, status: int) -> None:
    server.answers["/v1/models"] = (status, {"error": {"message": "The server is still starting."}})

    assert check_upload(server.url, "key", "spam") is None
