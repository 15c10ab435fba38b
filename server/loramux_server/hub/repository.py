"""Has an adapter's files fetched from a hub, within bounds of bytes and time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux_adapters.artifact.config import CONFIG_FILE, MAX_CONFIG_BYTES, SOURCE_KEY
from loramux_adapters.artifact.format import (
    MLX_WEIGHTS_FILE,
    PICKLES,
    SOURCE_FILES,
    WEIGHTS_FILE,
    pickle_reason,
)
from loramux_adapters.artifact.reading.strict_json import StrictJSONError, parse_object, quoted
from loramux_adapters.errors import AdapterRejected, AdapterTooLarge
from loramux_server.errors import HubUnreachable, NotOnHub
from loramux_server.hub.hub_name import HubName

MAX_BYTES = 16 * 2**30
MAX_SECONDS = 86400.0
_FETCH = "loramux_server.hub.fetch"
_LOOK_SECONDS = 0.1
_MAX_LINE = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Fetched:
    """An adapter in the hub's cache on this machine.

    Attributes:
        directory: holds the files, as links into the cache.
        commit: which state of the repository they are.
        cached: the hub could not be asked, and this is what an earlier fetch left.
    """

    name: HubName
    directory: Path
    commit: str
    cached: bool = False

    @property
    def label(self) -> str:
        """What the version will say of where it comes from."""
        return f"{self.name.repository} at commit {self.commit}"


def fetch(
    name: HubName,
    *,
    limit: int = MAX_BYTES,
    seconds: float = MAX_SECONDS,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: threading.Event | None = None,
) -> Fetched:
    """The adapter's files, safetensors and the small ones beside them; blocks.

    Where the hub is, a token for it, where files are kept, and whether to ask at all is huggingface_hub's to read from
    the environment: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE.

    Args:
        limit: most bytes of all files.
        seconds: longest that it may take.
        progress: called with bytes that are there and bytes in all, in this thread.
        stop: set by another thread, ends it at once.
    Raises:
        NotOnHub: no such repository or revision, or no access to it.
        HubUnreachable: the hub cannot be asked, sends what is not whole, or took too long.
        AdapterRejected: it holds no adapter, or only a pickle. AdapterTooLarge.
    """
    order = {
        "repository": name.repository,
        "revision": name.revision,
        "files": [CONFIG_FILE, *(file for file in SOURCE_FILES if file != CONFIG_FILE)],
        "weights": [WEIGHTS_FILE, MLX_WEIGHTS_FILE],
        "pickles": {pickle: pickle_reason(pickle) for pickle in PICKLES},
        "limit": limit,
    }
    news = _last_news(name, order, seconds, progress, stop or threading.Event())
    if "failure" not in news:
        return Fetched(name, Path(news["directory"]), news["commit"], news["cached"])
    kind, message = news["failure"], news["message"]
    if kind == "too_large":
        raise AdapterTooLarge(limit)
    if kind == "rejected":
        raise AdapterRejected([f"{name} on the hub: {message}"])
    if kind == "missing":
        raise NotOnHub(f"{name} cannot be had from the hub: {message}")
    raise HubUnreachable(f"{name} could not be fetched from the hub: {message}")


def _last_news(
    name: HubName,
    order: dict[str, Any],
    seconds: float,
    progress: Callable[[int, int], None],
    stop: threading.Event,
) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    over = threading.Event()
    news: dict[str, Any] = {}
    with tempfile.TemporaryFile() as said:  # and no pipe, which would have to be emptied meanwhile
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _FETCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
        )

        def end_in_time() -> None:
            while not over.wait(_LOOK_SECONDS):
                if stop.is_set() or time.monotonic() > deadline:
                    process.kill()
                    return

        guard = threading.Thread(target=end_in_time, name="deadline of a fetch", daemon=True)
        guard.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            with suppress(OSError):  # it has ended, which is seen below
                process.stdin.write(json.dumps(order).encode())
                process.stdin.close()
            while line := process.stdout.readline(_MAX_LINE):
                news = _parsed(line)
                if "total" in news:
                    progress(news["done"], news["total"])
        finally:
            over.set()
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]  # it was asked for
            guard.join()
        if "failure" in news or "commit" in news:
            return news
        said.seek(max(0, said.seek(0, 2) - _MAX_LINE))
        lines = said.read().decode(errors="replace").strip().splitlines()
    if stop.is_set():
        raise HubUnreachable(f"{name} is not fetched: the server stops")
    if time.monotonic() > deadline:
        raise HubUnreachable(f"{name} did not come from the hub within {seconds:g} s")
    last = quoted(lines[-1], 300)[1:-1] if lines else "the process that fetches ended without a word"
    raise HubUnreachable(f"{name} could not be fetched: {last}")


def _parsed(line: bytes) -> dict[str, Any]:
    """A line of news; empty for one that was cut, when the process was killed."""
    try:
        news = json.loads(line)
    except ValueError:
        return {}
    return news if isinstance(news, dict) else {}


def put_label(directory: Path, label: str) -> None:
    """Have the config of an adapter's files say where they come from, which its version shows; of our own copies.

    A config that cannot be read stays as it is, for the check to refuse.
    """
    path = directory / CONFIG_FILE
    try:
        fields = parse_object(path.read_bytes(), limit=MAX_CONFIG_BYTES)
    except (StrictJSONError, FileNotFoundError):
        return
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(fields | {SOURCE_KEY: label}, indent=2))
    os.replace(beside, path)
