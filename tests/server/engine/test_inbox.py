"""The inbox: bounded, one id at a time, closed in steps."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_server.engine.inbox import FLOW_SHARE, Backlog, EngineState, Inbox
from loramux_server.engine.scheduling.sequence import AdapterUse
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
    inbox.set_backlog({("", ""): Backlog(1, 0.0)})
    inbox.put(sequence("c"))
    inbox.set_backlog({("", ""): Backlog(1, 0.0)})
    assert inbox.num_waiting == 2


BASE, PIRATE = "", "pirate"


def fill(inbox: Inbox, version: str | None, most: int = 10_000) -> int:
    """Puts sequences of one flow until one is refused; returns how many were taken."""
    for number in range(most):
        try:
            inbox.put(sequence(f"{version} {number}", version=version))
        except ServerBusy:
            return number
    return most


def test_one_flow_alone_fills_four_fifths_and_another_finds_a_place() -> None:
    inbox = Inbox(256)
    assert fill(inbox, "hot") == 205
    assert fill(inbox, "second") == 41
    assert fill(inbox, None, most=1) == 1
    with pytest.raises(ServerBusy, match="247 requests are waiting already, 205 of them for the same model"):
        inbox.put(sequence("one more", version="hot"))


@given(
    max_waiting=st.integers(1, 40),
    steps=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 12), st.integers(0, 30)), max_size=40),
)
def test_a_flow_of_which_nobody_waits_finds_a_place_as_long_as_there_is_any(
    max_waiting: int, steps: list[tuple[str, int, int]]
) -> None:
    inbox = Inbox(max_waiting)
    waiting: Counter[str] = Counter()
    for number, (version, count, leaving) in enumerate(steps):
        group = [sequence(f"{number}-{each}", version=version) for each in range(count)]
        free = max_waiting - waiting.total()
        fits = waiting[version] + count - 1 < FLOW_SHARE * (free - count + 1)
        try:
            inbox.put(*group)
        except (ServerBusy, RequestError):
            assert not fits and (waiting[version] or count > 1 or not free)
        else:
            assert fits
            waiting[version] += count
        assert inbox.num_waiting == waiting.total() <= max_waiting
        taken = sorted(waiting.elements())[leaving:]
        waiting = Counter(taken)
        inbox.take()
        inbox.set_backlog({("", name): Backlog(held, 1.0) for name, held in waiting.items()})


def test_the_servers_own_work_finds_a_place_beside_a_crowd_for_the_same_base() -> None:
    inbox = Inbox(10)
    assert fill(inbox, None) == 8
    inbox.put(sequence("probe", background=True))


def test_sums_of_adapters_fill_no_more_than_one_of_them_does() -> None:
    inbox = Inbox(10)
    taken = 0
    for number in range(20):
        uses = [AdapterUse("a", 8, 1), AdapterUse(f"b{number}", 8, 1)]
        try:
            inbox.put(sequence(f"sum {number}", uses=uses))
        except ServerBusy:
            continue
        taken += 1
    assert taken == 8
    inbox.put(sequence("another", version="other"))


def test_several_prompts_of_a_request_are_taken_together_or_not_at_all() -> None:
    inbox = Inbox(20)
    inbox.put(*(sequence(str(number)) for number in range(10)))
    with pytest.raises(ServerBusy):
        inbox.put(*(sequence(f"more {number}") for number in range(8)))
    with pytest.raises(RequestError, match="the id 3 is still running"):
        inbox.put(sequence("new"), sequence("3"))
    assert [one.id for one in inbox.take().sequences] == [str(number) for number in range(10)]
    inbox.put(sequence("new"))


def test_more_prompts_than_the_server_ever_takes_are_no_reason_to_come_back() -> None:
    with pytest.raises(RequestError, match="has 17 prompts, and this server takes 16 at a time") as error:
        Inbox(20).put(*(sequence(str(number)) for number in range(17)))
    assert (error.value.code, error.value.param) == ("too_many_prompts", "prompt")


@pytest.mark.parametrize(
    ("backlog", "asked", "seconds"),
    [
        ({}, BASE, 1),
        ({BASE: Backlog(8, 0.0)}, BASE, 1),
        ({BASE: Backlog(8, 20.3)}, BASE, 21),  # all of its own
        (
            {BASE: Backlog(8, 20.0), PIRATE: Backlog(2, 1.0)},
            PIRATE,
            3,
        ),  # as fast as the other, and its second waits less
        ({BASE: Backlog(8, 20.0), PIRATE: Backlog(2, 1.0)}, BASE, 21),  # no more than there is
        ({BASE: Backlog(10, 20.0)}, PIRATE, 2),  # until the first of those that wait has started
        ({BASE: Backlog(10, 1e9)}, BASE, 600),
    ],
)
def test_who_is_refused_hears_when_to_come_back(backlog: dict[str, Backlog], asked: str, seconds: int) -> None:
    inbox = Inbox(10)
    inbox.set_backlog({("", name): one for name, one in backlog.items()})
    version = asked or None
    fill(inbox, version)
    with pytest.raises(ServerBusy, match=f"about {seconds} s") as error:
        inbox.put(sequence("late", version=version))
    assert error.value.retry_after == seconds


def test_those_that_the_engine_has_not_seen_yet_count_as_much_as_the_others() -> None:
    inbox = Inbox(10)
    inbox.set_backlog({("", BASE): Backlog(2, 4.0)})
    assert fill(inbox, None) == 6
    with pytest.raises(ServerBusy) as error:
        inbox.put(sequence("late"))
    assert error.value.retry_after == 16


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


def test_one_tenant_fills_four_fifths_whatever_its_adapters_are_and_others_find_a_place() -> None:
    inbox = Inbox(20)
    taken = 0
    with pytest.raises(ServerBusy, match="16 of them for the same tenant, and other places are kept for other tenants"):
        for number in range(20):
            inbox.put(sequence(str(number), version=f"v{number}", tenant="crowd"))
            taken += 1
    assert taken == 16
    inbox.put(sequence("one", version="v0", tenant="other"))
    inbox.put(sequence("operator"))
