"""The inbox: bounded, one id at a time, closed in steps."""

from __future__ import annotations

import threading

import pytest

from loramux_server.engine.inbox import Backlog, EngineState, Inbox
from loramux_server.errors import EngineDead, RequestError, ServerBusy, ServerDraining
from support.fakes_engine import sequence


def test_what_was_put_is_taken_once_in_order() -> None:
    inbox = Inbox(4)
    a, b = sequence("a"), sequence("b")
    inbox.put(a)
    inbox.put(b)
    assert inbox.take().sequences == [a, b]
    assert inbox.take().sequences == []


def test_a_full_inbox_refuses_until_the_engine_has_started_some() -> None:
    inbox = Inbox(2)
    inbox.put(sequence("a"))
    inbox.put(sequence("b"))
    with pytest.raises(ServerBusy) as error:
        inbox.put(sequence("c"))
    assert error.value.retry_after >= 1 and not isinstance(error.value, ServerDraining)
    inbox.take()
    inbox.set_backlog({("",): Backlog(1, 0.0)})
    inbox.put(sequence("c"))
    inbox.set_backlog({("",): Backlog(1, 0.0)})
    assert inbox.num_waiting == 2


def test_an_id_is_used_once_at_a_time() -> None:
    inbox = Inbox(4)
    inbox.put(sequence("a"))
    with pytest.raises(RequestError, match="id a"):
        inbox.put(sequence("a"))
    inbox.take()
    inbox.forget(["a"])
    inbox.put(sequence("a"))


def test_an_abort_comes_with_its_sequence_and_unknown_ids_are_ignored() -> None:
    inbox = Inbox(4)
    inbox.put(sequence("a"))
    inbox.abort("a")
    inbox.abort("unknown")
    mail = inbox.take()
    assert [one.id for one in mail.sequences] == ["a"] and mail.aborted == {"a"}
    inbox.abort_all()
    assert inbox.take().aborted == {"a"}


def test_a_draining_inbox_takes_nothing_and_is_drained_when_all_has_ended() -> None:
    inbox = Inbox(4)
    inbox.started()
    inbox.put(sequence("a"))
    inbox.drain()
    with pytest.raises(ServerDraining):
        inbox.put(sequence("b"))
    assert not inbox.drained
    inbox.forget(["a"])
    assert inbox.drained


def test_a_drain_during_the_warm_up_is_not_undone_by_its_end() -> None:
    inbox = Inbox(4)
    inbox.drain()
    inbox.started()
    assert inbox.state is EngineState.DRAINING


def test_an_ended_inbox_names_what_is_left_and_says_why_it_takes_nothing() -> None:
    dead, stopped = Inbox(4), Inbox(4)
    dead.put(sequence("a"))
    assert dead.end(EngineState.DEAD) == {"a"}
    dead.drain()
    assert dead.state is EngineState.DEAD and dead.num_waiting == 0
    with pytest.raises(EngineDead):
        dead.put(sequence("b"))
    stopped.end(EngineState.STOPPED)
    with pytest.raises(ServerDraining):
        stopped.put(sequence("b"))


@pytest.mark.parametrize("event", ["put", "abort_all", "drain", "wake"])
def test_whatever_is_said_wakes_a_waiting_engine(event: str) -> None:
    inbox = Inbox(4)
    inbox.take()
    waiter = threading.Thread(target=inbox.wait)
    waiter.start()
    getattr(inbox, event)(*([sequence("a")] if event == "put" else []))
    waiter.join(10)
    assert not waiter.is_alive()
