"""Publishes adapters from a directory at start, through the same check as an upload."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterError, AdapterNotFound, BaseMismatch
from loramux_adapters.store import AdapterStore
from loramux_adapters.verify import check_adapter
from loramux_server.errors import ConfigError

FILES = ("adapter_config.json", "adapter_model.safetensors", "card.json", "fingerprint.json")


def preload(
    store: AdapterStore, directory: Path, base: BaseInfo, max_rank: int, *, note: Callable[[str], None]
) -> None:
    """Publishes every subdirectory that holds an adapter under its own name, unless that name can be used already.

    A registered adapter that was checked against another base cannot: it is replaced. An adapter that cannot be read,
    or not be served on this base, is left out, with a note; the server starts all the same.
    Raises:
        ConfigError: there is no such directory, or it cannot be read.
    """
    try:
        sources = sorted(directory.iterdir())
    except OSError as error:
        raise ConfigError(f"--preload: cannot read the directory {directory}: {error.strerror}") from error
    for source in sources:
        try:
            if (source / FILES[0]).is_file() and not _is_usable(store, source.name):
                note(_publish(store, source, base, max_rank))
        except (AdapterError, OSError) as error:
            note(f"left out {source.name}: {error}")


def _is_usable(store: AdapterStore, name: str) -> bool:
    """Whether requests for this name are served as the store is now."""
    try:
        store.acquire(name).release()
    except (AdapterNotFound, BaseMismatch):
        return False
    return True


def _publish(store: AdapterStore, source: Path, base: BaseInfo, max_rank: int) -> str:
    """Returns what was done, in one line."""
    store.check_name(source.name)
    with store.stage() as staging:
        for name in FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, staging.directory / name)
        checked = check_adapter(staging.directory, base, max_rank)
        store.publish(
            source.name,
            staging,
            rank=checked.rank,
            base_id=checked.base_id,
            target_modules=checked.target_modules,
        )
    return f"published {source.name} (rank {checked.rank}, {', '.join(checked.target_modules)})"
