"""What leaves the device when an adapter is deleted or replaced, and what stays because it is pinned."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from loramux_server.engine.inbox import EngineState, Inbox
from loramux_server.engine.scheduling.sequence import FinishReason
from support.fakes_engine import sequence
from support.fakes_rig import Rig, eventually


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(rows=16).start()
    yield rig
    rig.stop()


def run(rig: Rig, name: str, version: str) -> None:
    rig.engine.submit(sequence(name, version=version))
    assert rig.deliveries.reason(name) is FinishReason.LENGTH


def test_a_retired_version_leaves_an_idle_engine_at_once(rig: Rig) -> None:
    run(rig, "a", "v")
    eventually(lambda: rig.engine.stats.resident == {"v"})
    rig.inbox.retire("v")
    eventually(lambda: rig.engine.stats.resident == frozenset())
    assert rig.engine.stats.slot_rows_used == 0
    run(rig, "b", "v")  # deleted, and uploaded again
    assert rig.host.requests.count("v") == 1 and rig.metrics.of("evicted") == []


def test_a_retired_version_in_use_leaves_when_its_last_sequence_ends(rig: Rig) -> None:
    rig.runner.gate.clear()
    rig.runner.entered.clear()
    rig.engine.submit(sequence("a", version="v", max_tokens=5))
    assert rig.runner.entered.wait(10)
    rig.inbox.retire("v")
    rig.runner.gate.set()
    assert rig.deliveries.reason("a") is FinishReason.LENGTH  # and the fake device saw the right weights all the time
    eventually(lambda: rig.engine.stats.resident == frozenset())


def test_a_version_that_an_abort_gave_up_leaves_in_the_same_step(rig: Rig) -> None:
    rig.runner.gate.clear()
    rig.runner.entered.clear()
    rig.engine.submit(sequence("a", version="v", max_tokens=50))
    assert rig.runner.entered.wait(10)
    rig.engine.abort("a")
    rig.inbox.retire("v")
    rig.runner.gate.set()
    assert rig.deliveries.reason("a") is FinishReason.ABORT
    eventually(lambda: rig.engine.stats.resident == frozenset())


def test_a_kept_version_outlives_others_that_pass(rig: Rig) -> None:
    run(rig, "a", "pinned")
    rig.inbox.keep(frozenset({"pinned"}))
    for number in range(5):
        run(rig, str(number), f"other-{number}")
        eventually(lambda: f"other-{number}" in rig.engine.stats.resident)  # noqa: B023
        assert "pinned" in rig.engine.stats.resident
    rig.inbox.keep(frozenset())
    run(rig, "c", "other-5")
    run(rig, "d", "other-6")
    eventually(lambda: rig.engine.stats.resident == {"other-5", "other-6"})


def test_hits_and_misses_are_counted(rig: Rig) -> None:
    for name in ("a", "b", "c"):
        run(rig, name, "v")
    eventually(lambda: (rig.engine.stats.slot_hits, rig.engine.stats.slot_misses) == (2, 1))


@pytest.mark.parametrize("event", ["retire", "keep"])
def test_such_news_wake_a_waiting_engine_and_are_told_once(event: str) -> None:
    inbox = Inbox(4)
    inbox.take()
    waiter = threading.Thread(target=inbox.wait)
    waiter.start()
    if event == "retire":
        inbox.retire("v")
    else:
        inbox.keep(frozenset({"v"}))
    waiter.join(10)
    assert not waiter.is_alive()
    mail = inbox.take()
    assert (mail.retired, mail.kept) == (({"v"}, None) if event == "retire" else (set(), {"v"}))
    mail = inbox.take()
    assert not mail.retired and mail.kept is None


def test_nothing_is_gathered_for_an_engine_that_has_ended() -> None:
    inbox = Inbox(4)
    inbox.end(EngineState.DEAD)
    inbox.retire("v")
    inbox.keep(frozenset({"v"}))
    mail = inbox.take()
    assert not mail.retired and mail.kept is None
