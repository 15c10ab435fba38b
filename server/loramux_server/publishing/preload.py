"""At start, publishes the adapters in the directory of --preload, through the same check and trial as an upload."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from loramux_adapters.artifact.format import CONFIG_FILE
from loramux_adapters.errors import AdapterError, AdapterRejected
from loramux_adapters.store.store import AdapterStore
from loramux_server.access.actor import Actor, acting
from loramux_server.errors import ConfigError, LoramuxError, ServerBusy, ServerDraining
from loramux_server.publishing.adapter_files import copy_adapter, is_complete, unread_weights
from loramux_server.publishing.directory_names import adapter_names
from loramux_server.publishing.publisher import Publisher, is_usable

BUSY_SECONDS = 300.0  # in which an adapter is tried again that the server was too busy for


def preload(
    store: AdapterStore,
    publisher: Publisher,
    directory: Path,
    note: Callable[[str], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Publishes every adapter that `adapter_names` finds, unless its name can be used already.

    A registered adapter that was checked against another base, or whose files are damaged, cannot: it is replaced. An
    adapter that cannot be read, or not be served on this base, is left out, with a note; the server starts anyway.
    Raises:
        ConfigError: there is no such directory, or it cannot be read.
    """
    try:
        names = adapter_names(directory)
    except OSError as error:
        raise ConfigError(f"--preload: cannot read the directory {directory}: {error.strerror}") from error
    for name in names:
        try:
            if (directory / name / CONFIG_FILE).is_file() and not is_usable(store, name):
                with acting(Actor("--preload")):
                    note(_publish(publisher, directory, name, note, sleep))
        except (AdapterError, LoramuxError, OSError) as error:
            note(f"left out {name}: {error}")


def _publish(
    publisher: Publisher, directory: Path, name: str, note: Callable[[str], None], sleep: Callable[[float], None]
) -> str:
    """Returns what was done, in one line."""

    def fill(target: Path) -> None:
        look = copy_adapter(directory, name.split("/"), target, limit=None)
        unread = None if is_complete(look) else unread_weights(directory, name.split("/"))
        if unread is not None:
            raise AdapterRejected([unread])

    left = BUSY_SECONDS
    while True:
        try:
            done = publisher.publish_files(name, fill)
            break
        except ServerDraining:
            raise
        except ServerBusy as error:
            left -= error.retry_after
            if left < 0:
                raise
            note(f"{name} is tried again in {error.retry_after} s: {error}")
            sleep(error.retry_after)
    replayed = "" if done.proof == "none" else f"; its fingerprint replays: {done.proof}"
    noted = "".join(f"; note: {note}" for note in done.checked.notes)
    return f"published {name} (rank {done.checked.rank}, {', '.join(done.checked.target_modules)}){replayed}{noted}"
