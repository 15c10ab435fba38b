"""How the files of an adapter become a version that is served: checked, tried out, stored, and ready in host memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loramux_adapters.artifact.format import CHAT_TEMPLATE_FILE, GENERATION_FILE
from loramux_adapters.artifact.own_tokens import OWN_TOKENS_FILE
from loramux_adapters.errors import AdapterCorrupt, AdapterNotFound, BaseMismatch
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.verify import Checked
from loramux_adapters.store.store import AdapterStore, Published, Staging
from loramux_server.fingerprint.replay import ReplayOutcome


class HostMemory(Protocol):
    """`HostCache`, as far as publishing goes."""

    def put(self, adapter: HostAdapter) -> None: ...

    def discard(self, version: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Publication:
    """What was published.

    Attributes:
        stored: what its name points at now.
        checked: what the check found.
        proof: how its fingerprint replayed.
    """

    stored: Published
    checked: Checked
    proof: ReplayOutcome


class Publisher:
    """Any thread may call any method.

    An adapter's weights are in memory from its check until it is published or refused, beside the budget of the host
    cache while it is tried out. They are bf16 and not larger than its files, so together they are at most as many times
    the largest upload as adapters come in at a time: uploads and vLLM's calls share `Limits.uploads` places, the
    watched directory and a hub bring one at a time, and the preloaded ones come one by one before the first request.
    """

    def __init__(
        self,
        store: AdapterStore,
        host: HostMemory,
        check: Callable[[Path], Checked],
        prove: Callable[[Path, Checked], ReplayOutcome],
    ) -> None:
        """`check` and `prove` are what `publish_files` has to ask; both may raise."""
        self._store = store
        self._host = host
        self._check = check
        self._prove = prove

    def publish(self, name: str, staging: Staging, checked: Checked, proof: ReplayOutcome) -> Published:
        """Make files that were checked and tried out the current version of `name`, ready in host memory if it fits.

        Raises InvalidAdapterName, AdapterRejected, StoreUnavailable; then nothing is published or kept.
        """
        keep_own(staging.directory, checked)
        # First, so that a deletion that follows at once finds it in memory and takes it out again.
        self._host.put(checked.adapter)
        try:
            return self._store.publish(
                name,
                staging,
                rank=checked.rank,
                base_id=checked.base_id,
                target_modules=checked.target_modules,
                proof=proof,
                version=checked.version,
                layers=checked.layers,
                notes=checked.notes,
            )
        except BaseException:
            self._host.discard(checked.version)  # another name may have it: then it is loaded when it is asked for
            raise

    def publish_files(
        self, name: str, fill: Callable[[Path], object], checked_as: Callable[[str], None] = lambda version: None
    ) -> Publication:
        """Have `fill` put an adapter's files into a fresh directory, check and try them out, and publish them.

        `checked_as` is told their version before they are tried out. Raises what it, `fill`, the check and the trial
        raise, and InvalidAdapterName, AdapterRejected, StoreUnavailable.
        """
        self._store.check_name(name)
        with self._store.stage() as staging:
            fill(staging.directory)
            checked = self._check(staging.directory)
            checked_as(checked.version)
            proof = self._prove(staging.directory, checked)
            return Publication(self.publish(name, staging, checked, proof), checked, proof)


def keep_own(directory: Path, checked: Checked) -> None:
    """Leave a chat template, added tokens and generation defaults among the files if they count, and none otherwise."""
    template = checked.chat_template
    for name, content in (
        (CHAT_TEMPLATE_FILE, None if template is None else template.encode()),
        (GENERATION_FILE, checked.generation.dump()),
        (OWN_TOKENS_FILE, None if checked.own_tokens is None else checked.own_tokens.dump()),
    ):
        path = directory / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)


def is_usable(store: AdapterStore, name: str) -> bool:
    """Whether requests for this name are served as the store is now."""
    try:
        store.acquire(name).release()
    except (AdapterNotFound, AdapterCorrupt, BaseMismatch):
        return False
    return True
