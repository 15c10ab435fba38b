"""`model` of a request -> the base, or an adapter and maybe one of its versions."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loramux_adapters.errors import InvalidAdapterName
from loramux_server.api.errors import MODEL_NOT_FOUND
from loramux_server.errors import RequestError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_PREFIX = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True)
class Target:
    """What a request wants. No adapter: the bare base. No prefix: the adapter's current version."""

    adapter: str | None = None
    version_prefix: str | None = None


def resolve(model: str, base_name: str) -> Target:
    """Understands the base's name, `adapter`, `adapter@digest-prefix`, and both behind `base:`.

    Raises RequestError (404): no adapter can have that name. Whether it is registered is the store's answer.
    """
    if model == base_name:
        return Target()
    adapter, at, prefix = model.removeprefix(f"{base_name}:").partition("@")
    if not _NAME.fullmatch(adapter) or (at and not _PREFIX.fullmatch(prefix)):
        raise RequestError("the model does not exist", param="model", code=MODEL_NOT_FOUND)
    return Target(adapter, prefix if at else None)


def check_adapter_name(name: str, base_name: str) -> str:
    """The name itself. Raises InvalidAdapterName."""
    if not _NAME.fullmatch(name):
        raise InvalidAdapterName(
            "an adapter's name has 1 to 63 of the characters A-Z a-z 0-9 . _ - and starts with a letter or digit"
        )
    if name == base_name:
        raise InvalidAdapterName("this is the name of the base model")
    return name
