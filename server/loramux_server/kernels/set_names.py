"""The names of kernel sets (choice.py makes them), without PyTorch: a wrong one is refused before that is imported."""

from __future__ import annotations

from loramux_server.did_you_mean import suggest
from loramux_server.errors import ConfigError
from loramux_server.kernels.compiled.library import native_library, why_unusable

COMPILED = ("native", "modules")  # these have a name for each instruction set too: "native-avx2"
OTHERS = ("tensor", "reference", "triton", "cuda")


def set_names() -> list[str]:
    """All names on this machine, in the order that an error lists them."""
    library = native_library()
    isas = ["", *(f"-{isa.label}" for isa in reversed(library.isas if library else ()))]
    return [*(f"{kind}{isa}" for kind in COMPILED for isa in isas), *OTHERS]


def check_name(request: str) -> None:
    """Raises ConfigError: there is no set of this name, or it needs compiled kernels that are not there."""
    names = set_names()
    library_missing = why_unusable()
    if request not in names:
        kind, _, isa = request.partition("-")
        if not (library_missing and kind in COMPILED and isa):
            raise ConfigError(
                f"there are no kernels named {request!r}; choose one of {', '.join(names)}{suggest(request, names)}"
            )
    if library_missing and request not in OTHERS:
        raise ConfigError(f"the kernels {request!r} cannot be used here: {library_missing}")
