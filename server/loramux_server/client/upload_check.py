"""Whether a running server would take an adapter, asked before the work of making one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loramux_server.errors import CommandFailed, ServerRefused
from loramux_server.plain_text import masked

if TYPE_CHECKING:
    from loramux_server.client.connection import ServerConnection

TIMEOUT_SECONDS = 20.0
_UNKNOWN, _BUSY = 404, (429, 503)


def check_upload(url: str, key: str | None, name: str) -> str | None:
    """The id of the base that the server holds; None where a busy server does not say it.

    Asks for the server's models and, for the key and the name, for the archive that the name has now, which takes the
    rights of an upload and of which nothing is read.

    Raises:
        CommandFailed: nobody answers there, it is no loramux server, or it would not take an adapter of this name.
    """
    from loramux_server.client.connection import ServerConnection  # and with it httpx, 0.1 s

    connection = ServerConnection(url, key, TIMEOUT_SECONDS)
    try:
        base = base_of(connection)
        with connection.stream("GET", ("v1", "adapters", name, "archive")):
            pass
    except ServerRefused as error:
        if error.status in _BUSY:
            return None
        if error.status != _UNKNOWN:
            raise CommandFailed(f"--upload {masked(url)}: {error}") from error
    except CommandFailed as error:
        raise CommandFailed(f"--upload: {error}") from error
    return str(base.get("root") or "") or None


def base_of(connection: ServerConnection) -> dict[str, Any]:
    """What a server says of its base. Raises CommandFailed."""
    models = connection.call("GET", ("v1", "models")).body.get("data")
    for model in models if isinstance(models, list) else []:
        if isinstance(model, dict) and model.get("parent") is None and isinstance(model.get("id"), str):
            return model
    raise CommandFailed(f"{connection.shown_url} lists no base model; is it a loramux server?")
