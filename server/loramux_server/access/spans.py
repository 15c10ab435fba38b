"""Spans of time as people write them: 90s, 15m, 12h, 30d, 8w."""

from __future__ import annotations

import re

from loramux_server.errors import ConfigError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN = re.compile(r"([0-9]{1,9})([smhdw])")
LONGEST = 100 * 366 * 86400


def seconds_of(text: str, what: str) -> int:
    """Raises ConfigError, which names `what` it is."""
    match = _SPAN.fullmatch(text)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not match or seconds > LONGEST:
        raise ConfigError(f"{what} is a number and a unit, such as 90s, 15m, 12h, 30d or 8w; not {text[:40]!r}")
    return seconds
