"""What a model name means: the base, an adapter, or a certain version of one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loramux_adapters.names import is_name
from loramux_server.api.http.errors import MODEL_NOT_FOUND
from loramux_server.errors import RequestError

_PREFIX = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True)
class RequestedAdapter:
    """An adapter that a request wants, and the factor of its delta. No prefix: its current version."""

    adapter: str
    version_prefix: str | None = None
    scale: float = 1.0


def resolve_model(model: str, base_name: str, *, param: str = "model") -> RequestedAdapter | None:
    """Understands the base's name (None), `adapter`, `adapter@digest-prefix`, and both behind `base:`.

    Raises RequestError (404), which names `param`, if no adapter can have that name; whether the adapter is registered,
    the store knows.
    """
    if model == base_name:
        return None
    adapter, at, prefix = model.removeprefix(f"{base_name}:").partition("@")
    if not is_name(adapter) or (at and not _PREFIX.fullmatch(prefix)):
        raise RequestError("the model does not exist", param=param, code=MODEL_NOT_FOUND)
    return RequestedAdapter(adapter, prefix if at else None)
