"""Where files go that do not belong, with the reason and the time in a why.json, so that nothing is lost unseen.

<root>/quarantine/<digest>/         a version that a name keeps and whose files are damaged: until it is uploaded again
                                    or its name is deleted
<root>/quarantine/<digest>.<time>/  what lay among the versions and is not in the index: until the operator removes it
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.durable_files import sync, write_whole

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine"  # below the store's directory
_WHY_FILE = "why.json"
_NAME = re.compile(r"([0-9a-f]{64})(\.[0-9TZ]+(-[0-9]+)?)?")


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One directory. `name`: of the directory; `since`: unix seconds."""

    name: str
    digest: str
    reason: str
    since: int
    nbytes: int


def in_short(found: Sequence[Quarantined]) -> str | None:
    """What an operator should be told of it at each start; None if there is nothing."""
    if not found:
        return None
    size = sum(one.nbytes for one in found) / 2**20
    return (
        f"set aside in {QUARANTINE}/ and never removed by itself: {len(found)} versions' files, {size:.1f} MiB; "
        "`loramux adapters quarantine` says why"
    )


class Quarantine:
    """All methods may raise OSError. Not guarded against each other: the index's write lock does that."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self._directory = root / QUARANTINE
        self._directory.mkdir(exist_ok=True)
        self._clock = clock

    def damaged(self, digest: str) -> Path:
        """Where the damaged files of a version are, if there are any."""
        return self._directory / digest

    def put_damaged(self, source: Path, digest: str, reason: str) -> Path:
        """Set the files of a version aside that a name keeps; returns where they are then."""
        target = self.damaged(digest)
        self.release(digest, "later ones take their place")
        return self._put(source, target, reason)

    def put_unknown(self, source: Path, digest: str, reason: str) -> Path:
        """Set files aside that nobody is known to keep; returns where they are then. They stay."""
        stem = f"{digest}.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(self._clock()))}"
        target, number = self._directory / stem, 1
        while target.exists():
            target, number = self._directory / f"{stem}-{number}", number + 1
        return self._put(source, target, reason)

    def take_back(self, digest: str, target: Path) -> None:
        """The damaged files return to where they were."""
        os.rename(self.damaged(digest), target)
        (target / _WHY_FILE).unlink(missing_ok=True)

    def release(self, digest: str, reason: str) -> None:
        """Free the disk of a version's damaged files, if there are any."""
        aside = self.damaged(digest)
        if aside.exists():
            shutil.rmtree(aside)
            logger.info("the damaged files of version %.12s are removed: %s", digest, reason)

    def of_kept(self) -> list[str]:
        """The versions whose damaged files are here because a name keeps them, or did."""
        return [path.name for path in self._directory.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)]

    def all(self) -> list[Quarantined]:
        """What is in it, longest first. What is not ours is passed over."""
        found = [
            self._described(path, match.group(1))
            for path in self._directory.iterdir()
            if (match := _NAME.fullmatch(path.name)) and path.is_dir()
        ]
        return sorted(found, key=lambda it: (it.since, it.name))

    def _put(self, source: Path, target: Path, reason: str) -> Path:
        os.rename(source, target)
        sync(source.parent)
        sync(self._directory)
        why = {"reason": reason, "time": int(self._clock())}
        write_whole(target / _WHY_FILE, json.dumps(why).encode() + b"\n")
        return target

    def _described(self, path: Path, digest: str) -> Quarantined:
        try:
            why = json.loads((path / _WHY_FILE).read_bytes())
            reason, since = str(why["reason"]), int(why["time"])
        except (OSError, ValueError, KeyError, TypeError):
            reason, since = "not known", int(path.stat().st_mtime)
        nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return Quarantined(path.name, digest, reason, since, nbytes)
