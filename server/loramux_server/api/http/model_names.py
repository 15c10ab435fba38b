"""`model` and `adapters` of a request -> the base, or adapters, each maybe of a certain version."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loramux_adapters.errors import InvalidAdapterName
from loramux_server.api.http.errors import MODEL_NOT_FOUND
from loramux_server.errors import RequestError

if TYPE_CHECKING:
    from loramux_server.api.completions.schemas import AdapterPart

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_PREFIX = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True)
class Target:
    """An adapter that a request wants, and the factor of its delta. No prefix: its current version."""

    adapter: str
    version_prefix: str | None = None
    scale: float = 1.0


def resolve(model: str, base_name: str, *, param: str = "model") -> Target | None:
    """Understands the base's name (None), `adapter`, `adapter@digest-prefix`, and both behind `base:`.

    Raises RequestError (404), which names `param`: no adapter can have that name. Whether it is registered is the
    store's answer.
    """
    if model == base_name:
        return None
    adapter, at, prefix = model.removeprefix(f"{base_name}:").partition("@")
    if not _NAME.fullmatch(adapter) or (at and not _PREFIX.fullmatch(prefix)):
        raise RequestError("the model does not exist", param=param, code=MODEL_NOT_FOUND)
    return Target(adapter, prefix if at else None)


def resolve_all(model: str, parts: Sequence[AdapterPart] | None, base_name: str) -> tuple[Target, ...]:
    """What `model` and `adapters` of a request mean together; nothing: the bare base. Raises RequestError."""
    target = resolve(model, base_name)
    if parts is None:
        return () if target is None else (target,)
    if target is not None:
        raise RequestError(
            "with 'adapters', 'model' names the base; list the adapter in 'adapters' instead",
            param="model",
            code="invalid_value",
        )
    targets: dict[str, Target] = {}
    for index, part in enumerate(parts):
        param = f"adapters.{index}.name"
        target = resolve(part.name, base_name, param=param)
        if target is None:
            raise RequestError(
                "this is the base itself; 'adapters' lists what is added to it", param=param, code="invalid_value"
            )
        if target.adapter in targets:
            raise RequestError(
                f"the adapter {target.adapter} is listed twice; list it once, with the sum of the scales",
                param=param,
                code="invalid_value",
            )
        targets[target.adapter] = replace(target, scale=part.scale)
    return tuple(targets.values())


def check_adapter_name(name: str, base_name: str) -> str:
    """The name itself. Raises InvalidAdapterName."""
    if not _NAME.fullmatch(name):
        raise InvalidAdapterName(
            "an adapter's name has 1 to 63 of the characters A-Z a-z 0-9 . _ - and starts with a letter or digit"
        )
    if name == base_name:
        raise InvalidAdapterName("this is the name of the base model")
    return name
