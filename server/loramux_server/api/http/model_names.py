"""What a model name means: the base, an adapter, a certain version of one, or one that a hub has."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loramux_adapters.names import is_name
from loramux_server.api.http.errors import MODEL_NOT_FOUND
from loramux_server.errors import RequestError
from loramux_server.hub.hub_name import PREFIX, HubName

_PREFIX = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True)
class RequestedAdapter:
    """An adapter that a request wants, and the factor of its delta. No prefix: its current version.

    Attributes:
        hub: where to fetch it from if the store does not hold it; None for one that was published by other ways.
    """

    adapter: str
    version_prefix: str | None = None
    scale: float = 1.0
    hub: HubName | None = None


def resolve_model(model: str, base_name: str, *, param: str = "model") -> RequestedAdapter | None:
    """Understands the base's name (None), `adapter`, `adapter@digest-prefix`, `hub:owner/name`,
    `hub:owner/name@revision`, and all behind `base:`.

    Raises RequestError (404), which names `param`, if no adapter can have that name; whether the adapter is registered,
    the store knows.
    """
    if model == base_name:
        return None
    name = model.removeprefix(f"{base_name}:")
    if name.startswith(PREFIX):
        try:
            on_hub = HubName.parse(name.removeprefix(PREFIX))
        except ValueError as error:
            raise RequestError(f"the model does not exist: {error}", param=param, code=MODEL_NOT_FOUND) from error
        return RequestedAdapter(on_hub.stored_as, hub=on_hub)
    adapter, at, prefix = name.partition("@")
    if not is_name(adapter) or (at and not _PREFIX.fullmatch(prefix)):
        raise RequestError("the model does not exist", param=param, code=MODEL_NOT_FOUND)
    return RequestedAdapter(adapter, prefix if at else None)
