"""`loramux adapters` against a small HTTP server that answers as ours does."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loramux_server.cli import adapters as cli_adapters
from loramux_server.cli import main as cli
from loramux_server.cli.screen import TransferBar
from loramux_server.client.adapters import AdaptersClient
from loramux_server.client.retry import Patience
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
    headers: dict[str, str] = field(default_factory=dict)  # of every answer
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
                for name, value in server.headers.items():
                    self.send_header(name, value)
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
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Times are shown in UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


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


def test_list_prints_a_table(server: FakeServer, capsys: pytest.CaptureFixture[str], utc: None) -> None:
    full = SPAM | {"updated": 86400, "pinned": True, "layers": {"adapted": 14, "of": 28}, "fingerprint": "skipped"}
    big = {"name": "org/longer-name", "version": "sha256:" + VERSION, "rank": 64, "bytes": 5 << 30, "corrupt": True}
    server.answers["GET /v1/adapters"] = (200, {"object": "list", "data": [full, big]})

    assert loramux(server, "list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "name             version       rank  layers    size       tier    updated           notes",
        "spam             3f786850e387  8     14 of 28  900.0 KiB  device  1970-01-02 00:00  "
        "pinned, fingerprint not replayed",
        "org/longer-name  3f786850e387  64    -         5.0 GiB    -       -                 DAMAGED",
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


SHOWN = {
    "id": "spam",
    "object": "adapter",
    **SPAM,
    "pinned": True,
    "corrupt": False,
    "base": "tiny-base",
    "fingerprint": "exact",
    "chat_template": "adapter",
    "requests": 2,
    "layers": {"adapted": 14, "of": 28},
    "created": 0,
    "updated": 86400,
    "notes": ["half of the layers have no adapter"],
    "news": ["of a later server"],
    "versions": [
        {"version": VERSION, "rank": 8, "bytes": 921_600, "tier": "device", "current": True, "created": 86400},
        {"version": "b" * 64, "rank": 4, "bytes": 512, "tier": "disk", "corrupt": True, "fingerprint": "skipped"},
    ],
}


def test_show_says_in_words_what_there_is_to_know(
    server: FakeServer, capsys: pytest.CaptureFixture[str], utc: None
) -> None:
    server.answers["GET /v1/adapters/spam"] = (200, SHOWN)

    assert loramux(server, "show", "spam") == 0
    assert capsys.readouterr().out.splitlines() == [
        "name         spam",
        f"version      {VERSION}",
        "rank         8",
        "layers       14 of 28",
        "modules      q_proj, v_proj",
        "size         900.0 KiB",
        "where        on the device",
        "pinned       yes, it stays in memory",
        "base         tiny-base, which the adapter names as its base",
        "template     its own",
        "fingerprint  replays bit for bit",
        "requests     2 running",
        "created      1970-01-01 00:00",
        "updated      1970-01-02 00:00",
        'news         ["of a later server"]',
        "notes        half of the layers have no adapter",
        "versions     3f786850e387, 1970-01-02 00:00, rank 8, 900.0 KiB, on the device, current",
        "             bbbbbbbbbbbb, -, rank 4, 512 B, on disk, DAMAGED, fingerprint not replayed",
    ]


def test_show_does_not_say_of_a_damaged_adapter_that_it_stays_in_memory(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["GET /v1/adapters/spam"] = (200, SHOWN | {"corrupt": True})

    assert loramux(server, "show", "spam") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("DAMAGED") and "pinned       yes, once it is uploaded again" in lines


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize("argv", [["list"], ["show", "spam"]])
def test_list_and_show_fit_the_terminal(
    server: FakeServer, argv: list[str], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", Terminal())
    server.answers["GET /v1/adapters"] = (200, {"data": [SHOWN, SHOWN | {"name": "organisation/adapter-of-it"}]})
    server.answers["GET /v1/adapters/spam"] = (200, SHOWN)

    assert loramux(server, *argv) == 0
    assert isinstance(sys.stdout, Terminal)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue()).splitlines()
    assert max(map(len, lines)) <= columns
    words = " ".join(lines).split()
    for word in ("spam", "3f786850e387", "pinned", "900.0", "14", "of", "28", "device"):
        assert any(word in each for each in words)


ODD = [
    {"name": 7}, {"name": ["a"]}, {"rank": "8"}, {"bytes": "many"}, {"tier": {}}, {"version": 3}, {"created": "today"},
    {"target_modules": "q_proj"}, {"layers": 3}, {"versions": {}}, {"versions": [1]}, {"versions": [[[]]]},
    {"versions": [{"rank": "8"}]}, {"notes": 1},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_server_whose_adapters_are_of_other_kinds_is_told(
    server: FakeServer, odd: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["GET /v1/adapters"] = (200, {"data": [SPAM, SPAM | odd]})
    server.answers["GET /v1/adapters/spam"] = (200, SPAM | odd)
    for argv in (["list"], ["show", "spam"]):
        assert loramux(server, *argv) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "tells of an adapter with the" in err
        assert "is it a loramux server?" in err


@pytest.mark.parametrize("odd", [{"created": 10**30}, {"bytes": -1}, {"layers": {"of": []}}, {"rank": True}], ids=str)
def test_numbers_that_mean_nothing_are_shown_as_they_are(server: FakeServer, odd: dict[str, Any]) -> None:
    server.answers["GET /v1/adapters/spam"] = (200, SPAM | odd)
    assert loramux(server, "show", "spam") == 0


def test_what_a_server_says_cannot_steer_the_terminal(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\x9b\u202e\nloramux: done"
    error = {"message": evil, "reasons": [evil, evil * 5000, *["x"] * 1000]}
    adapter = SPAM | {"name": evil, "tier": evil, "base": evil, "notes": [evil], "new": evil, "target_modules": [evil]}
    server.answers["GET /v1/adapters"] = (200, {"data": [adapter]})
    server.answers["GET /v1/adapters/spam"] = (200, adapter)
    server.answers["POST /v1/adapters/spam/rollback"] = (200, {"version": evil, "outcome": evil})
    server.answers["DELETE /v1/adapters/spam"] = (422, {"error": error})
    for argv in (["list"], ["show", "spam"], ["rollback", "spam"], ["rm", "spam"], ["list", "--json"]):
        loramux(server, *argv)
        said = "".join(capsys.readouterr())
        assert all(line.isprintable() and not line.startswith("loramux: done") for line in said.splitlines())
        assert len(said) < 10_000


def test_a_password_in_the_url_is_shown_nowhere(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server.answers["GET /v1/adapters"] = (200, b"<html>")
    for url in (
        f"http://user:word@127.0.0.1:{port}", server.url.replace("//", "//user:word@"), "http://user:word@host:port",
        "user:word@host", "http://user:wo/rd@host", "http://user:word@models.invalid", "http://user:word@",
    ):  # fmt: skip
        assert loramux(server, "list", "--url", url) == 1
        said = capsys.readouterr().err
        assert "word" not in said and "rd@" not in said and "***@" in said


def test_push_waits_for_a_busy_server_and_says_why(
    server: FakeServer, adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = (503, {"error": {"message": "too many uploads at the same time"}})
    done = (201, {"version": VERSION, "outcome": "created"})
    replies = [busy, busy, done]
    server.answers["PUT /v1/adapters/spam"] = busy
    server.headers = {"retry-after": "7"}
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        server.answers["PUT /v1/adapters/spam"] = replies[len(slept)]

    monkeypatch.setattr(cli_adapters, "Patience", lambda seconds, tell: Patience(seconds, tell, sleep))
    assert loramux(server, "push", str(adapter)) == 0
    out, err = capsys.readouterr()
    assert out == "spam created, version 3f786850e387\n" and slept == [7, 7]
    first = "the server refused (503): too many uploads at the same time; trying again in 7 s, for at most 300 s"
    assert err.splitlines()[0] == first and len(err.splitlines()) == 2
    assert len(server.asked) == 3 and all(b"weights" * 1000 in body for _, _, body in server.asked)


def test_ctrl_c_ends_a_push_that_waits_at_once(server: FakeServer, adapter: Path) -> None:
    server.answers["PUT /v1/adapters/spam"] = (503, {"error": {"message": "busy"}})
    server.headers = {"retry-after": "60"}
    script = "import sys; from loramux_server.cli.main import main; sys.exit(main())"
    pushing = subprocess.Popen(
        [sys.executable, "-c", script, "adapters", "push", str(adapter), "--url", server.url],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert pushing.stderr is not None
    try:
        assert "trying again in 60 s" in pushing.stderr.readline()
        pushing.send_signal(signal.SIGINT)
        _, said = pushing.communicate(timeout=10)
        assert (pushing.returncode, said) == (130, "loramux: interrupted\n")
    finally:
        pushing.kill()


def test_push_does_not_wait_where_it_shall_not(
    server: FakeServer, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["PUT /v1/adapters/spam"] = (503, {"error": {"message": "busy"}})
    assert loramux(server, "push", str(adapter), "--wait", "0") == 1
    assert capsys.readouterr().err == "loramux: the server refused (503): busy\n" and len(server.asked) == 1
    assert loramux(server, "push", str(adapter), "--wait", "-1") == 2
    assert "--wait" in capsys.readouterr().err


def test_push_can_skip_the_replay_and_tells_what_is_out_of_the_ordinary(
    server: FakeServer, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = {"version": VERSION, "fingerprint": "skipped", "notes": ["a\x1bb"]}
    server.answers["PUT /v1/adapters/spam?skip_replay=true"] = (201, part)
    assert loramux(server, "push", str(adapter), "--skip-replay") == 0
    assert capsys.readouterr().out.splitlines() == [
        "spam created, version 3f786850e387",
        "  its fingerprint was not replayed",
        "  a\\x1bb",
    ]


def test_push_of_a_directory_whose_name_is_none_asks_for_one(
    server: FakeServer, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = adapter.rename(adapter.with_name("my adapter"))
    assert loramux(server, "push", str(odd)) == 2
    assert "give one with --name" in capsys.readouterr().err
    server.answers["PUT /v1/adapters/org/spam"] = (201, {"version": VERSION})
    assert loramux(server, "push", str(odd), "--name", "org/spam") == 0


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
    for name in ("../models?x=1#y", "a//b", "a/pin", "a:b", "a@b", ""):
        for argv in (["rm", name], ["show", name], ["pin", name], ["rollback", name], ["pull", name, "new"]):
            assert loramux(server, *argv) == 2
    assert server.asked == []


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
    message = f"no server answers at http://127.0.0.1:{port}; start one with `loramux serve`, or give another URL"
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
        bar = TransferBar(stream)
        for done in (1 << 20, 2 << 20, 4 << 20):
            bar.show(done, 4 << 20)
        bar.line("the server is busy")
        bar.end()

    assert "100%" in terminal.getvalue() and "4.0/4.0 MiB" in terminal.getvalue()
    assert terminal.getvalue().endswith("the server is busy\n")
    assert file.getvalue() == "the server is busy\n"
    TransferBar(unused := Terminal()).end()
    assert not unused.getvalue()


def test_a_bar_makes_way_for_why_the_upload_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    bar = TransferBar(terminal := Terminal())
    bar.show(4 << 20, 4 << 20)
    bar.line("the server is busy")

    *_, erased, said, end = re.split(r"(\x1b\[2K|\n)", terminal.getvalue())[-4:]
    assert (erased, said, end) == ("the server is busy", "\n", "")
    assert "\x1b[1A\x1b[2K" in terminal.getvalue()  # up, and the line is empty


def test_remarks_wrap_before_a_list_is_no_table_any_more(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    remarkable = SPAM | {"name": "a-name-of-20-letters", "fingerprint": "skipped", "pinned": True}
    server.answers["GET /v1/adapters"] = (200, {"data": [remarkable]})
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", Terminal())

    assert loramux(server, "list") == 0

    assert isinstance(sys.stdout, Terminal)
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue())
    lines = [line.rstrip() for line in drawn.splitlines() if line.strip()]
    assert [line.split()[-1] for line in lines[2:]] == ["fingerprint", "replayed"]
    assert lines[2].split()[:2] == ["a-name-of-20-letters", "3f786850e387"]


def test_a_table_is_drawn_on_a_terminal_and_says_the_same(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["GET /v1/adapters"] = (200, {"data": [SPAM | {"name": "[red]spam"}]})
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", Terminal())

    assert loramux(server, "list") == 0

    assert isinstance(sys.stdout, Terminal)
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue())
    assert [line.split() for line in drawn.splitlines() if "spam" in line or "name" in line] == [
        ["name", "version", "rank", "layers", "size", "tier", "updated", "notes"],
        ["[red]spam", "3f786850e387", "8", "-", "900.0", "KiB", "device", "-"],
    ]
    assert "──" in drawn
