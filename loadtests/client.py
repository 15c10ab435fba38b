"""Closed-loop clients over HTTP/1.1 and SSE that cost next to nothing while the clock runs.

On a small machine a comfortable HTTP client takes processor time from the server it measures. Here a connection only
notes when bytes arrived; replies are taken apart after the run. One connection per request.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from .errors import LoadTestError
from .reply import split_reply
from .workload import Request

VERSION = "x-loramux-adapter-version"  # of a reply: the version of the adapter that answered


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and what each body carries besides prompt, model and max_tokens.

    Attributes:
        url: scheme, host and port; http only.
        base_model: the name that asks the bare base.
        extra: more fields of every body, such as {"ignore_eos": true} for a server that knows it.
        choose: an adapter's name -> the fields that ask for it, for a server that does not take it as the model.
    """

    url: str
    base_model: str
    api_key: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    choose: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return address_of(self.url)

    def encode(self, request: Request) -> bytes:
        """The whole HTTP request: a greedy streamed completion with usage in the last event."""
        body = json.dumps(
            {
                **self._model(request.adapter),
                "prompt": request.prompt,
                "max_tokens": request.max_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                **self.extra,
            }
        ).encode()
        head = [
            "POST /v1/completions HTTP/1.1",
            "Host: {}:{}".format(*self.address),
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        if self.api_key is not None:
            head.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([*head, "", ""]).encode() + body

    def _model(self, adapter: str | None) -> Mapping[str, Any]:
        if adapter is None or self.choose is None:
            return {"model": adapter or self.base_model}
        return self.choose[adapter]


def address_of(url: str) -> tuple[str, int]:
    """Host and port of an http:// address."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise LoadTestError(f"{url!r} is not an http:// address")
    return parts.hostname, parts.port or 80


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of one request. Times are seconds of the run's own clock.

    Attributes:
        prompt: what was asked.
        version: of the adapter that answered, as the server says; None where it says nothing.
        text: the reply.
        stamps: when each event that carried text arrived; an event may carry more than one token.
        tokens: of the reply as the server's usage says; the number of events where the reply was cut.
        finish: the finish_reason; None where the reply did not come to its end.
        error: one sentence, None where there was none.
    """

    adapter: str | None
    prompt: str
    started: float
    ended: float
    version: str | None = None
    text: str = ""
    stamps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    finish: str | None = None
    error: str | None = None

    @property
    def first_token_seconds(self) -> float | None:
        """Sent to first text."""
        return self.stamps[0] - self.started if self.stamps else None

    @property
    def inter_token_seconds(self) -> list[float]:
        """Between one event with text and the next."""
        return [later - earlier for earlier, later in zip(self.stamps, self.stamps[1:], strict=False)]

    @property
    def end_to_end_seconds(self) -> float:
        return self.ended - self.started


@dataclass(slots=True)
class Run:
    """A whole run: outcomes in the order in which requests were sent.

    Attributes:
        began: when the run's own clock was 0, as `time.perf_counter` tells.
        seconds: first request sent to last reply ended.
        client_cpu_seconds: processor time of this process meanwhile: what the measuring took from the machine.
        cut: requests still open when time was up; their tokens count, they are no errors.
    """

    clients: int
    outcomes: list[Outcome]
    began: float
    seconds: float
    client_cpu_seconds: float
    cut: int = 0


class _Exchange(asyncio.Protocol):
    """One request on one connection: sends it, then notes (time, bytes) of whatever comes until the server closes."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self.received: list[tuple[float, bytes]] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._payload)

    def data_received(self, data: bytes) -> None:
        self.received.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            if exc is None:
                self.closed.set_result(None)
            else:
                self.closed.set_exception(exc)


@dataclass(slots=True)
class _Record:
    """What one exchange left behind, to be read after the run."""

    request: Request
    started: float
    ended: float = 0.0
    received: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None
    cut: bool = False


async def _client(target: Target, queue: Iterator[Request], deadline: float, records: list[_Record]) -> None:
    """One closed-loop client: the next request is sent when the reply before it has ended."""
    loop = asyncio.get_running_loop()
    host, port = target.address
    for request in queue:
        started = time.perf_counter()
        if started >= deadline:
            return
        record = _Record(request, started)
        records.append(record)
        exchange = _Exchange(target.encode(request))
        transport: asyncio.BaseTransport | None = None
        try:
            async with asyncio.timeout(deadline - started):
                transport, _ = await loop.create_connection(lambda it=exchange: it, host, port)  # type: ignore[misc]
                await exchange.closed
        except TimeoutError:
            record.cut = True
        except OSError as error:
            record.error = f"connection: {type(error).__name__}"
        finally:
            if transport is not None:
                transport.close()
        record.ended = time.perf_counter()
        record.received = exchange.received


async def run_clients(target: Target, requests: Iterable[Request], *, clients: int, seconds: float) -> Run:
    """Send the requests with `clients` closed-loop clients; what is open after `seconds` is cut off."""
    records: list[_Record] = []
    queue = iter(requests)
    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(_client(target, queue, started + seconds, records) for _ in range(clients)))
    ended, cpu = time.perf_counter(), time.process_time() - cpu
    outcomes = [_read(record, started) for record in records]
    return Run(clients, outcomes, started, ended - started, cpu, sum(record.cut for record in records))


def _read(record: _Record, zero: float) -> Outcome:
    """Take one reply apart. Times become seconds since `zero`."""
    asked = record.request
    outcome = Outcome(
        adapter=asked.adapter,
        prompt=asked.prompt,
        started=record.started - zero,
        ended=record.ended - zero,
        error=record.error,
    )
    if outcome.error is not None:
        return outcome
    try:
        reply = split_reply(record.received)
    except ValueError as error:
        outcome.error = None if record.cut else str(error)
        return outcome
    if reply.status != 200:
        outcome.error = f"status {reply.status}"
        return outcome
    outcome.version = reply.headers.get(VERSION)
    done = False
    for at, data in reply.events:
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        if "error" in event:
            outcome.error = f"error event: {event['error'].get('message')}"
        for choice in event.get("choices", ()):
            if choice.get("text"):
                outcome.text += choice["text"]
                outcome.stamps.append(at - zero)
            outcome.finish = choice.get("finish_reason") or outcome.finish
        if usage := event.get("usage"):
            outcome.prompt_tokens, outcome.tokens = usage["prompt_tokens"], usage["completion_tokens"]
    outcome.tokens = outcome.tokens or len(outcome.stamps)
    if not done and not record.cut and outcome.error is None:
        outcome.error = "the stream ended without [DONE]"
    return outcome
