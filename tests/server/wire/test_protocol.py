"""Connections as a network has them: slow, silent, greedy or broken, over real sockets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from loramux_server.wire.connections import Cut
from loramux_server.wire.transport import CountedTransport
from support.wired import wired

GET = b"GET /%s HTTP/1.1\r\nHost: here\r\n\r\n"
LAST = b"GET /%s HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"


class Application:
    """/hold answers when told to, /flood never ends, /drip goes byte by byte, /read wants the whole body first."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.left: list[str] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/hold":
            await self.go_on.wait()
        body = b""
        if scope["path"] == "/read":
            while (message := await receive())["type"] == "http.request":
                body += message["body"]
                if not message["more_body"]:
                    break
            self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while scope["path"] == "/flood":
            await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
            if await is_gone(receive):
                self.left.append("flood")
                return
        if scope["path"] == "/drip":
            for _ in range(100):
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
                await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"done"})


async def is_gone(receive: Any) -> bool:
    try:
        async with asyncio.timeout(0.001):
            while (await receive())["type"] != "http.disconnect":
                pass
    except TimeoutError:
        return False
    return True


@pytest.fixture
def app() -> Application:
    return Application()


def answer(raw: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of a reply that was not wanted."""
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.anyio
async def test_requests_are_answered_one_after_the_other_on_one_connection(app: Application) -> None:
    async with wired(app) as server:
        assert (await server.ask(GET % b"a" + LAST % b"b")).count(b"done") == 2
        await server.until(open=0, busy=0)


# deadlines


@pytest.mark.anyio
async def test_a_header_that_comes_byte_by_byte_wins_no_time(app: Application) -> None:
    async with wired(app, header_seconds=0.3) as server:
        client = await server.connect()
        for byte in b"GET / HTTP/1.1\r\nHost: " + b"x" * 1000:
            client.writer.write(bytes([byte]))
            await asyncio.sleep(0.01)
            if server.cuts(Cut.HEADER_TOO_SLOW):
                break
        status, error = answer(await client.rest())
        assert (status, error["code"], server.cuts(Cut.HEADER_TOO_SLOW)) == (408, "header_too_slow", 1)


@pytest.mark.anyio
async def test_a_connection_that_says_nothing_is_closed_without_a_word(app: Application) -> None:
    async with wired(app, header_seconds=0.2) as server:
        assert await server.ask(b"") == b""
        assert server.cuts(Cut.HEADER_TOO_SLOW) == 1


@pytest.mark.anyio
async def test_the_header_of_a_second_request_has_its_own_deadline(app: Application) -> None:
    async with wired(app, header_seconds=0.3) as server:
        client = await server.connect(GET % b"a")
        while await client.line() != b"\r\n":
            pass
        await asyncio.sleep(0.5)  # between requests nothing is due
        client.writer.write(b"GET /")
        assert b"408" in await client.rest()


@pytest.mark.anyio
async def test_a_request_may_take_longer_than_any_header(app: Application) -> None:
    async with wired(app, header_seconds=0.1) as server:
        client = await server.connect(LAST % b"hold")
        await asyncio.sleep(0.4)
        app.go_on.set()
        assert b"done" in await client.rest()


@pytest.mark.anyio
async def test_who_goes_on_sending_a_body_that_has_its_answer_is_cut(app: Application) -> None:
    async with wired(app, stall_seconds=0.3) as server:
        client = await server.connect(b"POST /a HTTP/1.1\r\nHost: here\r\nContent-Length: 9999\r\n\r\n")
        for _ in range(200):
            client.writer.write(b"x")
            await asyncio.sleep(0.02)
            if not server.connections.readings().open:
                break
        assert server.cuts(Cut.BODY_UNREAD) == 1


@pytest.mark.anyio
async def test_a_reader_that_stops_reading_is_cut_and_its_request_ends(
    app: Application, caplog: pytest.LogCaptureFixture
) -> None:
    async with wired(app, stall_seconds=0.3) as server:
        client = await server.connect(GET % b"flood")
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # of a transport that reads
        await server.until(open=0, busy=0)
        assert (server.cuts(Cut.READER_TOO_SLOW), app.left) == (1, ["flood"])
        assert "a reply to 127.0.0.1 is given up" in caplog.text


@pytest.mark.anyio
async def test_a_reader_that_is_slow_but_not_too_slow_gets_it_all(app: Application) -> None:
    async with wired(app, stall_seconds=3.0, bytes_per_second=1000) as server:
        client = await server.connect(GET % b"flood")
        for _ in range(100):
            await client.reader.readexactly(2**15)
            await asyncio.sleep(0.04)
        assert server.cuts(Cut.READER_TOO_SLOW) == 0


@pytest.mark.anyio
@pytest.mark.parametrize("behind", [0, 5])
async def test_a_reply_that_comes_slower_than_readers_must_read_is_not_its_readers_fault(
    app: Application, behind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a stream of tokens. A few bytes are always under way to a client that is far away."""
    left = CountedTransport.left
    monkeypatch.setattr(CountedTransport, "left", lambda sink: left(sink) + min(behind, sink.written))
    async with wired(app, stall_seconds=0.3) as server:
        assert b"done" in await server.ask(LAST % b"drip")
        assert server.cuts(Cut.READER_TOO_SLOW) == 0


# places


@pytest.mark.anyio
async def test_idle_connections_make_room_the_oldest_first(app: Application) -> None:
    async with wired(app, cap=4) as server:
        idle = [await server.connect() for _ in range(60)]
        await server.until(open=20)  # the cap, and the reserve
        assert b"done" in await server.ask(LAST % b"a")
        assert await idle[0].rest() == b""
        assert server.cuts(Cut.IDLE) >= 40
        assert not idle[-1].reader.at_eof()


@pytest.mark.anyio
async def test_where_all_are_busy_new_ones_wait_for_the_end_of_one(app: Application) -> None:
    async with wired(app, cap=4) as server:
        for _ in range(20):
            await server.connect(LAST % b"hold")
        await server.until(open=20, busy=20)
        client = await server.connect(LAST % b"a")
        await asyncio.sleep(0.1)
        assert server.connections.readings().open == 20
        app.go_on.set()
        assert b"done" in await client.rest()


@pytest.mark.anyio
async def test_readers_that_stop_reading_do_not_keep_everybody_out(
    app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux_server.wire.protocol.LAG_SECONDS", 0.2)
    async with wired(app, cap=4) as server:
        for _ in range(40):
            client = await server.connect(GET % b"flood")
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # of a transport that reads
        assert b"done" in await server.ask(LAST % b"a")
        assert server.cuts(Cut.LAGGING) >= 1
        assert server.cuts(Cut.READER_TOO_SLOW) == 0


@pytest.mark.anyio
async def test_without_descriptors_it_tries_again_a_second_later(
    app: Application, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from loramux_server.wire import acceptor

    monkeypatch.setattr(acceptor, "RETRY_SECONDS", 0.1)
    async with wired(app) as server:
        listener = server.acceptor._listener
        tries = []

        class Exhausted:
            """The listener of a process without descriptors, twice."""

            def __getattr__(self, name: str) -> Any:
                return getattr(listener, name)

            def accept(self) -> Any:
                tries.append(1)
                if len(tries) <= 2:
                    raise OSError(errno.EMFILE, "Too many open files")
                return listener.accept()

        monkeypatch.setattr(server.acceptor, "_listener", Exhausted())
        assert b"done" in await server.ask(LAST % b"a")
        assert caplog.text.count("no connection can be accepted now: Too many open files") == 2


# bytes that are no HTTP


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("request_bytes", "status", "reason"),
    [
        (b"hello\r\n\r\n", 400, "illegal request line"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "Host"),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400, "must end with CR LF"),
        (b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400, "must end with CR LF"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n", 400, "must not go on in the next line"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX : b\r\n\r\n", 400, "illegal header line"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +4\r\n\r\nbody", 400, "Content-Length"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -4\r\n\r\nbody", 400, "Content-Length"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x4\r\n\r\nbody", 400, "Content-Length"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4, 5\r\n\r\nbody", 400, "conflicting Content-Length"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nbody", 400, "conflicting"),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            "not both",
        ),
        (b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "HTTP/1.0 has no"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501, "chunked is supported"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n", 501, "chunked is supported"),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            501,
            "multiple Transfer-Encoding",
        ),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431, "more than 128 header lines"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000, 431, "more than 65536 bytes"),
    ],
)
async def test_what_could_be_read_in_two_ways_is_refused_with_its_reason_and_closed(
    app: Application, request_bytes: bytes, status: int, reason: str
) -> None:
    async with wired(app) as server:
        told, error = answer(await server.ask(request_bytes + GET % b"smuggled"))
        assert told == status
        assert reason in error["message"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "body",
    [b"zz\r\n", b"5\nabcde\r\n", b"5\r\nabcdefg\r\n", b"-5\r\nabcde\r\n", b"5" * 30 + b"\r\n", b"5;" + b"x" * 70_000],
)
async def test_a_body_in_malformed_chunks_is_refused(
    app: Application, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /read HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with wired(app) as server:
        status, _ = answer(await server.ask(head + body))
        assert status in (400, 431)
        await asyncio.sleep(0.05)
    assert app.bodies == [b""]
    assert "Traceback" not in caplog.text and "Exception" not in caplog.text


@pytest.mark.anyio
async def test_a_malformed_rest_of_a_body_that_has_its_answer_ends_the_connection(
    app: Application, caplog: pytest.LogCaptureFixture
) -> None:
    async with wired(app) as server:
        client = await server.connect(b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        while await client.line() != b"\r\n":
            pass
        client.writer.write(b"zz\r\n")
        assert b"HTTP/1.1" not in await client.rest()
    assert "Traceback" not in caplog.text


@pytest.mark.anyio
async def test_a_body_in_tiny_chunks_is_refused_and_one_in_small_chunks_is_read(app: Application) -> None:
    head = b"POST /read HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    async with wired(app) as server:
        assert b"done" in await server.ask(head + b"1\r\nx\r\n" * 900 + b"0\r\n\r\n")
        assert b"done" in await server.ask(head + b"80\r\n%b\r\n" % bytes(128) * 2000 + b"0\r\n\r\n")
        status, error = answer(await server.ask(head + b"1\r\nx\r\n" * 5000))
    assert (status, "less than 64 bytes" in error["message"]) == (400, True)
    assert [len(body) for body in app.bodies[:2]] == [900, 256_000]


@pytest.mark.anyio
async def test_equal_lengths_given_twice_are_one(app: Application) -> None:
    head = b"POST /read HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\n"
    async with wired(app) as server:
        assert b"done" in await server.ask(head + b"body")
    assert app.bodies == [b"body"]
