"""The first Ctrl-C is answered at once, the second ends the work, and nothing stays as it was set."""

from __future__ import annotations

import hashlib
import signal
import threading
import time

import pytest

from loramux_server.longrun.interrupt import SAME_SECONDS, interruptible, stoppable


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_answered_and_stops_and_the_second_ends(number: signal.Signals) -> None:
    said: list[str] = []
    answered = threading.Event()
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def answer() -> None:
        said.append("answered")
        answered.set()

    with pytest.raises(KeyboardInterrupt), interruptible(answer, lambda: said.append("stop")):
        signal.raise_signal(number)
        assert answered.wait(5)
        signal.raise_signal(number)  # the same one, handed on by another process
        time.sleep(SAME_SECONDS)
        signal.raise_signal(number)
        pytest.fail("went on")

    assert sorted(said) == ["answered", "stop"]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_is_answered_while_the_main_thread_is_inside_a_library() -> None:
    answered: list[float] = []
    stopped: list[float] = []
    main = threading.get_ident()
    sender = threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGINT))
    with interruptible(lambda: answered.append(time.monotonic()), lambda: stopped.append(time.monotonic())):
        sender.start()
        hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 2_000_000)  # one call, which no signal ends

    assert answered[0] < stopped[0] - 0.1


def test_work_in_parts_stops_between_two_of_them() -> None:
    done = 0
    with pytest.raises(KeyboardInterrupt), stoppable(lambda: None) as go_on:
        for part in range(10):
            go_on()
            done = part
            if part == 3:
                signal.raise_signal(signal.SIGINT)

    assert done == 3


def test_without_a_signal_nothing_is_said() -> None:
    with stoppable(lambda: pytest.fail("answered")) as go_on:
        go_on()
