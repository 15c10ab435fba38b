"""The asyncio facade: streams, leaving early, an engine that dies or drains."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from loramux_server.engine.client import EngineClient
from loramux_server.engine.engine import MAX_FAILED_STEPS
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.sequence import FinishReason, Sequence, TokenOutput
from loramux_server.errors import EngineDead, RequestError, ServerBusy, ServerDraining
from support.fakes_engine import sequence, solo_reply
from support.fakes_rig import Rig

pytestmark = pytest.mark.anyio


class Served:
    """A rig behind a client."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.client = EngineClient(rig.engine, in_host=lambda version: version in rig.host.states)

    async def __aenter__(self) -> Served:
        await self.client.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.rig.runner.gate.set()
        await self.client.drain(10)
        assert not self.client._streams
        assert self.rig.blocks.used == 0 and not self.rig.slots.pinned and not self.rig.host.pinned


async def reply(client: EngineClient, one: Sequence) -> list[TokenOutput]:
    return [output async for output in client.generate(one)]


async def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.001)


async def start_reading(stream: AsyncIterator[TokenOutput]) -> TokenOutput:
    return await anext(stream)


async def test_many_streams_at_once_each_get_their_own_reply() -> None:
    async with Served(Rig(max_waiting=100)) as served:
        sequences = [sequence(str(i), max_tokens=1 + i % 5, version=[None, "v", "w"][i % 3]) for i in range(40)]
        replies = await asyncio.gather(*(reply(served.client, one) for one in sequences))
        for one, outputs in zip(sequences, replies, strict=True):
            assert [output.token_id for output in outputs] == solo_reply(one)
            assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]


async def test_a_step_crosses_to_the_loop_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(config=SchedulerConfig(max_num_seqs=8))
    served = Served(rig)
    crossings: list[int] = []
    dispatch = served.client._dispatch

    def counted(outputs: list[tuple[str, TokenOutput]]) -> None:
        crossings.append(len(outputs))
        dispatch(outputs)

    monkeypatch.setattr(served.client, "_dispatch", counted)
    async with served:
        rig.runner.gate.clear()
        streams = [asyncio.create_task(reply(served.client, sequence(str(i), max_tokens=3))) for i in range(4)]
        await eventually(lambda: len(served.client._streams) == 4)
        rig.runner.gate.set()
        await asyncio.gather(*streams)
    assert sum(crossings) == 12 and len([count for count in crossings if count]) == len(rig.runner.batches)


async def test_closing_a_stream_aborts_its_sequence() -> None:
    async with Served(Rig(num_blocks=30_000)) as served:
        stream = served.client.generate(sequence("one", max_tokens=100_000))  # more than it can have said until then
        await start_reading(stream)
        await stream.aclose()
        await eventually(lambda: served.rig.metrics.of("aborted") == [()])
        assert not served.client._streams


async def test_cancelling_a_reader_aborts_its_sequence() -> None:
    async with Served(Rig(instant=False)) as served:
        reader = asyncio.create_task(reply(served.client, sequence("one", version="v")))
        await eventually(lambda: served.rig.host.loading == ["v"])
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await eventually(lambda: served.rig.metrics.of("aborted") == [()])


async def test_a_stream_that_was_read_to_its_end_aborts_nothing() -> None:
    async with Served(Rig()) as served:
        stream = served.client.generate(sequence("one", max_tokens=1))
        assert (await start_reading(stream)).finish_reason is FinishReason.LENGTH
        await stream.aclose()
        await reply(served.client, sequence("two"))
        assert served.rig.metrics.of("aborted") == []


async def test_a_stream_that_was_never_read_submits_nothing() -> None:
    async with Served(Rig()) as served:
        await served.client.generate(sequence("one")).aclose()
        assert served.client.stats().waiting == 0 and not served.rig.runner.batches


async def test_an_abort_by_id_ends_the_stream_with_its_reason() -> None:
    async with Served(Rig(instant=False)) as served:
        reader = asyncio.create_task(reply(served.client, sequence("one", version="v")))
        await eventually(lambda: served.rig.host.loading == ["v"])
        served.client.abort("one")
        assert [output.finish_reason for output in await reader] == [FinishReason.ABORT]


async def test_what_is_refused_raises_when_it_is_first_read() -> None:
    async with Served(Rig(max_waiting=1, instant=False)) as served:
        with pytest.raises(RequestError):
            await reply(served.client, sequence("long", prompt=1000))
        reader = asyncio.create_task(reply(served.client, sequence("one", version="v")))
        await eventually(lambda: served.rig.host.loading == ["v"])
        with pytest.raises(ServerBusy):
            await reply(served.client, sequence("two"))
        served.rig.host.end_load("v")
        await reader


async def test_sequences_that_come_together_are_taken_or_refused_together() -> None:
    async with Served(Rig(max_waiting=5, instant=False)) as served:
        streams = served.client.submit(*(sequence(f"first {number}", version="v") for number in range(3)))
        with pytest.raises(ServerBusy):
            served.client.submit(*(sequence(f"second {number}", version="v") for number in range(2)))
        await eventually(lambda: served.rig.host.loading == ["v"])
        served.rig.host.end_load("v")
        assert [len([output async for output in stream]) for stream in streams] == [3, 3, 3]
        assert {row.sequence.id for batch in served.rig.runner.batches for row in batch.rows} == {
            "first 0",
            "first 1",
            "first 2",
        }


async def test_a_stream_that_was_never_read_ends_with_the_abort_of_its_sequence() -> None:
    async with Served(Rig(instant=False)) as served:
        served.client.submit(sequence("one", version="v"))
        served.client.abort("one")
        await eventually(lambda: not served.client._streams)


async def test_a_duplicate_id_is_refused_and_leaves_the_first_stream_alone() -> None:
    async with Served(Rig()) as served:
        served.rig.runner.gate.clear()
        reader = asyncio.create_task(reply(served.client, sequence("one")))
        await eventually(lambda: "one" in served.client._streams)
        with pytest.raises(RequestError):
            await reply(served.client, sequence("one"))
        served.rig.runner.gate.set()
        assert len(await reader) == 3


async def test_every_stream_ends_with_an_error_when_the_engine_dies() -> None:
    rig = Rig(config=SchedulerConfig(max_num_seqs=1))
    rig.runner.failures = [RuntimeError("device lost")] * MAX_FAILED_STEPS
    async with Served(rig) as served:
        readers = [reply(served.client, sequence(str(i))) for i in range(6)]
        for outputs in await asyncio.gather(*readers):
            assert [output.finish_reason for output in outputs] == [FinishReason.ERROR]
        await eventually(lambda: not served.client.alive)
        with pytest.raises(EngineDead):
            await reply(served.client, sequence("late"))


async def test_a_drain_lets_streams_finish_and_refuses_new_ones() -> None:
    async with Served(Rig()) as served:
        served.rig.runner.gate.clear()
        reader = asyncio.create_task(reply(served.client, sequence("one", max_tokens=4)))
        assert await asyncio.to_thread(served.rig.runner.entered.wait, 10)
        drain = asyncio.create_task(served.client.drain(10))
        await eventually(lambda: not served.client.ready)
        with pytest.raises(ServerDraining):
            await reply(served.client, sequence("late"))
        served.rig.runner.gate.set()
        await drain
        assert len(await reader) == 4
        assert not served.client.alive


async def test_a_drain_ends_the_streams_of_an_engine_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux_server.engine.engine.ABORT_GRACE", 0.01)
    async with Served(Rig()) as served:
        served.rig.runner.gate.clear()
        reader = asyncio.create_task(reply(served.client, sequence("one")))
        assert await asyncio.to_thread(served.rig.runner.entered.wait, 10)
        await served.client.drain(0.01)
        assert [output.finish_reason for output in await reader] == [FinishReason.ERROR]


async def test_an_engine_that_fails_to_warm_up_does_not_start() -> None:
    def fails() -> None:
        raise MemoryError

    with pytest.raises(EngineDead):
        await Served(Rig(warm_up=fails)).client.start()


async def test_residency_names_the_fastest_memory_that_holds_a_version() -> None:
    async with Served(Rig(rows=8)) as served:
        await reply(served.client, sequence("one", version="v"))
        await reply(served.client, sequence("two", version="w"))
        await eventually(lambda: served.client.residency("w") == "device")
        assert [served.client.residency(version) for version in "vwx"] == ["host", "device", "disk"]
        assert served.client.ready and served.client.stats().slot_rows_used == 8


async def test_outputs_for_a_closed_loop_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    client = EngineClient(Rig().engine, in_host=lambda version: False)
    client._loop = asyncio.new_event_loop()
    client._loop.close()
    client._deliver([("one", TokenOutput())])
    assert "the event loop is closed" in caplog.text
