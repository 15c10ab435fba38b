from __future__ import annotations

import threading

import pytest

from loramux_adapters.errors import StoreUnavailable
from loramux_server.publishing.repeated import RepeatedTask


def test_it_goes_on_after_failures_and_ends_when_it_is_told(caplog: pytest.LogCaptureFixture) -> None:
    turns: list[int] = []
    done = threading.Event()

    def work() -> None:
        turns.append(len(turns))
        if len(turns) == 1:
            raise StoreUnavailable("locked")
        if len(turns) == 2:
            raise ZeroDivisionError
        done.set()

    task = RepeatedTask("the look", 0.001, work)
    task.start()
    assert done.wait(10)
    task.stop()
    task.stop()
    count = len(turns)
    assert count >= 3 and [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert "the look: locked" in caplog.text
    assert not any(thread.name == "the look" for thread in threading.enumerate())


def test_one_that_was_never_started_can_be_stopped() -> None:
    RepeatedTask("nothing", 1, lambda: None).stop()
