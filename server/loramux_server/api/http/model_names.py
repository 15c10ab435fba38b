"""What a model name means: the base, an adapter, or a certain version of one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loramux_adapters.errors import InvalidAdapterName
from loramux_server.api.http.errors import MODEL_NOT_FOUND
from loramux_server.errors import RequestError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
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
    if not _NAME.fullmatch(adapter) or (at and not _PREFIX.fullmatch(prefix)):
        raise RequestError("the model does not exist", param=param, code=MODEL_NOT_FOUND)
    return RequestedAdapter(adapter, prefix if at else None)


def check_adapter_name(name: str, base_name: str) -> str:
    """The name itself. Raises InvalidAdapterName."""
    if not _NAME.fullmatch(name):
        raise InvalidAdapterName(
            "an adapter's name has 1 to 63 of the characters A-Z a-z 0-9 . _ - and starts with a letter or digit"
        )
    if name == base_name:
        raise InvalidAdapterName("this is the name of the base model")
    return name
