"""How many connections this process can hold: the system's limit on open files, less what the server opens itself."""

from __future__ import annotations

import resource
from contextlib import suppress

from loramux_server.errors import ConfigError
from loramux_server.wire.connections import RESERVE

OWN_FILES = 64  # the store's index, adapters that are loaded, uploads and downloads under way, libraries
LEAST = 8
MOST = 16_384  # by default: tens of KiB each


def connection_cap(wanted: int | None) -> int:
    """Connections that may have an ordinary request at the same time; the process's limit is raised for them.

    Raises:
        ConfigError: the system allows fewer than `wanted`, or next to none.
    """
    room = _raised_limit((wanted or MOST) + RESERVE + OWN_FILES) - RESERVE - OWN_FILES
    if wanted is not None and wanted > room:
        raise ConfigError(
            f"--max-connections {wanted} needs {wanted + RESERVE + OWN_FILES} open files, and the system allows "
            f"{room + RESERVE + OWN_FILES}; lower it, or raise that limit (ulimit -n)"
        )
    if room < LEAST:
        raise ConfigError(
            f"the system allows this process {room + RESERVE + OWN_FILES} open files, which leaves next to none for "
            f"connections; raise that limit (ulimit -n) to {LEAST + RESERVE + OWN_FILES} at least"
        )
    return min(wanted or MOST, room)


def _raised_limit(files: int) -> int:
    """The limit on open files, raised to so many as far as the system lets a process do that for itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return files
    if soft < files:
        most = files if hard == resource.RLIM_INFINITY else min(files, hard)
        with suppress(ValueError, OSError):  # some systems have a lower bound that they do not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return min(soft, files)
