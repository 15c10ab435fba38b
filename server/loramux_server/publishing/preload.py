"""At start, publishes the adapters in the directory of --preload, through the same check and trial as an upload."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from loramux_adapters.artifact.format import CONFIG_FILE, KNOWN_FILES
from loramux_adapters.errors import AdapterError
from loramux_adapters.store.store import AdapterStore
from loramux_server.errors import ConfigError, LoramuxError, ServerBusy, ServerDraining
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
                note(_publish(publisher, name, directory / name, note, sleep))
        except (AdapterError, LoramuxError, OSError) as error:
            note(f"left out {name}: {error}")


def _publish(
    publisher: Publisher, name: str, source: Path, note: Callable[[str], None], sleep: Callable[[float], None]
) -> str:
    """Returns what was done, in one line."""

    def fill(target: Path) -> None:
        for name in KNOWN_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)

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
    return f"published {name} (rank {done.checked.rank}, {', '.join(done.checked.target_modules)}){replayed}"
