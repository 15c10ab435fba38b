"""Has a call made again that failed because the server was busy or away for the moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TypeVar

from loramux_server.errors import CommandFailed, ConnectionLost, ServerRefused

T = TypeVar("T")
DEFAULT_SECONDS = 300.0
BUSY = (429, 502, 503)  # 502: of a proxy whose server is being started again
MAX_PAUSE = 30.0  # seconds, where the server names none
MAX_BREAKS = 3  # connections in a row that broke: a server that refuses at once may look like that


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a call is made again, and who is told why it takes so long.

    Attributes:
        seconds: from the first call to the beginning of the last one; 0 makes one call.
        tell: gets a line before each pause.
    """

    seconds: float = DEFAULT_SECONDS
    tell: Callable[[str], None] = lambda line: None
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def call(self, work: Callable[[], T]) -> T:
        """What `work` returns, which may be done twice without harm. Raises what its last call raises.

        A server that was never reached is not waited for: its address may be wrong.
        """
        ends = self.clock() + self.seconds
        was_reached, breaks, pause = False, 0, 1.0
        while True:
            try:
                return work()
            except ConnectionLost as error:
                was_reached |= error.reached
                breaks = breaks + 1 if error.reached else 0
                self._wait(error, pause, ends if was_reached and breaks <= MAX_BREAKS else -inf)
                pause = min(2 * pause, MAX_PAUSE)
            except ServerRefused as error:
                was_reached, breaks = True, 0
                self._wait(error, error.after or pause, ends if error.status in BUSY else -inf)
                pause = min(2 * pause, MAX_PAUSE)

    def _wait(self, error: CommandFailed, seconds: float, ends: float) -> None:
        """Says why, and waits. Raises the error instead where that would last beyond `ends`."""
        left = ends - self.clock()
        if not seconds <= left:
            raise error
        self.tell(f"{str(error).rstrip('.')}; trying again in {seconds:.0f} s, for at most {left:.0f} s")
        self.sleep(seconds)
