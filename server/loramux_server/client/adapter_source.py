"""What `adapters push` is given: a directory on this machine, or an adapter on a hub, which is fetched."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loramux_adapters.errors import InvalidAdapterName
from loramux_adapters.names import NAME_FORM, is_name
from loramux_server.errors import CommandFailed, ConfigError, HubUnreachable, NotOnHub
from loramux_server.hub.hub_name import PREFIX, HubName

CONVERTIBLE = (".gguf", ".safetensors")


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Exactly one of the first two is set.

    Attributes:
        may_be_path: what is meant to be on a hub could have been a directory, too, which is not there.
    """

    directory: Path | None = None
    on_hub: HubName | None = None
    may_be_path: bool = False

    @classmethod
    def of(cls, text: str) -> AdapterSource:
        """What is there on this machine is meant before what may be on a hub, unless `hub:` says which.

        Raises ConfigError: it can be neither.
        """
        path = Path(text)
        if text.startswith(PREFIX):
            try:
                return cls(on_hub=HubName.parse(text.removeprefix(PREFIX)))
            except ValueError as error:
                raise ConfigError(str(error)) from error
        if not path.exists():
            try:
                return cls(on_hub=HubName.parse(text), may_be_path=True)
            except ValueError:
                pass  # a path then, of which is said that there is nothing
        return cls(directory=path)

    @property
    def name(self) -> str:
        """An adapter's name, where none is given. Raises InvalidAdapterName."""
        if self.on_hub is not None:
            return self.on_hub.repository
        assert self.directory is not None
        name = self.directory.resolve().name
        if not is_name(name):
            raise InvalidAdapterName(f"{NAME_FORM}; the directory's is not, so give one with --name")
        return name

    @contextmanager
    def files(self, progress: Callable[[str, int, int], None], note: Callable[[str], None]) -> Iterator[Path]:
        """A PEFT directory with the adapter's files, while the context lasts.

        Args:
            progress: called with words, bytes that are there and bytes in all, while files are fetched.
            note: called with where they came from.
        Raises NotOnHub, HubUnreachable, AdapterRejected, AdapterTooLarge, CommandFailed.
        """
        if self.on_hub is None:
            assert self.directory is not None
            if self.directory.is_file() and self.directory.suffix in CONVERTIBLE:
                raise CommandFailed(
                    f"{self.directory} is a file: bring it into PEFT's form first, with "
                    f"`loramux adapters convert {self.directory} NEW_DIR`"
                )
            yield self.directory
            return
        from loramux_server.hub.repository import fetch, put_label
        from loramux_server.publishing.adapter_files import copy_adapter

        def tell(done: int, total: int) -> None:
            mib = f"{done / 2**20:,.1f} of {total / 2**20:,.1f} MiB"
            progress(f"fetching {self.on_hub} from the hub: {mib}", done, total)

        try:
            fetched = fetch(self.on_hub, progress=tell)
        except (NotOnHub, HubUnreachable) as error:
            if not self.may_be_path:
                raise
            raise type(error)(f"{error}; and there is no directory {self.on_hub} here") from error
        source = "the hub's cache on this machine, since the hub cannot be asked" if fetched.cached else "the hub"
        note(f"{fetched.label}, from {source}")
        with tempfile.TemporaryDirectory(prefix="loramux-") as scratch:
            copy_adapter(fetched.directory, (), Path(scratch), limit=None)
            put_label(Path(scratch), fetched.label)
            yield Path(scratch)
