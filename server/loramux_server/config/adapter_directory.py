"""Where an adapter on this machine lies, by the name or the directory that a command was given."""

from __future__ import annotations

from pathlib import Path

from loramux_adapters.artifact.format import CONFIG_FILE
from loramux_adapters.names import file_name_of
from loramux_server.errors import CommandFailed


def find_adapter(spec: str, trained: Path) -> Path:
    """The PEFT directory of an adapter.

    Args:
        spec: a PEFT directory, the directory of a training run, or the name of a run.
        trained: where runs lie that were given no directory of their own.
    Raises:
        CommandFailed: there is none; the message says where it was looked for.
    """
    given = Path(spec).expanduser()
    places = [given, given / "adapter", trained / file_name_of(spec) / "adapter"]
    for place in places:
        if (place / CONFIG_FILE).is_file():
            return place
    raise CommandFailed(
        f"there is no adapter {spec!r}: no {CONFIG_FILE} in {', '.join(str(place) for place in places)}. Train one "
        "with `loramux train --name NAME`, or get one from a server with `loramux adapters pull NAME DIR`"
    )
