"""How soon the two are ready: from the command to a server that answers, and to what `loramux --version` says."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..errors import LoadTestError
from ..peers.servers import Side, ours
from .checkout import Checkout
from .pairs import Pair

AIM = (0.0, 1.03)


@dataclass(frozen=True, slots=True)
class Place:
    """What the servers run on: `base` is None for the server's default; `stores` holds one adapter store for each."""

    base: Path | None
    stores: Path
    logs: Path

    def server(self, checkout: Checkout, adapters: Mapping[str, Path]) -> AbstractContextManager[Side]:
        """A server of the checkout, frozen, with what its store holds and these adapters."""
        store, log = self.stores / checkout.name, self.logs / f"{checkout.name}.log.tmp"
        return ours(self.base, adapters, store=store, log=log, lora=True, program=checkout.program, name=checkout.name)


class Starts:
    """Times them, one round after the other."""

    def __init__(self) -> None:
        self.pairs = [Pair("start to ready", "s", AIM), Pair("loramux --version", "s", AIM)]

    def measure(self, checkouts: Sequence[Checkout], place: Place, stack: ExitStack) -> dict[str, Side]:
        """One round, in the order of `checkouts`; the servers by name, frozen, until `stack` ends them.

        A server starts while the one before it is frozen, with the adapters that are in its store.
        """
        versions = {it.name: version_seconds(it) for it in checkouts}
        sides, seconds = {}, {}
        for checkout in checkouts:
            began = time.perf_counter()
            sides[checkout.name] = stack.enter_context(place.server(checkout, {}))
            seconds[checkout.name] = time.perf_counter() - began
        for pair, values in zip(self.pairs, (seconds, versions), strict=True):
            pair.add(values)
        return sides


def version_seconds(checkout: Checkout) -> float:
    """Raises LoadTestError where the command fails."""
    words, environ = [*checkout.program.words, "--version"], checkout.program.environ
    began = time.perf_counter()
    try:
        subprocess.run(words, env=environ, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LoadTestError(f"`{checkout.name}` does not tell its version: {error}") from error
    return time.perf_counter() - began
