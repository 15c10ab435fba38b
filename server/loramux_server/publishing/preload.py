"""Publishes adapters that lie in directories, through the same check as an upload; at start, those of --preload."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from loramux_adapters.artifact.format import CONFIG_FILE, KNOWN_FILES
from loramux_adapters.errors import AdapterCorrupt, AdapterError, AdapterNotFound, BaseMismatch
from loramux_adapters.lora.verify import Checked
from loramux_adapters.store.store import AdapterStore, Published
from loramux_server.errors import ConfigError, LoramuxError


def preload(
    store: AdapterStore, directory: Path, check: Callable[[Path], Checked], note: Callable[[str], None]
) -> None:
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
                note(_publish(store, source, check))
        except (AdapterError, LoramuxError, OSError) as error:
            note(f"left out {source.name}: {error}")


def is_usable(store: AdapterStore, name: str) -> bool:
    """Whether requests for this name are served as the store is now."""
    try:
        store.acquire(name).release()
    except (AdapterNotFound, AdapterCorrupt, BaseMismatch):
        return False
    return True


def publish_files(
    store: AdapterStore, name: str, fill: Callable[[Path], object], check: Callable[[Path], Checked]
) -> tuple[Published, Checked]:
    """Has `fill` put an adapter's files into a fresh directory, checks them there, and makes them the current version.

    Raises what `fill` and `check` raise, and InvalidAdapterName, AdapterRejected, StoreUnavailable.
    """
    store.check_name(name)
    with store.stage() as staging:
        fill(staging.directory)
        checked = check(staging.directory)
        published = store.publish(
            name,
            staging,
            rank=checked.rank,
            base_id=checked.base_id,
            target_modules=checked.target_modules,
            proof=checked.fingerprint,
            version=checked.version,
        )
    return published, checked


def _publish(store: AdapterStore, source: Path, check: Callable[[Path], Checked]) -> str:
    """Returns what was done, in one line."""

    def fill(target: Path) -> None:
        for name in KNOWN_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)

    _, checked = publish_files(store, source.name, fill, check)
    replayed = {"none": ""}.get(checked.fingerprint, f"; its fingerprint replays: {checked.fingerprint}")
    return f"published {source.name} (rank {checked.rank}, {', '.join(checked.target_modules)}){replayed}"
