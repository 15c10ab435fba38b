"""At start, publishes the adapters in the directory of --preload, through the same check and trial as an upload."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from loramux_adapters.artifact.format import CONFIG_FILE, KNOWN_FILES, TOKENIZER_FILES
from loramux_adapters.errors import AdapterError
from loramux_adapters.store.store import AdapterStore
from loramux_server.errors import ConfigError, LoramuxError
from loramux_server.publishing.publisher import Publisher, is_usable


def preload(store: AdapterStore, publisher: Publisher, directory: Path, note: Callable[[str], None]) -> None:
    """Publishes every subdirectory that holds an adapter under its own name, unless that name can be used already.

    A registered adapter that was checked against another base, or whose files are damaged, cannot: it is replaced. An
    adapter that cannot be read, or not be served on this base, is left out, with a note; the server starts anyway.
    Raises:
        ConfigError: there is no such directory, or it cannot be read.
    """
    try:
        sources = sorted(directory.iterdir())
    except OSError as error:
        raise ConfigError(f"--preload: cannot read the directory {directory}: {error.strerror}") from error
    for source in sources:
        try:
            if (source / CONFIG_FILE).is_file() and not is_usable(store, source.name):
                note(_publish(publisher, source))
        except (AdapterError, LoramuxError, OSError) as error:
            note(f"left out {source.name}: {error}")


def _publish(publisher: Publisher, source: Path) -> str:
    """Returns what was done, in one line."""

    def fill(target: Path) -> None:
        for name in dict.fromkeys((*KNOWN_FILES, *TOKENIZER_FILES)):
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)

    done = publisher.publish_files(source.name, fill)
    replayed = "" if done.proof == "none" else f"; its fingerprint replays: {done.proof}"
    return f"published {source.name} (rank {done.checked.rank}, {', '.join(done.checked.target_modules)}){replayed}"
