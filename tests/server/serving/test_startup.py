from __future__ import annotations

import gc
import logging
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loramux_server.errors import BaseModelError, CommandFailed
from loramux_server.serving.startup import Stages, StartupApp, in_daemon_thread, take_port, url_of


def ticking() -> Callable[[], float]:
    """A clock that moves by one second each time it is read."""
    readings = iter(range(1000))
    return lambda: float(next(readings))


async def answers(app: StartupApp, path: str) -> tuple[int, bytes]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing to receive")

    await app({"type": "http", "path": path}, receive, send)
    return sent[0]["status"], sent[1]["body"]


def test_a_stage_names_itself_first_and_its_seconds_last() -> None:
    text: list[str] = []
    stages = Stages(text.append, ticking())

    with stages.stage("load"):
        assert text == ["  load ..."]

    assert "".join(text) == "  load ... 1.0 s\n"
    assert stages.seconds == {"load": 1.0}


def test_progress_is_told_every_few_seconds_and_no_more_often() -> None:
    text: list[str] = []
    seconds = iter([0.0, 1.0, 4.9, 5.0, 9.0, 10.5, 11.0])
    stages = Stages(text.append, lambda: next(seconds))

    with stages.stage("capture"):
        for part in range(1, 6):
            stages.progress(f"part {part}")

    assert "".join(text) == "  capture ...\n  part 3\n  part 5\n  capture 11.0 s\n"


@pytest.fixture
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_garbage_is_not_looked_for_while_libraries_are_imported(
    unfrozen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text: list[str] = []
    stages, before = Stages(text.append, ticking()), gc.get_freeze_count()
    monkeypatch.setitem(sys.modules, "torch", sys)
    with stages.imports():
        assert gc.isenabled(), "what is imported already takes no time, and must stay as it is"
    assert gc.get_freeze_count() == before
    monkeypatch.delitem(sys.modules, "torch", raising=False)

    with pytest.raises(ImportError), stages.imports():
        assert not gc.isenabled()
        raise ImportError

    with stages.imports():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > before
    assert "".join(text) == "  import libraries ... 1.0 s\n  import libraries ...\n  import libraries ... 1.0 s\n"


def test_a_note_within_a_stage_gets_a_line_of_its_own() -> None:
    text: list[str] = []
    stages = Stages(text.append, ticking())

    with stages.stage("load"):
        stages.note("converting, once")
    stages.note("after")

    assert "".join(text) == "  load ...\n  converting, once\n  load 1.0 s\n  after\n"


def test_what_is_logged_within_a_stage_begins_a_line_of_its_own() -> None:
    text: list[str] = []
    stages = Stages(text.append, ticking())
    handler, root, logger = logging.Handler(), logging.getLogger(), logging.getLogger("of.the.tests")
    logger.setLevel(logging.WARNING)  # whatever the root's is by now
    handler.emit = lambda record: text.append(f"{record.getMessage()}\n")  # type: ignore[method-assign]
    root.addHandler(handler)
    try:
        with stages.stage("check"):
            logger.warning("module by module")
            logger.warning("it is slow")
    finally:
        root.removeHandler(handler)

    assert "".join(text) == "  check ...\nmodule by module\nit is slow\n  check 1.0 s\n"
    assert not handler.filters


def test_a_stage_that_fails_ends_its_line_and_counts_no_seconds() -> None:
    text: list[str] = []
    stages = Stages(text.append, ticking())

    with pytest.raises(BaseModelError), stages.stage("load"):
        raise BaseModelError("no")

    assert "".join(text) == "  load ...\n"
    assert stages.seconds == {}


@pytest.mark.anyio
async def test_the_door_is_alive_but_not_ready_until_it_is_opened() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 418, "headers": []})
        await send({"type": "http.response.body", "body": b"tea"})

    port = StartupApp()
    assert await answers(port, "/health") == (200, b'{"status": "loading"}')
    status, body = await answers(port, "/v1/models")
    assert status == 503
    assert b'"type": "server_error"' in body

    port.hand_over_to(app)
    assert await answers(port, "/health") == (418, b"tea")


def test_a_port_is_taken_at_once_and_only_once() -> None:
    with take_port("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=5).close()

        with pytest.raises(CommandFailed, match=f"port {port} on 127.0.0.1 is in use"):
            take_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["203.0.113.1", "name.invalid"])
def test_an_address_of_another_machine_cannot_be_listened_on(host: str) -> None:
    with pytest.raises(CommandFailed, match=f"cannot listen on {host}"):
        take_port(host, 8000)


def test_the_url_of_a_wildcard_address_is_one_that_works_from_here() -> None:
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("localhost", "127.0.0.1")):
        with take_port(host, 0) as listener:
            assert url_of(listener) == f"http://{shown}:{listener.getsockname()[1]}"


def test_work_in_a_daemon_thread_hands_over_its_result_or_its_error() -> None:
    def fail() -> None:
        raise BaseModelError("no")

    assert in_daemon_thread(lambda: 7).result(timeout=5) == 7
    assert isinstance(in_daemon_thread(fail).exception(timeout=5), BaseModelError)
