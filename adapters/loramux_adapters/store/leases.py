"""Who uses which version now, and what has to be done once nobody does. In memory: leases end with the process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ended:
    """What the end of a version's last lease makes possible; both False while it is leased.

    Attributes:
        unkept: no name keeps the version: its files can go.
        retired: no name points at it any more: it can leave the memories.
    """

    unkept: bool
    retired: bool


class Lease:
    """The right to use one version: its files stay until `release`, whatever becomes of the name meanwhile."""

    def __init__(self, name: str, version: str, rank: int, nbytes: int, on_release: Callable[[Lease], None]) -> None:
        """`nbytes`: of the version's files."""
        self.name = name
        self.version = version
        self.rank = rank
        self.nbytes = nbytes
        self._on_release: Callable[[Lease], None] | None = on_release

    def release(self) -> None:
        """Give the version back; a second call does nothing. Never raises.

        Removes the version's files if nobody keeps or leases it any more.
        """
        on_release, self._on_release = self._on_release, None
        if on_release is not None:
            on_release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()


class VersionLeases:
    """Counts of leases, by version and by name. `lock` guards them; methods say whether the caller holds it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._by_version: Counter[str] = Counter()
        self._by_name: Counter[str] = Counter()
        self._unkept: set[str] = set()  # leased versions that no name keeps
        self._retired: set[str] = set()  # leased versions that no name points at any more

    def add(self, name: str, version: str) -> None:
        """With the lock held."""
        self._by_version[version] += 1
        self._by_name[name] += 1

    def end(self, name: str, version: str) -> Ended:
        """Takes the lock."""
        with self.lock:
            for counter, key in ((self._by_version, version), (self._by_name, name)):
                counter[key] -= 1
                if counter[key] == 0:
                    del counter[key]
            if version in self._by_version:
                return Ended(False, False)
            ended = Ended(version in self._unkept, version in self._retired)
            self._retired.discard(version)
            return ended

    def of_name(self, name: str) -> int:
        """Leases that are open under a name, on whichever version. Takes the lock."""
        with self.lock:
            return self._by_name[name]

    def wait_to_collect(self, version: str) -> bool:
        """Whether the version is leased, and so has to wait for the end of its last lease. With the lock held."""
        self._unkept.discard(version)
        if version in self._by_version:
            self._unkept.add(version)
            return True
        return False

    def is_kept_again(self, version: str) -> None:
        """With the lock held."""
        self._unkept.discard(version)

    def retire(self, gone: Collection[str], current: Collection[str]) -> list[str]:
        """Of the versions that no name points at any more, those that nobody leases; the others follow by `end`.

        With the lock held.
        """
        self._retired.difference_update(current)
        self._retired.update(version for version in gone if version in self._by_version)
        return [version for version in gone if version not in self._by_version]
