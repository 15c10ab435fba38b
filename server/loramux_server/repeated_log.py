"""The log of a server that clients can make complain: one line a second at most for each complaint, none uncounted."""

from __future__ import annotations

import logging
import threading
from typing import TextIO

# What happens to the operator's own files is told each time: it names one file or version of many.
TOLD_EACH_TIME = ("loramux_adapters.store", "loramux_server.publishing")

_Place = tuple[str, int, str]


class OneLineASecond(logging.StreamHandler[TextIO]):
    """From warnings on, the same place in the code writes once in `seconds`; its next line counts what was left out.

    The place decides and not the text, which holds ids and addresses that differ each time.
    """

    def __init__(self, stream: TextIO | None = None, *, seconds: float = 1.0) -> None:
        super().__init__(stream)
        self._seconds = seconds
        self._left_out: dict[_Place, int] = {}  # of places that have written less than `seconds` ago
        self._last: dict[_Place, logging.LogRecord] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING or record.name.startswith(TOLD_EACH_TIME):
            super().emit(record)
            return
        warned = record.getMessage() if record.name == "py.warnings" else ""  # all of them come from one place
        place = (record.pathname, record.lineno, warned)
        if place in self._left_out:
            self._left_out[place] += 1
            self._last[place] = record
            return
        self._rest(place)
        super().emit(record)

    def _rest(self, place: _Place) -> None:
        self._left_out[place] = 0
        timer = threading.Timer(self._seconds, self._tell, [place])
        timer.daemon = True
        timer.start()

    def _tell(self, place: _Place) -> None:
        """Another thread, when the rest is over."""
        assert self.lock is not None  # made with every handler
        with self.lock:
            count = self._left_out.pop(place, 0)
            if not count:
                return
            self._rest(place)
            last = self._last.pop(place)
            summary = logging.makeLogRecord(last.__dict__ | {"exc_info": None, "exc_text": None, "args": None})
            summary.msg = f"{count} more like this, the last: {last.getMessage()}"
            super().emit(summary)
