"""What an adapter may be called: `adapter`, or `org/adapter` as model hubs write it. A label, never part of a path.

One that belongs to a tenant is kept as `tenant~adapter`. Its tenant never writes that prefix; the operator does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

from loramux_adapters.errors import InvalidAdapterName

MAX_NAME = 255
# The last words of the API's paths below /v1/adapters/NAME. A name that ends in `/pin` could be meant by DELETE
# .../pin, whether the slash comes as itself or as %2F, which proxies may decode on the way.
PATH_WORDS = frozenset({"archive", "pin", "rollback"})
TENANT_MARK = "~"  # between a tenant's name and that of its adapter
NAME_FORM = (
    f"an adapter's name is 1 to {MAX_NAME} characters: one or more parts with a / between them, such as adapter or "
    "org/adapter; a part is made of A-Z a-z 0-9 . _ - and starts with a letter, a digit or _; before the name of a "
    "tenant's, the operator writes TENANT~"
)
_PART = "[A-Za-z0-9_][A-Za-z0-9._-]*"
_TENANT = "[a-z0-9][a-z0-9._-]{0,62}"
# Also for programs in other languages; with `MAX_NAME` all but PATH_WORDS.
NAME_PATTERN = f"^({_TENANT}{TENANT_MARK})?{_PART}(/{_PART})*$"
_NAME = re.compile(NAME_PATTERN)
_MAX_FILE_NAME = 80


def is_name(name: str) -> bool:
    """Whether an adapter may be called so. No name holds a `:`, `@`, `+` or `,`, which have meanings of their own."""
    above, _, last = name.rpartition("/")
    return _has_form(name) and not (above and last in PATH_WORDS)


def check_name(name: str, reserved: Collection[str] = ()) -> str:
    """The name itself. Raises `InvalidAdapterName` for one that no adapter can have, or that is `reserved`."""
    if not _has_form(name):
        raise InvalidAdapterName(NAME_FORM)
    if not is_name(name):
        raise InvalidAdapterName(f"the last part of a name cannot be {', '.join(sorted(PATH_WORDS))}")
    if name in reserved:
        raise InvalidAdapterName(f"the name {name} belongs to the base model")
    return name


def is_tenant(name: str) -> bool:
    """Whether a tenant may be called so."""
    return re.fullmatch(_TENANT, name) is not None


def of_tenant(tenant: str, name: str) -> str:
    """What a tenant's adapter of this name is kept as."""
    return f"{tenant}{TENANT_MARK}{name}"


def tenant_of(name: str) -> str | None:
    """The tenant that an adapter belongs to; None for one that is shared."""
    tenant, mark, _ = name.partition(TENANT_MARK)
    return tenant if mark else None


def _has_form(name: str) -> bool:
    return len(name) <= MAX_NAME and _NAME.fullmatch(name) is not None


def file_name_of(name: str) -> str:
    """A file name that tells people which adapter it is: the name itself, where it is short and has no slash."""
    flat = name.replace("/", "--")
    if len(flat) <= _MAX_FILE_NAME:
        return flat
    return f"{flat[: _MAX_FILE_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
