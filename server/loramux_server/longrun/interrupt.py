"""Ctrl-C in a command that takes long: the first is answered at once and stops at the next good place, the second ends.

Python calls a handler only between two of its own instructions, and a step of a large model may be one long call into a
library. The answer therefore comes from a thread, which the C half of a signal wakes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 0.3  # a terminal sends Ctrl-C to a whole group of processes, and some of them hand it on


@contextmanager
def interruptible(answer: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    """For as long as this lasts, Ctrl-C and SIGTERM ask for an end. To be entered by the main thread.

    Args:
        answer: tells the user what happens now; called in a thread of its own.
        stop: makes the work end at its next good place; called in the main thread.
    Raises:
        KeyboardInterrupt: at the second signal, wherever the main thread is.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    first_at: list[float] = []

    def handle(number: int, frame: object) -> None:
        if not first_at:
            first_at.append(time.monotonic())
            stop()
        elif time.monotonic() - first_at[0] >= SAME_SECONDS:
            raise KeyboardInterrupt

    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    watcher = threading.Thread(target=_answer_first, args=(woken, answer), name="interrupt", daemon=True)
    watcher.start()
    wakes_before = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])
        signal.set_wakeup_fd(wakes_before)
        os.close(wakes)
        watcher.join()
        os.close(woken)


@contextmanager
def stoppable(answer: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """As `interruptible`; gives a function for the work to call between two parts, which raises once it is to stop.

    Raises:
        KeyboardInterrupt: from that function, or at the second signal.
    """
    asked = threading.Event()

    def go_on() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    with interruptible(answer, asked.set):
        yield go_on


def _answer_first(woken: int, answer: Callable[[], None]) -> None:
    """Reads the numbers of signals until the pipe is closed."""
    answered = False
    while numbers := os.read(woken, 64):
        if not answered and any(number in SIGNALS for number in numbers):
            answered = True
            answer()
